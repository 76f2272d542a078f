"""HMoE (Wang et al. 2024, arXiv:2408.10681) written from its equations, one token and one expert at a time.

Everything works in the dtype it is given and is differentiable by autograd, except where a set is chosen.
An expert is a triple (W_g[h_i, d], W_p[h_i, d], W_o[d, h_i]); `chosen` is a list with one list of expert
indices per token; `probs` is P[T, N], the softmax over ALL experts before selection.
"""

import torch
from torch import Tensor

Expert = tuple[Tensor, Tensor, Tensor]
Chosen = list[list[int]]

ARITHMETIC = (9, 11, 13, 15, 17, 19, 21, 23)
GEOMETRIC = (1, 2, 4, 8, 16, 32, 64, 128)
HYBRID = (1, 1, 1, 1, 2, 2, 4, 4)


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def swiglu_expert(x: Tensor, expert: Expert) -> Tensor:
    """Eq. 1 for one token x[d]: e_i(x) = W_o ( SiLU(W_g x) * (W_p x) )."""
    gate, up, down = expert
    return down @ (silu(gate @ x) * (up @ x))


def router_probabilities(x: Tensor, router: Tensor) -> Tensor:
    """Eq. 7 for all tokens x[T, d]: P_t = softmax(W_r x_t) over all N experts, router[N, d]."""
    rows = []
    for x_t in x:
        logits = router @ x_t
        e = torch.exp(logits - logits.max())
        rows.append(e / e.sum())
    return torch.stack(rows)


def descending(p: Tensor) -> list[int]:
    """Expert indices by falling probability; equal probabilities by rising index."""
    values = p.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def top_k(p: Tensor, k: int) -> list[int]:
    """Eq. 8, the set: E_t = the K most probable experts of one token."""
    return descending(p)[:k]


def top_p(p: Tensor, threshold: float) -> list[int]:
    """Eqs. 9-11, the set: the shortest prefix of the sorted experts whose mass reaches the threshold."""
    order, mass = descending(p), 0.0
    for t_star, i in enumerate(order, start=1):
        mass += p[i].item()  # Eq. 10: cumulative mass
        if mass >= threshold:
            return order[:t_star]
    return order  # rounding kept the total below the threshold: all N


def gates(p: Tensor, members: list[int], renormalize: bool = True) -> dict[int, Tensor]:
    """Eq. 8 (and 11), the weights: g_i = P_i / sum of P_j over E_t, and 0 outside E_t."""
    total = sum((p[j] for j in members), start=torch.zeros((), dtype=p.dtype))
    return {i: p[i] / total if renormalize else p[i] for i in members}


def select(probs: Tensor, *, k: int | None = None, threshold: float | None = None) -> Chosen:
    """The chosen experts of every token, by Top-K or Top-P."""
    if k is not None:
        return [top_k(p, k) for p in probs]
    assert threshold is not None
    return [top_p(p, threshold) for p in probs]


def layer(
    x: Tensor,
    router: Tensor,
    experts: list[Expert],
    *,
    k: int | None = None,
    threshold: float | None = None,
    renormalize: bool = True,
) -> tuple[Tensor, Tensor, Chosen]:
    """Eq. 6: y_t = sum over E_t of g_i(x_t) e_i(x_t). Returns (y, probs, chosen)."""
    probs = router_probabilities(x, router)
    chosen = select(probs, k=k, threshold=threshold)
    rows = []
    for t, members in enumerate(chosen):
        y_t = torch.zeros_like(x[t])
        for i, gate in gates(probs[t], members, renormalize).items():
            y_t = y_t + gate * swiglu_expert(x[t], experts[i])
        rows.append(y_t)
    return torch.stack(rows), probs, chosen


