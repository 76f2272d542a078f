"""Auxiliary-loss-free balancing from the equations of Wang 2024 (arXiv:2408.15664), token by token."""

import torch

Tensor = torch.Tensor


def gates(logits: Tensor, bias: Tensor, k: int) -> Tensor:
    """Eq. 3 for one token: g_i = s_i where s_i + b_i is among the k largest, else 0, with s the sigmoid."""
    scores = 1 / (1 + torch.exp(-logits))
    out = torch.zeros_like(scores)
    left = [float(s + b) for s, b in zip(scores.detach(), bias, strict=True)]
    for _ in range(k):
        best = left.index(max(left))
        out = out + torch.nn.functional.one_hot(torch.tensor(best), len(left)) * scores
        left[best] = -float("inf")
    return out


def updated(bias: Tensor, counts: list[float], rate: float) -> Tensor:
    """Algorithm 1: b_i + u sign(e_i), e_i the mean count minus expert i's."""
    mean = sum(counts) / len(counts)
    signs = [1.0 if count < mean else -1.0 if count > mean else 0.0 for count in counts]
    return torch.stack([b + rate * sign for b, sign in zip(bias, signs, strict=True)])
