"""The directions that papers on routing report, on real text at equal useful FLOPs: one function a system.

    python -m bench.effects.routing [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

XMoE: many narrow experts under a threshold against few wide ones of as many parameters; how the number chosen falls,
and what a lower threshold does. MoEC: evenness inside clusters, siblings as substitutes, more experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.effects import figures as f
from bench.effects.cluster_probes import relatives
from bench.effects.command import main
from bench.effects.effect import Effect, Figure, Run
from bench.effects.routing_probes import routing_history
from bench.effects.study import Arm, Study

MARGIN = 0.01
LOSS, EACH = "relative difference of bits per byte", "experts a token"


@dataclass(frozen=True)
class System:
    """The arms and effects of one system; arms' names begin with the system's."""

    arms: Mapping[str, Arm]
    effects: tuple[Effect, ...]


def expect(number: str, claim: str, source: str, quantity: str, arms: str, value: Figure, **bounds: float) -> Effect:
    """An effect; `arms` are separated by blanks."""
    return Effect(number, claim, f"arXiv:{source}", quantity, tuple(arms.split()), value, **bounds)


def xmoe() -> System:
    """1024 units as 32 experts of 32 under a threshold, in training at most 8 a token, or 8 of 128, 2 or 1 a token."""
    units = {"activation": "gelu", "glu": False}

    def fine(threshold: float) -> Arm:
        bank = {"kind": "ffn", "widths": {"kind": "equal", "n_experts": 32, "total": 1024}, **units}
        return Arm("xmoe.yaml", {"model.ffn.branches": [bank], "model.ffn.router.select.select.threshold": threshold})

    def coarse(top_k: int) -> Arm:
        bank = {"kind": "ffn", "widths": {"kind": "equal", "n_experts": 8, "total": 1024}, **units}
        select = {"kind": "top_k", "top_k": top_k, "renormalize": False}
        settings = {"model.ffn.branches": [bank], "model.ffn.router.select": select}
        return Arm("moe.yaml", {**settings, "objectives": [{"kind": "first_choice_balance", "weight": 0.01}]})

    arms = {f"xmoe-{t}": fine(t) for t in (0.9, 0.6, 0.3)} | {f"xmoe-top-{k}": coarse(k) for k in (1, 2)}
    spec = "2403.18926, released code"
    return System(
        arms,
        (
            expect("X1", "fine experts no worse than top-1", spec, LOSS, "xmoe-0.9 xmoe-top-1", f.excess, high=MARGIN),
            expect("X2", "fine experts no worse than top-2", spec, LOSS, "xmoe-0.9 xmoe-top-2", f.excess, high=MARGIN),
            expect("X3", "fewer wanted in time", spec, f"{EACH}, end less quarter", "xmoe-0.9", f.growth, high=0),
            expect("X4", "lower threshold: fewer", spec, EACH, "xmoe-0.6 xmoe-0.9", f.fewer, high=0),
            expect("X5", "still lower: still fewer", spec, EACH, "xmoe-0.3 xmoe-0.6", f.fewer, high=0),
        ),
    )


def moec() -> System:
    """Top-1 of 16 or 64 experts of width 64 in clusters of 4, with cluster loss and dropout, or without both."""

    def arm(n_experts: int, clusters: bool) -> Arm:
        widths = {"kind": "equal", "n_experts": n_experts, "total": 64 * n_experts}
        bank = {"kind": "ffn", "widths": widths, "activation": "relu", "glu": False}
        layer = "model.layers.2"
        settings: dict[str, Any] = {f"{layer}.branches": [bank], f"{layer}.clusters": n_experts // 4}
        if not clusters:
            settings |= {"objectives": [{"kind": "load_balance", "weight": 0.01}], "rules": []}
        return Arm("moec.yaml", settings)

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


SYSTEMS = (xmoe(), moec())
EFFECTS = tuple(effect for system in SYSTEMS for effect in system.effects)
STUDY = Study(
    name="routing",
    budget=4e11,
    common={
        "data.tokenizer": {"kind": "bpe", "vocab_size": 512},
        "model.d_model": 64,
        "model.n_layers": 3,
        "train.batch_size": 8,
        "optim.lr": 0.01,
    },
    arms={name: arm for system in SYSTEMS for name, arm in system.arms.items()},
    probes={"history": routing_history, "relatives": relatives},
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