def fractions(chosen: Chosen, n_experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """f_i = mean over tokens of m_t,i, the share of tokens that use expert i; sums to the mean set size."""
    f = torch.zeros(n_experts, dtype=dtype)
    for members in chosen:
        for i in members:
            f[i] += 1 / len(chosen)
    return f


def load_balance(probs: Tensor, chosen: Chosen) -> Tensor:
    """Eq. 3: L_lb = N sum_i f_i Pbar_i. Uniform value K: f is not divided by K."""
    n_tokens, n_experts = probs.shape
    f = fractions(chosen, n_experts, probs.dtype)
    loss = torch.zeros((), dtype=probs.dtype)
    for i in range(n_experts):
        for t in range(n_tokens):
            loss = loss + n_experts * f[i] * probs[t, i] / n_tokens
    return loss


def scaled_widths(widths: list[int], normalize: str) -> list[float]:
    """The h_i that enter Eq. 4. The paper prints raw widths ("none"), which cannot be meant literally."""
    divisor = {"none": 1, "mean": sum(widths) / len(widths), "max": max(widths), "sum": sum(widths)}[normalize]
    return [h / divisor for h in widths]


def width_traffic(chosen: Chosen, widths: list[int], normalize: str, dtype: torch.dtype) -> Tensor:
    """M_i of Eq. 4: mean over tokens of m_t,i h_i = f_i h_i."""
    return fractions(chosen, len(widths), dtype) * torch.tensor(scaled_widths(widths, normalize), dtype=dtype)


def parameter_penalty(probs: Tensor, chosen: Chosen, widths: list[int], normalize: str = "mean") -> Tensor:
    """Eq. 4: L_pp = N sum_i M_i Pbar_i."""
    n_tokens, n_experts = probs.shape
    m = width_traffic(chosen, widths, normalize, probs.dtype)
    loss = torch.zeros((), dtype=probs.dtype)
    for t in range(n_tokens):
        for i in range(n_experts):
            loss = loss + n_experts * m[i] * probs[t, i] / n_tokens
    return loss


def parameter_penalty_logit_gradient(
    probs: Tensor, chosen: Chosen, widths: list[int], normalize: str = "mean"
) -> Tensor:
    """dL_pp/dlogit_{t,j} = (N/T) P_t,j ( M_j - sum_i M_i P_t,i ): Eq. 4 through the softmax, f held fixed."""
    n_tokens, n_experts = probs.shape
    m = width_traffic(chosen, widths, normalize, probs.dtype)
    grad = torch.zeros_like(probs)
    for t in range(n_tokens):
        expected = sum(float(m[i] * probs[t, i]) for i in range(n_experts))
        for j in range(n_experts):
            grad[t, j] = n_experts / n_tokens * probs[t, j] * (m[j] - expected)
    return grad


def router_entropy(probs: Tensor, scale_by_n: bool = False) -> Tensor:
    """Eq. 5 with the sign its purpose needs: mean over tokens of H(P_t) = -sum_i P_t,i log P_t,i (nats)."""
    n_tokens, n_experts = probs.shape
    loss = torch.zeros((), dtype=probs.dtype)
    for p in probs:
        for p_i in p:
            loss = loss - p_i * torch.log(p_i) / n_tokens
    return n_experts * loss if scale_by_n else loss


def printed_entropy(probs: Tensor) -> Tensor:
    """Eq. 5 as printed: N sum_i P_i log P_i, negative entropy; minimising it RAISES the entropy."""
    return -router_entropy(probs, scale_by_n=True)


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of (log sum_i exp logit_t,i)^2 (Zoph et al. 2022, ST-MoE, arXiv:2202.08906)."""
    loss = torch.zeros((), dtype=logits.dtype)
    for row in logits:
        largest = row.max().detach()
        loss = loss + (largest + torch.log(torch.exp(row - largest).sum())) ** 2 / len(logits)
    return loss


def widths_from_ratios(ratios: tuple[int, ...], total: int, multiple_of: int = 1) -> list[int]:
    """h_i = H r_i / sum r in units of `multiple_of`, largest remainders rounded up so that sum h_i = H."""
    units, whole = total // multiple_of, sum(ratios)
    floor = [units * r // whole for r in ratios]
    remainders = [units * r % whole for r in ratios]
    spare = units - sum(floor)
    for i in sorted(range(len(ratios)), key=lambda i: (-remainders[i], i))[:spare]:
        floor[i] += 1
    return [f * multiple_of for f in floor]


def harmonic_over_arithmetic(widths: list[int]) -> float:
    """Mean active width at the penalty's fixed point f_i ~ 1/h_i, over K times the mean width."""
    harmonic = len(widths) / sum(1 / h for h in widths)
    return harmonic / (sum(widths) / len(widths))


def layer_parameters(d_model: int, widths: list[int]) -> int:
    """Experts 3 d h_i each, router N d."""
    return sum(3 * d_model * h for h in widths) + len(widths) * d_model


def model_parameters(vocab_size: int, d_model: int, n_layers: int, attention_width: int, ffn: int) -> int:
    """Untied embedding and head; per block 4 attention matrices, `ffn` and 2 norms; the last norm."""
    block = 4 * d_model * attention_width + ffn + 2 * d_model
    return 2 * vocab_size * d_model + n_layers * block + d_model
