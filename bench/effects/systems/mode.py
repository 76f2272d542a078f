"""MoDE: experts that are distilled into each other, a little and much."""

from typing import Any

from bench.effects import figures as f
from bench.effects.effect import Run
from bench.effects.expert_probes import own
from bench.effects.study import Arm
from bench.effects.systems.hypermoe import switch
from bench.effects.systems.system import LOSS, MARGIN, System, expect, fixed


def mode() -> System:
    """A token's expert and one more that is drawn, pulled together with weight 0.05 and 1, or, the control, both pulled
    to zero; and a token's own two experts, which costs nothing, pulled together or, the control, to zero."""

    def pulled(weight: float, **how: Any) -> list[dict[str, Any]]:
        pull = {"kind": "mutual_distillation", "weight": weight, "schedule": {"kind": "constant", "warmup": 0.2}}
        return [{"kind": "load_balance", "weight": 0.01}, pull | how]

    def arm(weight: float, **how: Any) -> Arm:
        return Arm("mutual_distillation.yaml", {"objectives": pulled(weight, **how)}, probes={"own": own})

    def between_two(**how: Any) -> Arm:
        return Arm("moe.yaml", {"model.ffn.record": {"kind": "active"}, "objectives": pulled(0.05, **how)})

    arms = {
        "mode-0.05": arm(0.05),
        "mode-1": arm(1.0),
        "mode-zero-0.05": arm(0.05, target="zero"),
        "mode-top-2": between_two(),
        "mode-zero-top-2": between_two(target="zero"),
        **fixed(2),
        **switch(),
    }
    paper, cosine, alone = "2402.00893", "cosine of experts' outputs", "nats on foreign tokens"
    control = "2402.00893, its control"
    little, much = "mode-0.05 switch", "mode-1 mode-0.05"
    return System(
        arms,
        (
            expect("E1", "a little: more alike", paper, cosine, little, more_alike, low=0),
            expect("E2", "much: still more alike", paper, cosine, much, more_alike, low=0),
            expect("E3", "a little: better", paper, LOSS, little, f.excess, high=0),
            expect("E4", "a little: no worse", paper, LOSS, little, f.excess, high=MARGIN),
            expect("E5", "much: worse than a little", paper, LOSS, much, f.excess, low=0),
            expect("E6", "better on foreign tokens", paper, alone, little, worse_on_foreign, high=0),
            expect(
                "E7", "better than a penalty on outputs", control, LOSS, "mode-0.05 mode-zero-0.05", f.excess, high=0
            ),
            expect("E8", "no extra expert: better", paper, LOSS, "mode-top-2 top-2", f.excess, high=0),
            expect("E9", "better on own tokens", paper, "nats on own tokens", little, worse_on_own, high=0),
            expect("E10", "gains more on foreign tokens", paper, "nats, foreign less own", little, narrower, high=0),
            expect("E11", "much: experts stand in", paper, "nats, foreign less own", "mode-1 switch", narrower, high=0),
            expect("E12", "and than its penalty", control, LOSS, "mode-top-2 mode-zero-top-2", f.excess, high=0),
        ),
    )


def more_alike(run: Run, other: Run) -> float:
    """Mean cosine of two experts' outputs in the first run, less that in the second."""
    return run["alike"] - other["alike"]


def worse_on_foreign(run: Run, other: Run) -> float:
    """Nats a token of experts that serve others' tokens alone in the first run, less those in the second."""
    return run["foreign"] - other["foreign"]


def worse_on_own(run: Run, other: Run) -> float:
    """Nats a token of experts that serve their own tokens alone in the first run, less those in the second."""
    return run["own"] - other["own"]


def narrower(run: Run, other: Run) -> float:
    """How much worse experts are on others' tokens than on their own in the first run, less that in the second."""
    return worse_on_foreign(run, other) - worse_on_own(run, other)
