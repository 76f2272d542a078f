"""Group-limited choice of experts and DeepSeek-V3's gate (arXiv:2405.04434, section 2.2.2; arXiv:2412.19437, Eqs.
12-16), one token at a time."""

import torch

Tensor = torch.Tensor


def descending(values: list[float]) -> list[int]:
    """Places by falling value; equal values by rising place."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def allowed(scores: Tensor, sizes: list[int], top_groups: int, best: int) -> list[int]:
    """Experts of the token's `top_groups` best groups; a group's score is the mean of its `best` largest."""
    groups, start = [], 0
    for size in sizes:
        groups.append(list(range(start, start + size)))
        start += size
    of_group = []
    for members in groups:
        largest = sorted((scores[e].item() for e in members), reverse=True)[:best]
        of_group.append(sum(largest) / len(largest))
    return [e for g in descending(of_group)[:top_groups] for e in groups[g]]


def choose(scores: Tensor, members: list[int], k: int) -> list[int]:
    """The k of `members` with the largest scores."""
    return sorted(members, key=lambda e: (-scores[e].item(), e))[:k]


def v3_gates(logits: Tensor, bias: Tensor, k: int, sizes: list[int], top_groups: int, scale: float) -> Tensor:
    """s = sigmoid(logits); groups by the sum of their two best s + b; k of them by s + b; g = scale * s / sum s."""
    s = 1 / (1 + torch.exp(-logits))
    chosen = choose(s + bias, allowed(s + bias, sizes, top_groups, best=2), k)
    total = sum(s[e] for e in chosen)
    gates = []
    for e in range(len(logits)):
        gates.append(scale * s[e] / total if e in chosen else torch.zeros((), dtype=logits.dtype))
    return torch.stack(gates)
