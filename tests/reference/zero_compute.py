"""MoE++ from the equations of Jin 2024 (arXiv:2410.07348, section 3), row by row."""

import torch

Tensor = torch.Tensor


def zero(x: Tensor) -> Tensor:
    """E(x) = 0."""
    return 0 * x


def copy(x: Tensor) -> Tensor:
    """E(x) = x."""
    return x


def constant(x: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
    """E(x) = a_1 x + a_2 v with [a_1, a_2] = Softmax(W x), W of shape [2, d]."""
    first, second = torch.dot(weight[0], x), torch.dot(weight[1], x)
    total = torch.exp(first) + torch.exp(second)
    return torch.exp(first) / total * x + torch.exp(second) / total * vector


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_out: Tensor) -> Tensor:
    """An ordinary expert: w_gate and w_up [h, d], w_out [d, h]."""
    gate = torch.mv(w_gate, x)
    return torch.mv(w_out, gate / (1 + torch.exp(-gate)) * torch.mv(w_up, x))


def residual_logits(score: Tensor, x: Tensor, mixing: Tensor, before: Tensor | None) -> Tensor:
    """Gating residual for one token: W x in the first layer, W x + W_g G(x of the layer before) in the others."""
    logits = []
    for e, row in enumerate(score):
        logit = torch.dot(row, x)
        if before is not None:
            for f, earlier in enumerate(before):
                logit = logit + mixing[e, f] * earlier
        logits.append(logit)
    return torch.stack(logits)


def muted_gates(logits: Tensor, k: int, muted: list[int]) -> Tensor:
    """Top-k of the softmax; muted experts (the zero expert) get 0 and the rest is divided by its own sum."""
    probabilities = torch.exp(logits) / torch.exp(logits).sum()
    order = sorted(range(len(logits)), key=lambda e: (-float(probabilities[e].detach()), e))[:k]
    heard = [e for e in order if e not in muted]
    total = sum(probabilities[e] for e in heard)
    gates = [probabilities[e] / total if e in heard else 0 * probabilities[e] for e in range(len(logits))]
    return torch.stack(gates)


def weighted_balance(probabilities: Tensor, chosen: list[list[int]], widths: list[int], tau: float) -> Tensor:
    """sum_e eta_e f_e P_e, eta_e = 1 where expert e computes and tau where its width is 0."""
    n_tokens = len(chosen)
    loss = torch.zeros((), dtype=probabilities.dtype)
    for e, width in enumerate(widths):
        fraction = sum(e in members for members in chosen) / n_tokens
        mean = sum(probabilities[t, e] for t in range(n_tokens)) / n_tokens
        loss = loss + (1.0 if width else tau) * fraction * mean
    return loss
