"""What a generalization bound asks of a router: the selections that it can make."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class SelectionFamily:
    """The maps x -> S(x), tokens to sets of experts, that a router's parameters can express.

    `n_experts` can be chosen at all, of a pool of `pool`; a token gets at most `most` of them, or exactly so many where
    it is `fixed` (None: no limit). `dimension` bounds the Natarajan dimension of the family. `heuristic` says what of
    this no theorem covers; `applicable` is False where a token's selection depends on other tokens, so that the bound
    says nothing.
    """

    n_experts: int
    pool: int
    most: int | None
    fixed: bool
    dimension: int
    heuristic: tuple[str, ...] = ()
    applicable: bool = True


def size_of(router: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in router.parameters())
