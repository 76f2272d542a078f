"""Mutual distillation (MoDE, arXiv:2402.00893): losses over experts' outputs, one token, expert and pair at a time."""

import torch

Tensor = torch.Tensor


def plus(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


def squared(a: Tensor, b: Tensor, features: str) -> Tensor:
    """|a - b|^2, summed or averaged over features."""
    each = [(x - y) ** 2 for x, y in zip(a, b, strict=True)]
    return plus(each) / (len(each) if features == "mean" else 1)


def one_less_cosine(a: Tensor, b: Tensor) -> Tensor:
    return 1 - torch.dot(a, b) / (torch.sqrt(torch.dot(a, a)) * torch.sqrt(torch.dot(b, b)))


def kl(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """tau^2 KL(softmax(a / tau) || softmax(b / tau))."""
    p, q = torch.exp(a / tau) / torch.exp(a / tau).sum(), torch.exp(b / tau) / torch.exp(b / tau).sum()
    return tau**2 * plus([x * torch.log(x / y) for x, y in zip(p, q, strict=True)])


def distance(a: Tensor, b: Tensor, kind: str, features: str, tau: float) -> Tensor:
    if kind == "mse":
        return squared(a, b, features)
    return one_less_cosine(a, b) if kind == "cosine" else kl(a, b, tau)


def of_a_token(experts: list[Tensor], kind: str, target: str, features: str = "mean", tau: float = 2.0) -> Tensor:
    """Mean over experts of the distance to their mean, or to zero, or over ordered pairs of different experts."""
    if target == "zero":
        return plus([distance(torch.zeros_like(e), e, kind, features, tau) for e in experts]) / len(experts)
    if target == "mean":
        mean = plus(experts) / len(experts)
        return plus([distance(mean, e, kind, features, tau) for e in experts]) / len(experts)
    pairs = [(i, j) for i in range(len(experts)) for j in range(len(experts)) if i != j]
    return plus([distance(experts[i], experts[j], kind, features, tau) for i, j in pairs]) / len(pairs)


def scale(tokens: list[list[Tensor]], features: str) -> Tensor:
    """Mean over tokens of |mean of the experts|^2, without gradient."""
    return plus([squared(plus(t) / len(t), torch.zeros_like(t[0]), features) for t in tokens]).detach() / len(tokens)


def loss(
    tokens: list[list[Tensor]], kind: str, target: str, features: str = "mean", normalize: bool = False, tau: float = 2
) -> Tensor:
    """Mean over the tokens that have two experts or more."""
    tokens = [experts for experts in tokens if len(experts) >= 2]
    total = plus([of_a_token(experts, kind, target, features, tau) for experts in tokens]) / len(tokens)
    return total / scale(tokens, features) if normalize and kind == "mse" else total


def forced(x: Tensor, experts: list, router: Tensor, expert: int) -> Tensor:
    """Top-1 with raw probabilities, in which one expert serves every token with the weight the token gave its own."""
    out = []
    for token in x:
        p = torch.exp(router @ token) / torch.exp(router @ token).sum()
        out.append(max(p) * experts[expert](token))
    return torch.stack(out)
