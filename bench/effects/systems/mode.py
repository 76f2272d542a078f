"""MoDE: experts that are distilled into each other, a little and much."""

from bench.effects import figures as f
from bench.effects.effect import Run
from bench.effects.study import Arm
from bench.effects.systems.hypermoe import switch
from bench.effects.systems.system import LOSS, MARGIN, System, expect


def mode() -> System:
    """A token's expert and one more that is drawn, pulled together with weight 0.05 and 1."""

    def arm(weight: float) -> Arm:
        pull = {"kind": "mutual_distillation", "weight": weight, "schedule": {"kind": "constant", "warmup": 0.2}}
        return Arm("mutual_distillation.yaml", {"objectives": [{"kind": "load_balance", "weight": 0.01}, pull]})

    arms = {"mode-0.05": arm(0.05), "mode-1": arm(1.0), **switch()}
    paper, cosine, alone = "2402.00893", "cosine of experts' outputs", "nats on foreign tokens"
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
        ),
    )


def more_alike(run: Run, other: Run) -> float:
    """Mean cosine of two experts' outputs in the first run, less that in the second."""
    return run["alike"] - other["alike"]


def worse_on_foreign(run: Run, other: Run) -> float:
    """Nats a token of experts that serve others' tokens alone in the first run, less those in the second."""
    return run["foreign"] - other["foreign"]
