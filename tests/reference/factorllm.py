"""FactorLLM (arXiv:2408.11855) and upcycling, token by token and expert by expert. Weights are plain tensors; a network
is {"up" [w d], "down" [w d]} and, where there are any, "gate" [w d], "up_bias" [w], "gate_bias" [w], "out_bias" [d]."""

import itertools
import math

import torch

ACTIVATIONS = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "relu": lambda z: torch.where(z > 0, z, torch.zeros_like(z)),
}


def unit(network, activation, u, x):
    """What hidden unit u adds: down_u h_u(x)."""
    up = (network["up"][u] * x).sum()
    if "up_bias" in network:
        up = up + network["up_bias"][u]
    if "gate" not in network:
        return network["down"][u] * ACTIVATIONS[activation](up)
    gate = (network["gate"][u] * x).sum()
    if "gate_bias" in network:
        gate = gate + network["gate_bias"][u]
    return network["down"][u] * ACTIVATIONS[activation](gate) * up


def expert(network, activation, units, x):
    """E_i(x): the sum over the units of its group."""
    y = torch.zeros_like(x)
    for u in units:
        y = y + unit(network, activation, u, x)
    return y


def dense(network, activation, x):
    """T(x), with the output bias once."""
    y = expert(network, activation, range(len(network["up"])), x)
    return y + network["out_bias"] if "out_bias" in network else y


def probabilities(weight, bias, x):
    """softmax(r(x))."""
    logits = [(row * x).sum() + b for row, b in zip(weight, bias, strict=True)]
    top = max(float(z.detach()) for z in logits)
    powers = [torch.exp(z - top) for z in logits]
    return [p / sum(powers) for p in powers]


def chosen(p, k):
    """The k greatest, the lower index first where they tie."""
    return sorted(range(len(p)), key=lambda i: (-float(p[i].detach()), i))[:k]


def gates(p, picked, kind, scale):
    """Weights of the chosen experts."""
    if kind == "hard":
        return [torch.tensor(scale, dtype=p[0].dtype) for _ in picked]
    if kind == "straight_through":
        return [scale * (1 + p[i] - p[i].detach()) for i in picked]
    if kind == "share":
        total = sum(p[i] for i in picked)
        return [scale * len(picked) * p[i] / total for i in picked]
    return [scale * len(p) * p[i] for i in picked]


def layer(network, activation, groups, router, x, k, kind, scale, shared=()):
    """The converted layer on one token, dense and masked: every expert is computed, those not chosen times 0."""
    p = probabilities(router["weight"], router["bias"], x)
    picked = chosen(p, k)
    weight = dict(zip(picked, gates(p, picked, kind, scale), strict=True))
    y = torch.zeros_like(x)
    for i, units in enumerate(groups):
        y = y + weight.get(i, 0.0) * expert(network, activation, units, x)
    y = y + expert(network, activation, shared, x)
    return y + network["out_bias"] if "out_bias" in network else y


def subset_error(outputs, target, members, scale):
    """|scale sum_{i in S} E_i - T|^2."""
    total = sum(outputs[i] for i in members)
    return float(((scale * total - target) ** 2).sum())


def label(outputs, target, k, kind, scale):
    """The set of experts that a token should choose."""
    n = len(outputs)
    if kind == "subset":
        sets = list(itertools.combinations(range(n), k))
        return set(min(sets, key=lambda s: (subset_error(outputs, target, s, scale), s)))
    if kind == "projection":
        score = [float((e * target).sum()) for e in outputs]
    else:
        # the released code: mean over channels of (E_i - T k / n)^2
        score = [-float(((e - target * k / n) ** 2).mean()) for e in outputs]
    return set(sorted(range(n), key=lambda i: (-score[i], i))[:k])


def prior_loss(p, members):
    """KL(label || p), the label equal shares of 1."""
    share = 1 / len(members)
    return sum(share * (math.log(share) - torch.log(p[i])) for i in members)


def literal_prior_loss(p, members):
    """KL(p || softmax(label)), the label ones and zeros, as in the released code."""
    powers = [math.exp(1.0 if i in members else 0.0) for i in range(len(p))]
    return sum(q * (torch.log(q) - math.log(power / sum(powers))) for q, power in zip(p, powers, strict=True))


def least_squares_scale(targets, sums):
    """<T, Y> / <Y, Y> over all tokens."""
    along = sum(float((t * y).sum().detach()) for t, y in zip(targets, sums, strict=True))
    return along / sum(float((y * y).sum().detach()) for y in sums)


def virtual_groups(network, activation, n_copies, granularity, rows, x, top_k):
    """Fine-grained upcycling: each copy's `granularity` parts have the copy's router row; gates of the chosen copies
    sum to 1, and all parts of a copy share its gate."""
    p = probabilities(rows, [torch.zeros((), dtype=x.dtype)] * n_copies, x)
    picked = chosen(p, top_k)
    total = sum(p[i] for i in picked)
    width = len(network["up"]) // granularity
    y = torch.zeros_like(x)
    for i in picked:
        for part in range(granularity):
            y = y + p[i] / total * expert(network, activation, range(part * width, (part + 1) * width), x)
    return y
