"""MoEC: evenness inside clusters, siblings as substitutes, more experts."""

from typing import Any

from bench.effects import figures as f
from bench.effects.effect import Run
from bench.effects.study import Arm
from bench.effects.systems.system import LOSS, MARGIN, System, expect

# Tokens of a step.
TOKENS = 1024


def moec() -> System:
    """Top-1 of 16 or 64 experts of width 64 in clusters of 4, with cluster loss and dropout or without.

    Experts rest for 2 steps at a time: as in the paper, about a hundredth of training. The code's weight of the cluster
    loss grows with tokens over experts, and so does ours.
    """

    def arm(n_experts: int, clusters: bool) -> Arm:
        widths = {"kind": "equal", "n_experts": n_experts, "total": 64 * n_experts}
        bank = {"kind": "ffn", "widths": widths, "activation": "relu", "glu": False}
        layer = "model.layers.2"
        settings: dict[str, Any] = {f"{layer}.branches": [bank], f"{layer}.clusters": n_experts // 4}
        objectives: list[dict[str, Any]] = [{"kind": "load_balance", "weight": 0.01}]
        rules: list[dict[str, Any]] = []
        if clusters:
            objectives.append({"kind": "cluster_variance", "weight": 0.01 * TOKENS / n_experts})
            rules.append({"kind": "expert_dropout", "rate": 0.5, "interval": 2})
        return Arm("moec.yaml", settings | {"objectives": objectives, "rules": rules})

    arms = {f"moec-{n}": arm(n, True) for n in (16, 64)} | {f"moec-plain-{n}": arm(n, False) for n in (16, 64)}
    spec, chance = "2207.09094, released code", "share of second choices in the same cluster, less chance"
    alike = "cosine of experts' outputs, siblings less strangers"
    return System(
        arms,
        (
            expect("M1", "no worse than plain", spec, LOSS, "moec-64 moec-plain-64", f.excess, high=MARGIN),
            expect(
                "M2",
                "64 for 16 experts: gains more than plain",
                spec,
                "difference of relative differences",
                "moec-64 moec-16 moec-plain-64 moec-plain-16",
                gains_more,
                high=0,
            ),
            expect("M3", "evener inside clusters", spec, "variance of P", "moec-64 moec-plain-64", evener, high=0),
            expect("M4", "siblings stand in", spec, chance, "moec-64", stand_in, low=0),
            expect("M5", "siblings are alike", spec, alike, "moec-64", alikeness, low=0),
            expect(
                "M6", "smaller gap to held-out text", spec, "nats a token", "moec-64 moec-plain-64", tighter, high=0
            ),
        ),
    )


def gains_more(more: Run, few: Run, plain_more: Run, plain_few: Run) -> float:
    """What more experts do to the loss with clusters, less what they do without."""
    return f.excess(more, few) - f.excess(plain_more, plain_few)


def evener(run: Run, other: Run) -> float:
    """Scale-free variance of probability inside clusters: the first run's less the second's."""
    return run["relatives"]["variance"] - other["relatives"]["variance"]


def stand_in(run: Run) -> float:
    """How much more often than by chance a token's second choice is a sibling of its first."""
    return run["relatives"]["second_choice"] - run["relatives"]["chance"]


def alikeness(run: Run) -> float:
    """How much more alike siblings' outputs are than strangers'."""
    return run["relatives"]["siblings"] - run["relatives"]["strangers"]


def tighter(run: Run, other: Run) -> float:
    """The first run's gap between held-out text and text seen in training, less the second's."""
    return run["gap"] - other["gap"]
