"""Multi-head mixtures: experts solved for equal FLOPs and parameters, against plain and fine-grained mixtures."""

from statistics import fmean
from typing import Any

import numpy as np

from bench.effects import figures as f
from bench.effects.effect import Run
from bench.effects.study import Arm
from bench.effects.systems.system import LOSS, System, expect, fixed


def multi_head() -> System:
    """2 or 4 heads, as many experts for each part, with the cost of top-2 of 8 experts of width 64; beside these, 4 of
    16 experts of half the width."""

    def arm(heads: int, **layer: bool) -> Arm:
        like = {"of_width": 64, "of_experts": 8, "of_top_k": 2, "width_multiple_of": 1}
        settings: dict[str, Any] = {
            "model.ffn.heads": heads,
            "model.ffn.ffn.router.select.top_k": heads,
            "model.ffn.ffn.branches.0.widths": {"kind": "multi_head", "heads": heads, "top_k": heads, **like},
        }
        return Arm("multi_head.yaml", settings | {f"model.ffn.{key}": value for key, value in layer.items()})

    fine = {
        "model.ffn.branches.0.widths": {"kind": "equal", "n_experts": 16, "total": 512},
        "model.ffn.router.select.top_k": 4,
    }
    arms = {
        "heads-2": arm(2),
        "heads-4": arm(4),
        "heads-2-no-head": arm(2, head=False),
        "heads-2-no-merge": arm(2, merge=False),
        "heads-fine": Arm("moe.yaml", fine),
        **fixed(2),
    }
    paper, more = "2411.16205", "heads-4 heads-2"
    ablated = "heads-2-no-head heads-2-no-merge"
    return System(
        arms,
        (
            expect("H1", "2 heads better than plain", paper, LOSS, "heads-2 top-2", f.excess, high=0),
            expect("H2", "better than fine-grained", paper, LOSS, "heads-2 heads-fine", f.excess, high=0),
            expect("H3", "fine-grained better than plain", paper, LOSS, "heads-fine top-2", f.excess, high=0),
            expect("H4", "4 heads better than 2", paper, LOSS, more, f.excess, high=0),
            expect("H5", "head matters more than merge", paper, LOSS, ablated, f.excess, low=0),
            expect("H6", "more heads: more experts", "2404.15045", "different experts a token", more, wider, low=0),
            expect("H7", "more heads: more in use", "2404.15045", "share of experts in use", more, busier, low=0),
        ),
    )


def wider(run: Run, other: Run) -> float:
    """Different experts a token in the first run, less those in the second."""
    return different(run) - different(other)


def different(run: Run) -> float:
    """Different experts a token met, mean over layers."""
    return fmean(layer["different"] for layer in run["history"][-1]["layers"])


def busier(run: Run, other: Run) -> float:
    """Share of experts in use in the first run, less that in the second."""
    return in_use(run) - in_use(other)


def in_use(run: Run) -> float:
    """Share of experts with at least half of the mean load, mean over layers."""
    loads = [np.asarray(layer["load"]) for layer in run["history"][-1]["layers"]]
    return fmean(float((load >= load.mean() / 2).mean()) for load in loads)
