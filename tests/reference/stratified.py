"""Stratified mixture of experts from the equations of Xu 2023 (arXiv:2305.02176, section 3), token by token."""

import torch

Tensor = torch.Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + eps) * weight + bias


def expert(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """FFN_e(x) = W1 ReLU(W2 x): w_in [w, d], w_out [d, w]."""
    return w_out @ torch.clamp(w_in @ x, min=0)


def gate(x: Tensor, weight: Tensor) -> Tensor:
    """G = softmax(W_i x) over the visible experts."""
    logits = weight @ x
    shifted = torch.exp(logits - logits.max())
    return shifted / shifted.sum()


def mixture(x: Tensor, weight: Tensor, experts: list, first: int, renormalize: bool) -> tuple[Tensor, int]:
    """Output of a top-2 mixture of the experts from `first` on, and the first choice among all experts."""
    gates = gate(x, weight)
    best = sorted(range(len(gates)), key=lambda e: (-float(gates[e].detach()), e))[:2]
    total = sum(gates[e] for e in best) if renormalize else 1.0
    y = torch.zeros_like(x)
    for e in best:
        y = y + gates[e] / total * expert(x, *experts[first + e])
    return y, first + best[0]


def stratum_of(e: int, strata: list[int]) -> int:
    """The stratum (1, 2, ...) of expert e."""
    for number, n in enumerate(strata, 1):
        if e < n:
            return number
        e -= n
    raise ValueError(e)


def paper(x: Tensor, strata: list[int], gates: list, norms: list, experts: list, renormalize: bool):
    """x_new = x + u in every pass, u the mixture of the normalised token; returns the token and its passes."""
    state, passes = 0, 0
    while state < len(strata):
        u, choice = mixture(layer_norm(x, *norms[state]), gates[state], experts, sum(strata[:state]), renormalize)
        x, state, passes = x + u, stratum_of(choice, strata), passes + 1
    return x, passes


def code(x: Tensor, strata: list[int], gates: list, first_norm: tuple, norms: list, experts: list, renormalize: bool):
    """The authors' code: the block's own norm before the first pass, then the stream itself is normalised with the norm
    of the stratum just passed."""
    u, choice = mixture(layer_norm(x, *first_norm), gates[0], experts, 0, renormalize)
    x, state, passes = x + u, stratum_of(choice, strata), 1
    while state < len(strata):
        x = layer_norm(x, *norms[state - 1])
        u, choice = mixture(x, gates[state], experts, sum(strata[:state]), renormalize)
        x, state, passes = x + u, stratum_of(choice, strata), passes + 1
    return layer_norm(x, *norms[-1]), passes


def balance(gates: Tensor) -> Tensor:
    """L_i = E_i sum_e f_e p_e for gates [t, E_i]: f_e the share of tokens that choose e first, p_e the mean gate."""
    n_tokens, n_experts = gates.shape
    loss = torch.zeros((), dtype=gates.dtype)
    for e in range(n_experts):
        chosen = sum(1 for row in gates if int(row.argmax()) == e)
        loss = loss + chosen / n_tokens * gates[:, e].mean()
    return n_experts * loss
