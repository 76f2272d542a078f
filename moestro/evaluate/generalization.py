"""The generalization bound of sparse mixtures (Zhao 2024, arXiv:2403.17404), term by term.

|empirical - expected risk| = O(4 C R_m(H) + 2 sqrt((2 d_N ln N + d_N ln(2m) + ln(4/delta)) / (2m))) with probability
1 - delta: C the Lipschitz constant of a loss in [0, 1], R_m(H) the Rademacher complexity of one expert's class, d_N the
Natarajan dimension of the router's selections, N the number of sets that a selection chooses among.
"""

import math
from collections.abc import Sequence
from typing import Literal

from moestro.routers.family import SelectionFamily

Count = Literal["paper", "exact"]


def log_choices(n_experts: int, most: int | None, fixed: bool = True, count: Count = "paper") -> float:
    """ln N, the sets of experts that one selection chooses among.

    `paper`: k (1 + ln(T/k)), which bounds both exactly k and at most k of T. `exact`: ln C(T, k), or ln of the sum of
    C(T, i) up to k where k is not `fixed`. Without a limit (most=None) both are T ln 2.

    Raises: ValueError for an impossible k.
    """
    if n_experts < 1 or (most is not None and not 1 <= most <= n_experts):
        raise ValueError(f"k={most}, allowed: 1 to {n_experts}, the number of experts")
    if most is None:
        return n_experts * math.log(2)
    if count == "paper":
        return most * (1 + math.log(n_experts / most))
    if fixed:
        return math.lgamma(n_experts + 1) - math.lgamma(most + 1) - math.lgamma(n_experts - most + 1)
    return math.log(sum(math.comb(n_experts, i) for i in range(most + 1)))


def sparse_factor(n_experts: int, k: float | None, m: int) -> float:
    """sqrt(k (1 + ln(T/k)) / m): how the bound depends on k at a fixed number of experts; without a limit (k=None)
    sqrt(T ln 2 / m).

    Raises: ValueError for impossible values.
    """
    _check_units(m)
    if k is None:
        return math.sqrt(n_experts * math.log(2) / m)
    if not 0 < k <= n_experts:
        raise ValueError(f"k={k}, allowed: above 0, up to {n_experts}, the number of experts")
    return math.sqrt(k * (1 + math.log(n_experts / k)) / m)


def router_term(families: Sequence[SelectionFamily], m: int, delta: float = 0.05, count: Count = "paper") -> float:
    """2 sqrt((sum over routers of (2 d_N ln N + d_N ln(2m)) + ln(4/delta)) / (2m)).

    For one router the theorem's term; for several the product of their selections, which is a heuristic: later routers
    see what earlier layers made.

    Raises: ValueError for impossible values, or a router whose selections depend on other tokens.
    """
    _check_units(m)
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta}, allowed: between 0 and 1")
    if not all(family.applicable for family in families):
        raise ValueError("the bound says nothing of selections that depend on other tokens")
    inside = math.log(4 / delta)
    for family in families:
        patterns = log_choices(family.n_experts, family.most, family.fixed, count)
        inside += family.dimension * (2 * patterns + math.log(2 * m))
    return 2 * math.sqrt(inside / (2 * m))


def expert_term(rademacher: float, lipschitz: float = 1.0) -> float:
    """4 C R_m(H)."""
    return 4 * lipschitz * rademacher


def rademacher(norms: Sequence[float], input_norm: float, m: int) -> float:
    """Bound on R_m of networks whose matrices have these norms, on inputs of at most `input_norm`:
    B (sqrt(2 ln 2 L) + 1) prod_l M_l / sqrt(m), M_l Frobenius norms (Golowich 2018, arXiv:1712.06541, Theorem 1).

    Raises: ValueError without norms, or for m below 1.
    """
    _check_units(m)
    if not norms:
        raise ValueError("norms=[], allowed: that of at least one matrix")
    depth = math.sqrt(2 * math.log(2) * len(norms)) + 1
    return input_norm * depth * math.prod(norms) / math.sqrt(m)


def _check_units(m: int) -> None:
    if m < 1:
        raise ValueError(f"m={m}, allowed: at least 1 unit of training text")
