"""What the study of routing asks of one system."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.effects.effect import Effect, Figure, Run
from bench.effects.study import Arm

# A loss is called no worse where it is less than this much above, as a share of the other.
MARGIN = 0.01
# As many as can be: parameters and FLOPs come in steps of one hidden unit.
SAME = {"low": 0.999, "high": 1.001}
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


def fixed(top_k: int, units: int | None = None) -> dict[str, Arm]:
    """What several systems are compared with: 8 experts of width 64, or of so many units together, so many for every
    token, by name."""
    chosen: dict[str, Any] = {"model.ffn.router.select.top_k": top_k}
    if units is None:
        return {f"top-{top_k}": Arm("moe.yaml", chosen)}
    bank = {"kind": "ffn", "widths": {"kind": "equal", "n_experts": 8, "total": units}}
    return {f"top-{top_k}-{units}": Arm("moe.yaml", {**chosen, "model.ffn.branches": [bank]})}


def dense_of(width: int) -> Arm:
    """A dense decoder of this width."""
    return Arm("dense.yaml", {"model.ffn": {"kind": "dense", "width": width}})


def parameters(run: Run, other: Run) -> float:
    """Parameters of the first model, as a share of the second's."""
    return run["params_total"] / other["params_total"]


def token_cost(run: Run, other: Run) -> float:
    """Training FLOPs a token of the first model, as a share of the second's."""
    return run["flops"] / run["tokens"] / (other["flops"] / other["tokens"])
