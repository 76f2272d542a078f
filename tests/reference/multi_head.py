"""Multi-head mixture of experts from the equations of Wu 2024 (arXiv:2404.15045, Eqs. 3 to 8), part by part."""

import torch

Tensor = torch.Tensor


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_out: Tensor) -> Tensor:
    """w_gate and w_up [w, d], w_out [d, w]."""
    gate = w_gate @ x
    return w_out @ (gate / (1 + torch.exp(-gate)) * (w_up @ x))


def mixture(u: Tensor, router: Tensor, experts: list, top_k: int, renormalize: bool) -> Tensor:
    """sum over the k best experts of g_e FFN_e(u)."""
    scores = torch.exp(router @ u)
    scores = scores / scores.sum()
    best = sorted(range(len(scores)), key=lambda e: (-float(scores[e].detach()), e))[:top_k]
    total = sum(scores[e] for e in best) if renormalize else 1.0
    out = torch.zeros_like(u)
    for e in best:
        out = out + scores[e] / total * swiglu(u, *experts[e])
    return out


def multi_head(x: Tensor, head: tuple, merge: tuple, h: int, part, add_parts: bool = False) -> Tensor:
    """One token: y = W_merge [o_1, ..., o_h] + b with o_j = part(u_j), u_j the j-th of h slices of W_head x + b."""
    projected = head[0] @ x + head[1]
    size = len(x) // h
    outputs = []
    for j in range(h):
        u = projected[j * size : (j + 1) * size]
        outputs.append(part(u) + u if add_parts else part(u))
    return merge[0] @ torch.cat(outputs) + merge[1]
