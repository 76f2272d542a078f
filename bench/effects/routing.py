"""The directions that papers on routing report, on real text at equal useful FLOPs: one function a system.

    python -m bench.effects.routing [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

XMoE: many narrow experts under a threshold against few wide ones of as many parameters; how the number chosen falls,
and what a lower threshold does. MoEC: evenness inside clusters, siblings as substitutes, more experts.
DynMoE: fewer experts a token in time, what each of its parts does, against fixed k. Dynamic routing: what threshold and
entropy loss do, who gets more experts, against top-2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.effects import figures as f
from bench.effects.cluster_probes import relatives
from bench.effects.command import main
from bench.effects.effect import Effect, Figure, Run
from bench.effects.pool_probes import pool
from bench.effects.routing_probes import difficulty, routing_history
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


def dynmoe() -> System:
    """Up to 8 experts of width 64, 4 at the start, against fixed k of 8, and without one part or another."""
    widths = {"kind": "equal", "n_experts": 8, "total": 512}
    process = {"kind": "adaptive_experts", "every": 40, "window": 20, "new_experts": "mean"}
    names = ("router_diversity", "router_simplicity", "gate_balance", "gate_efficiency")

    def arm(without: str = "", adapts: bool = True) -> Arm:
        objectives = [{"kind": name, "weight": 0.03} for name in names if name != without]
        rules = [process] if adapts else []
        return Arm("dynmoe.yaml", {"model.ffn.branches.0.widths": widths, "objectives": objectives, "rules": rules})

    arms = {"dynmoe": arm(), "dynmoe-wasteful": arm("gate_efficiency"), "dynmoe-alike": arm("router_diversity")}
    arms["dynmoe-static"] = arm(adapts=False)
    fixed = [f"dynmoe-top-{k}" for k in (1, 2, 4)]
    for name, k in zip(fixed, (1, 2, 4), strict=True):
        arms[name] = Arm("moe.yaml", {"model.ffn.branches.0.widths": widths, "model.ffn.router.select.top_k": k})
    paper, best, both = "2405.14297", " ".join(["dynmoe", *fixed]), "dynmoe dynmoe-static"
    rows, none = "mean absolute cosine of router rows", "share of tokens without expert"
    return System(
        arms,
        (
            expect("D1", "fewer experts in time", paper, f"{EACH}, end less quarter", "dynmoe", f.growth, high=0),
            expect("D2", "efficiency: fewer", paper, EACH, "dynmoe dynmoe-wasteful", f.fewer, high=0),
            expect("D3", "adding: fewer unserved", paper, none, both, less("unserved"), high=0),
            expect("D4", "layers differ in experts", paper, "most less fewest", "dynmoe", pool_range, low=1),
            expect("D5", "matches the best fixed k", paper, LOSS, best, over_best, high=MARGIN),
            expect("D6", "diversity: less alike", paper, rows, "dynmoe dynmoe-alike", less("cosine"), high=0),
        ),
    )


def dynamic_routing() -> System:
    """16 experts of width 64 under thresholds and weights of the entropy, against top-2."""
    widths = {"kind": "equal", "n_experts": 16, "total": 1024}

    def arm(threshold: float = 0.4, beta: float = 1e-4) -> Arm:
        objectives = [{"kind": "load_balance", "weight": 0.01}]
        if beta:
            objectives.append({"kind": "router_entropy", "weight": beta})
        settings = {"model.ffn.branches.0.widths": widths, "objectives": objectives}
        return Arm("dynamic_routing.yaml", {**settings, "model.ffn.router.select.threshold": threshold})

    arms = {f"top-p-{p}": arm(p) for p in (0.2, 0.4, 0.6)}
    arms |= {"top-p-beta-0": arm(beta=0), "top-p-beta-0.01": arm(beta=0.01)}
    arms["top-p-top-2"] = Arm("moe.yaml", {"model.ffn.branches.0.widths": widths})
    paper, hard = "2403.07652", "correlation of loss and active width"
    return System(
        arms,
        (
            expect("T1", "7 of 16 at the start", paper, EACH, "top-p-0.4", at_start, low=6, high=8),
            expect("T2", "fewer in time", paper, f"{EACH}, end less start", "top-p-0.4", since_start, high=0),
            expect("T3", "entropy loss: fewer", paper, EACH, "top-p-0.4 top-p-beta-0", f.fewer, high=0),
            expect("T4", "heavier: fewer still", paper, EACH, "top-p-beta-0.01 top-p-0.4", f.fewer, high=0),
            expect("T5", "lower threshold: fewer", paper, EACH, "top-p-0.2 top-p-0.4", f.fewer, high=0),
            expect("T6", "higher threshold: more", paper, EACH, "top-p-0.6 top-p-0.4", f.fewer, low=0),
            expect("T7", "harder tokens: more", paper, hard, "top-p-0.4", f.difficulty_of("predicting"), low=0),
            expect("T8", "early layers: more", paper, f"{EACH}, first less last", "top-p-0.4", earlier, low=0),
            expect("T9", "no worse than top-2", paper, LOSS, "top-p-0.4 top-p-top-2", f.excess, high=MARGIN),
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


def less(what: str) -> Figure:
    """The mean over layers of what the probe `pool` says of the first run, less that of the second."""

    def difference(run: Run, other: Run) -> float:
        return fmean(layer[what] for layer in run["pool"]) - fmean(layer[what] for layer in other["pool"])

    return difference


def pool_range(run: Run) -> float:
    """Experts of the layer that has most, less those of the layer that has fewest."""
    sizes = [layer["available"] for layer in run["pool"]]
    return max(sizes) - min(sizes)


def over_best(run: Run, *others: Run) -> float:
    """How far the first run's bits per byte lie above the best of the others', as a share of these."""
    return max(f.excess(run, other) for other in others)


def at_start(run: Run) -> float:
    """Experts a token in the untrained model."""
    return f.experts(run, 0)


def since_start(run: Run) -> float:
    """Experts a token at the end, less those of the untrained model."""
    return f.experts(run) - f.experts(run, 0)


def earlier(run: Run) -> float:
    """Experts a token in the first layer, less those in the last."""
    layers = run["history"][-1]["layers"]
    return layers[0]["experts"] - layers[-1]["experts"]


SYSTEMS = (xmoe(), moec(), dynmoe(), dynamic_routing())
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
    probes={"history": routing_history, "relatives": relatives, "difficulty": difficulty, "pool": pool},
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
