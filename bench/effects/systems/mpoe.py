"""MPOE: experts with a shared central tensor against experts of their own and one dense layer, at equal compute."""

from dataclasses import replace
from typing import Any

from bench.effects import figures as f
from bench.effects.corpora import LITTLE
from bench.effects.effect import Run
from bench.effects.loss_probes import gap
from bench.effects.study import Arm
from bench.effects.systems.hypermoe import learnt
from bench.effects.systems.system import LOSS, SAME, System, dense_of, expect, fixed, parameters, token_cost


def mpoe() -> System:
    """Top-2 of 8 experts of width 64 in every mixture; a dense layer of width 128 has the same cost, but for building
    matrices from their cores. top-2-132: 8 experts of 16 or 17 units have exactly the parameters of mpoe."""

    def arm(*rules: dict[str, Any]) -> Arm:
        return Arm("mpoe.yaml", {"rules": list(rules)})

    def heart(*rules: dict[str, Any]) -> Arm:
        return replace(arm(*rules), text=LITTLE, probes={"gap": gap})

    arms = {
        "mpoe": arm(),
        "mpoe-frozen": arm({"kind": "central_mask", "probability": 1.0}),
        "mpoe-little": heart(),
        **{f"mpoe-little-{p}": heart({"kind": "central_mask", "probability": p}) for p in (0.5, 0.9)},
        "dense-128": dense_of(128),
        **fixed(2),
        **fixed(2, 132),
    }
    spec = "2203.01104, its setting"
    paper, both = "2203.01104", "mpoe dense-128 top-2"
    sized, costs = "ratio of parameters", "ratio of FLOPs a token"
    return System(
        arms,
        (
            expect("P1", "far fewer parameters than top-2", paper, sized, "mpoe top-2", parameters, high=0.7),
            expect("P2", "better than the dense layer", paper, LOSS, "mpoe dense-128", f.excess, high=0),
            expect("P3", "not better than experts of their own", paper, LOSS, "mpoe top-2", f.excess, low=0),
            expect("P4", "between both", paper, "where, 0 dense and 1 unshared", both, between, low=0, high=1),
            expect("P5", "frozen central tensors: worse", paper, LOSS, "mpoe-frozen mpoe", f.excess, low=0),
            expect("P6", "experts differ", paper, "cosine of experts' outputs", "mpoe", alikeness, high=0.9),
            expect("P7", "little text is learned by heart", spec, "nats a token", "mpoe-little", learnt, low=0.1),
            expect("P8", "there, half masked: better", paper, LOSS, "mpoe-little-0.5 mpoe-little", f.excess, high=0),
            expect("P9", "there, 0.9 masked: better", paper, LOSS, "mpoe-little-0.9 mpoe-little", f.excess, high=0),
            expect("P10", "top-2-132: as many parameters", paper, sized, "mpoe top-2-132", parameters, **SAME),
            expect("P11", "better than it", paper, LOSS, "mpoe top-2-132", f.excess, high=0),
            expect("P12", "dense-128: about as many", paper, sized, "mpoe dense-128", parameters, low=0.97, high=1.03),
            expect("P13", "and FLOPs a token", paper, costs, "mpoe dense-128", token_cost, low=0.9, high=1.1),
            expect("P14", "top-2: as many FLOPs a token", paper, costs, "mpoe top-2", token_cost, low=0.9, high=1.1),
        ),
    )


def between(run: Run, low: Run, high: Run) -> float:
    """How far a run has come from one loss to another."""
    loss, worst, best = (each["final"]["bpb"] for each in (run, low, high))
    return (worst - loss) / (worst - best)


def alikeness(run: Run) -> float:
    """Mean cosine of two experts' outputs for a token."""
    return run["alike"]
