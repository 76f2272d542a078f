"""HyperMoE: generated experts against none, and against free adapters of the same rank."""

from typing import Any

from bench.effects import figures as f
from bench.effects.corpora import LITTLE
from bench.effects.effect import Run
from bench.effects.expert_probes import own, selection
from bench.effects.loss_probes import gap
from bench.effects.study import Arm
from bench.effects.systems.system import LOSS, MARGIN, System, expect

RANK = 16
# top-1 with the probability as gate: what HyperMoE and MoDE are compared with
SWITCH = {"model.ffn.router.select.top_k": 1, "model.ffn.router.select.renormalize": False}


def switch() -> dict[str, Arm]:
    """8 experts of width 64, one for every token, by name."""
    return {"switch": Arm("moe.yaml", SWITCH, probes={"own": own})}


def hypermoe() -> System:
    """`hyper` has one generator for its three layers, `hyper-free` an adapter for each of its 8 experts."""
    bank: dict[str, Any] = {"kind": "ffn", "widths": {"kind": "equal", "n_experts": 8, "total": 512}}
    free = [bank, {"kind": "free_adapters", "n_experts": 8, "rank": RANK}]
    hyper = {"model.shared_banks.hyper.rank": RANK}
    adapters = {**SWITCH, "model.ffn.branches": free}
    arms = {
        "hyper": Arm("hypermoe.yaml", hyper),
        "hyper-free": Arm("moe.yaml", adapters),
        "hyper-little": Arm("hypermoe.yaml", hyper, text=LITTLE, probes={"gap": gap}),
        "hyper-free-little": Arm("moe.yaml", adapters, text=LITTLE, probes={"gap": gap}),
        "hyper-top-2": Arm(
            "hypermoe.yaml", {**hyper, "model.ffn.router.select.top_k": 2}, probes={"selection": selection}
        ),
        **switch(),
    }
    paper, ours = "2402.12656", "2402.12656, its control"
    little, chosen = "hyper-little hyper-free-little", "correlation of being alike and chosen together"
    return System(
        arms,
        (
            expect("Y1", "better than the plain mixture", paper, LOSS, "hyper switch", f.excess, high=0),
            expect("Y2", "better than free adapters", ours, LOSS, "hyper hyper-free", f.excess, high=0),
            expect("Y3", "no worse than free adapters", ours, LOSS, "hyper hyper-free", f.excess, high=MARGIN),
            expect("Y4", "little text: better than free", ours, LOSS, little, f.excess, high=0),
            expect("Y5", "little text is learned by heart", ours, "nats a token", "hyper-little", learnt, low=0.1),
            expect("Y6", "top-2: alike where chosen together", paper, chosen, "hyper-top-2", together, low=0),
        ),
    )


def learnt(run: Run) -> float:
    """Nats a token by which held-out text lies above text seen in training."""
    return run["gap"]


def together(run: Run) -> float:
    """Correlation of how alike embeddings of two experts are with how often a token chooses both."""
    return run["selection"]
