"""Omni-SMoLA: a frozen model adapted to a second text, against LoRA and against training all of it."""

from typing import Any

from bench.effects.effect import Run
from bench.effects.figures import excess
from bench.effects.study import Arm
from bench.effects.systems.system import MARGIN, System, expect

NEW, OLD = "relative difference of bits per byte on the new text", "relative rise of bits per byte on the old text"


def smola() -> System:
    """All start from the run of `dense` with their seed. LoRA of rank 16 and 4 experts of rank 4 have the same numbers
    but for the router's."""

    def adapted(n_experts: int, rank: int) -> Arm:
        mixtures = {"kind": "low_rank", "n_experts": n_experts, "rank": rank, "times_experts": True}
        return Arm("smola.yaml", {"adapt.mixtures": mixtures, **DENSE}, start="dense", text="tech-docs")

    arms = {
        "smola-4x4": adapted(4, 4),
        "lora-16": adapted(1, 16),
        "lora-4": adapted(1, 4),
        "all-weights": Arm("dense.yaml", {**DENSE, "optim.lr": 0.003}, start="dense", text="tech-docs"),
        **dense(),
    }
    paper, forgets, lora = "2312.00968", "smola-4x4 all-weights", "smola-4x4 lora-16"
    return System(
        arms,
        (
            expect("A1", "as good as LoRA of equal size", paper, NEW, lora, excess, high=MARGIN),
            expect("A2", "better than LoRA of equal size", paper, NEW, lora, excess, high=0),
            expect("A3", "better than LoRA of one rank", paper, NEW, "smola-4x4 lora-4", excess, high=0),
            expect("A4", "forgets less than all weights", paper, f"{OLD}, less", forgets, forgets_more, high=0),
            expect("A5", "forgets no more than LoRA", paper, f"{OLD}, less", lora, forgets_more, high=MARGIN),
            expect("A6", "the old text suffers", paper, OLD, "smola-4x4", forgotten, low=0),
        ),
    )


DENSE: dict[str, Any] = {"model.ffn": {"kind": "dense", "width": 512}}


def dense() -> dict[str, Arm]:
    """A dense decoder of width 512, by name."""
    return {"dense": Arm("dense.yaml", DENSE)}


def forgotten(run: Run) -> float:
    """How much bits per byte on the old text rose by training on the new one, as a share."""
    return run["old_text"]["after"] / run["old_text"]["before"] - 1


def forgets_more(run: Run, other: Run) -> float:
    """The same of the first run, less that of the second."""
    return forgotten(run) - forgotten(other)
