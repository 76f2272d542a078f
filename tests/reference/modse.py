"""MoDSE's routing (Sun 2024, arXiv:2409.12210): noisy top-k of Shazeer 2017 (arXiv:1701.06538, Eqs. 3-5), by loops."""

import math

import torch

Tensor = torch.Tensor


def noisy_logits(x: Tensor, weight: Tensor, spread: Tensor, noise: Tensor) -> Tensor:
    """Eq. 4 for one token: H(x)_e = (x W_g)_e + noise_e Softplus((x W_noise)_e)."""
    out = []
    for e in range(len(weight)):
        clean, scale = torch.zeros((), dtype=x.dtype), torch.zeros((), dtype=x.dtype)
        for i in range(len(x)):
            clean = clean + weight[e, i] * x[i]
            scale = scale + spread[e, i] * x[i]
        out.append(clean + noise[e] * torch.log(1 + torch.exp(scale)))
    return torch.stack(out)


def gates(logits: Tensor, k: int) -> Tensor:
    """Eqs. 3 and 5: softmax of the k largest logits, all others set to minus infinity."""
    values = logits.tolist()
    kept = sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]
    total = sum(torch.exp(logits[e]) for e in kept)
    zero = torch.zeros((), dtype=logits.dtype)
    return torch.stack([torch.exp(logits[e]) / total if e in kept else zero for e in range(len(values))])


NOISE_AT_START = math.log(2)
