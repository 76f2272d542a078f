"""Experts of a multi-head layer that cost and weigh what a plain mixture does."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parity:
    """Width and number of the experts; how far FLOPs a token and parameters lie from the plain mixture's after rounding
    (0.01 is 1 % more); and both sizes before rounding."""

    width: int
    n_experts: int
    flops_error: float
    parameter_error: float
    exact_width: float
    exact_experts: float


@dataclass(frozen=True)
class Mixture:
    """A plain mixture of `n_experts` experts of equal `width`, `top_k` for each token; `glu` experts have three
    matrices, others two."""

    d_model: int
    width: int
    n_experts: int
    top_k: int
    glu: bool = True

    @property
    def matrices(self) -> int:
        return 3 if self.glu else 2

    @property
    def token_flops(self) -> float:
        """Forward FLOPs of a token's experts."""
        return 2.0 * self.matrices * self.d_model * self.width * self.top_k

    @property
    def parameters(self) -> int:
        """Parameters of all experts."""
        return self.matrices * self.d_model * self.width * self.n_experts


def parity(of: Mixture, heads: int, top_k: int, width_multiple_of: int = 1, experts_multiple_of: int = 1) -> Parity:
    """The experts of a layer of `heads` heads, `top_k` experts for each part, with the FLOPs and the parameters of the
    mixture `of`; its two projections are paid for by its experts, routers are not counted (Huang 2024,
    arXiv:2411.16205, Eqs. 8 and 9, for any k and for gated experts):

    w = (k_s f - 2 d / m) / k and E' = h (m f E - 2 d) / (m w), m matrices an expert.

    The width is rounded to the nearest multiple, then the number of experts, for that width.

    Raises: ValueError where the projections alone cost, or weigh, as much as the mixture.
    """
    m, d = of.matrices, of.d_model
    for name, value in (("width_multiple_of", width_multiple_of), ("experts_multiple_of", experts_multiple_of)):
        if value < 1:
            raise ValueError(f"{name}={value}, allowed: at least 1")
    if heads < 1 or d % heads or top_k < 1:
        raise ValueError(f"heads={heads}, top_k={top_k}, allowed: a divisor of d_model={d}, at least 1")
    width = (of.top_k * of.width - 2 * d / m) / top_k
    if width <= 0 or m * of.width * of.n_experts <= 2 * d:
        raise ValueError(f"width={of.width}, top_k={of.top_k}: two projections of d_model={d} alone cost as much")
    rounded = max(1, round(width / width_multiple_of)) * width_multiple_of
    exact = heads * (m * of.width * of.n_experts - 2 * d) / m
    experts = max(1, round(exact / rounded / experts_multiple_of)) * experts_multiple_of
    flops = 4.0 * d * d + 2.0 * m * d * rounded * top_k
    parameters = 2 * d * d + m * d // heads * rounded * experts
    return Parity(rounded, experts, flops / of.token_flops - 1, parameters / of.parameters - 1, width, exact / width)


def multi_head(
    d_model: int,
    heads: int,
    top_k: int,
    of_width: int,
    of_experts: int,
    of_top_k: int = 1,
    glu: bool = True,
    width_multiple_of: int = 1,
    experts_multiple_of: int = 1,
) -> list[int]:
    """Widths for the bank inside a layer of `heads` heads, whose parts are `d_model` wide, `top_k` experts for each:
    those of `parity` with a plain mixture of `of_experts` experts, each `of_width` wide, `of_top_k` for a token.

    Raises: as `parity`, and ValueError for a mixture of nothing.
    """
    for name, value in (("of_width", of_width), ("of_experts", of_experts), ("of_top_k", of_top_k)):
        if value < 1:
            raise ValueError(f"{name}={value}, allowed: at least 1")
    of = Mixture(d_model * heads, of_width, of_experts, of_top_k, glu)
    found = parity(of, heads, top_k, width_multiple_of, experts_multiple_of)
    return [found.width] * found.n_experts
