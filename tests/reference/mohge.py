"""Two-level routing and the two losses of MoHGE (arXiv:2604.23108) as this library reads them, by loops."""

import torch

Tensor = torch.Tensor


def softmax(values: list[Tensor]) -> list[Tensor]:
    total = sum(torch.exp(value) for value in values)
    return [torch.exp(value) / total for value in values]


def largest(values: list[Tensor], k: int, among: list[int]) -> list[int]:
    """The k largest of some entries; equal ones by rising index."""
    return sorted(among, key=lambda i: (-float(values[i].detach()), i))[:k]


def probabilities(x: Tensor, group_weight: Tensor, weight: Tensor, groups: list[list[int]]) -> tuple[list, list]:
    """(P(g), P(e)) for one token: P(e) = P(g) times the softmax over the experts of e's group."""
    over_groups = softmax([torch.dot(row, x) for row in group_weight])
    over_experts: list = [None] * len(weight)
    for g, members in enumerate(groups):
        inside = softmax([torch.dot(weight[e], x) for e in members])
        for e, p in zip(members, inside, strict=True):
            over_experts[e] = over_groups[g] * p
    return over_groups, over_experts


def gates(x: Tensor, group_weight: Tensor, weight: Tensor, groups: list[list[int]], top_groups: int, k: int) -> Tensor:
    """The k most probable experts of the chosen groups together, renormalised."""
    over_groups, over_experts = probabilities(x, group_weight, weight, groups)
    chosen = largest(over_groups, top_groups, list(range(len(groups))))
    kept = largest(over_experts, k, [e for g in chosen for e in groups[g]])
    total = sum(over_experts[e] for e in kept)
    return torch.stack([over_experts[e] / total if e in kept else 0 * over_experts[e] for e in range(len(weight))])


def group_penalty(probs: Tensor, chosen: list[list[int]], widths: list[int]) -> Tensor:
    """G sum_g f_g c_g P_g, f_g the share of rows, c_g the width over the mean of the groups' widths."""
    each = sorted(set(widths))
    rows = sum(len(members) for members in chosen)
    loss = torch.zeros((), dtype=probs.dtype)
    for width in each:
        inside = [e for e, w in enumerate(widths) if w == width]
        fraction = sum(e in inside for members in chosen for e in members) / rows
        probability = sum(probs[t, e] for t in range(len(probs)) for e in inside) / len(probs)
        loss = loss + len(each) * fraction * width / (sum(each) / len(each)) * probability
    return loss


def intra_group_balance(probs: Tensor, chosen: list[list[int]], widths: list[int]) -> Tensor:
    """Mean over groups of N_g sum_e f_e P_e with f and P relative to their sums over the group."""
    each, loss = sorted(set(widths)), torch.zeros((), dtype=probs.dtype)
    for width in each:
        inside = [e for e, w in enumerate(widths) if w == width]
        rows = {e: sum(e in members for members in chosen) for e in inside}
        mass = {e: sum(probs[t, e] for t in range(len(probs))) for e in inside}
        if not sum(rows.values()):
            continue
        for e in inside:
            share = rows[e] / sum(rows.values())
            loss = loss + len(inside) * share * mass[e] / sum(mass.values()) / len(each)
    return loss
