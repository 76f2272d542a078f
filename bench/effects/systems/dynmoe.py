"""DynMoE: fewer experts a token in time, what each of its parts does, against fixed k."""

from statistics import fmean

from bench.effects import figures as f
from bench.effects.effect import Figure, Run
from bench.effects.study import Arm
from bench.effects.systems.system import EACH, LOSS, MARGIN, System, expect, fixed


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
    arms |= fixed(1) | fixed(2) | fixed(4)
    paper, best, both = "2405.14297", "dynmoe top-1 top-2 top-4", "dynmoe dynmoe-static"
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
