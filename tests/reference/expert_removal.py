"""Removing experts, from the equations, token by token (NAEE, arXiv:2402.14800; MoE-I2, arXiv:2411.01016; REAP)."""

import torch


def expert(gate, up, down, x):
    a = gate @ x
    return down @ (a * torch.sigmoid(a) * (up @ x))


def gates(router, x, k, removed=(), renormalised=True):
    """{expert: gate} of one token: softmax over the experts that are left, the k largest, divided by their sum."""
    logits = router @ x
    left = [e for e in range(len(router)) if e not in removed]
    total = sum(torch.exp(logits[e]) for e in left)
    probability = {e: torch.exp(logits[e]) / total for e in left}
    chosen = sorted(left, key=lambda e: -float(logits[e]))[:k]
    share = sum(probability[e] for e in chosen) if renormalised else 1.0
    return {e: probability[e] / share for e in chosen}


def layer(router, experts, x, k, removed=(), renormalised=True):
    return sum(g * expert(*experts[e], x) for e, g in gates(router, x, k, removed, renormalised).items())


def damage(router, experts, tokens, k, removed, renormalised=True):
    """Root of the summed squares of what the layer's output changes."""
    total = 0.0
    for x in tokens:
        whole = layer(router, experts, x, k, (), renormalised)
        total += float(((whole - layer(router, experts, x, k, removed, renormalised)) ** 2).sum())
    return total**0.5


def statistics(router, experts, tokens, k, renormalised=True):
    """By expert: rows, sum of gates, mean norm of outputs (MAN), mean of share of gates times norm (REAP)."""
    n = len(router)
    rows, sums, norms, reap = [0] * n, [0.0] * n, [0.0] * n, [0.0] * n
    together = [[0] * n for _ in range(n)]
    for x in tokens:
        found = gates(router, x, k, (), renormalised)
        share = float(sum(found.values()))
        for e, g in found.items():
            size = float(expert(*experts[e], x).norm())
            rows[e] += 1
            sums[e] += float(g)
            norms[e] += size
            reap[e] += float(g) / share * size
            for other in found:
                together[e][other] += 1
    return {
        "rows": rows,
        "gates": sums,
        "man": [s / max(1, r) for s, r in zip(norms, rows, strict=True)],
        "reap": [s / max(1, r) for s, r in zip(reap, rows, strict=True)],
        "together": together,
    }
