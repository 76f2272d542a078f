"""XMoE: many narrow experts under a threshold against few wide ones of as many parameters."""

from bench.effects import figures as f
from bench.effects.effect import Run
from bench.effects.study import Arm
from bench.effects.systems.system import EACH, LOSS, MARGIN, System, expect

IDLE = "share of hidden units near zero"


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
            expect("X6", "narrow experts idle less", spec, IDLE, "xmoe-0.9 xmoe-top-1", idler, high=0),
        ),
    )


def idler(run: Run, other: Run) -> float:
    """Share of units near zero in the first run's chosen experts, less that in the second's."""
    return run["near_zero"] - other["near_zero"]
