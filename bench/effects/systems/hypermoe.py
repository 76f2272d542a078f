"""HyperMoE: generated experts against none, and against free adapters of the same rank."""

from typing import Any

from bench.effects import figures as f
from bench.effects.study import Arm
from bench.effects.systems.system import LOSS, MARGIN, System, expect

RANK = 16
# top-1 with the probability as gate: what HyperMoE and MoDE are compared with
SWITCH = {"model.ffn.router.select.top_k": 1, "model.ffn.router.select.renormalize": False}


def switch() -> dict[str, Arm]:
    """8 experts of width 64, one for every token, by name."""
    return {"switch": Arm("moe.yaml", SWITCH)}


def hypermoe() -> System:
    """`hyper` has one generator for its three layers, `hyper-free` an adapter for each of its 8 experts."""
    bank: dict[str, Any] = {"kind": "ffn", "widths": {"kind": "equal", "n_experts": 8, "total": 512}}
    free = [bank, {"kind": "free_adapters", "n_experts": 8, "rank": RANK}]
    arms = {
        "hyper": Arm("hypermoe.yaml", {"model.shared_banks.hyper.rank": RANK}),
        "hyper-free": Arm("moe.yaml", {**SWITCH, "model.ffn.branches": free}),
        **switch(),
    }
    paper, ours = "2402.12656", "2402.12656, its control"
    return System(
        arms,
        (
            expect("Y1", "better than the plain mixture", paper, LOSS, "hyper switch", f.excess, high=0),
            expect("Y2", "better than free adapters", ours, LOSS, "hyper hyper-free", f.excess, high=0),
            expect("Y3", "no worse than free adapters", ours, LOSS, "hyper hyper-free", f.excess, high=MARGIN),
        ),
    )
