"""What the study of routing asks of one system."""

from collections.abc import Mapping
from dataclasses import dataclass

from bench.effects.effect import Effect, Figure
from bench.effects.study import Arm

# A loss is called no worse where it is less than this much above, as a share of the other.
MARGIN = 0.01
LOSS, EACH = "relative difference of bits per byte", "experts a token"


@dataclass(frozen=True)
class System:
    """The arms and effects of one system. An arm's name begins with the system's, or says what several systems are
    compared with."""

    arms: Mapping[str, Arm]
    effects: tuple[Effect, ...]


def expect(number: str, claim: str, source: str, quantity: str, arms: str, value: Figure, **bounds: float) -> Effect:
    """An effect; `arms` are separated by blanks."""
    return Effect(number, claim, f"arXiv:{source}", quantity, tuple(arms.split()), value, **bounds)


def fixed(top_k: int) -> dict[str, Arm]:
    """What several systems are compared with: 8 experts of width 64, so many for every token, by name."""
    return {f"top-{top_k}": Arm("moe.yaml", {"model.ffn.router.select.top_k": top_k})}
