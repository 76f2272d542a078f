"""Omni-SMoLA: a frozen model adapted to a second text, against LoRA and against training all of it."""

from dataclasses import replace
from typing import Any

from bench.effects.adapter_probes import gates
from bench.effects.corpora import MIXED
from bench.effects.effect import Run
from bench.effects.figures import excess
from bench.effects.study import Arm
from bench.effects.systems.system import MARGIN, System, expect

NEW, OLD = "relative difference of bits per byte on the new text", "relative rise of bits per byte on the old text"
BOTH = "relative difference of bits per byte on both kinds"


def smola() -> System:
    """All start from the run of `dense` with their seed. LoRA of rank 16 and 4 experts of rank 4 have the same numbers
    but for the router's; with these, 4 experts have 114,432, between LoRA of rank 17 (113,472, of which 2,496 are a
    router of one expert, which does nothing) and of rank 18 (120,000)."""

    def adapted(n_experts: int, rank: int, text: str = "tech-docs", **more: Any) -> Arm:
        mixtures = {"kind": "low_rank", "n_experts": n_experts, "rank": rank, "times_experts": True, **more}
        return Arm("smola.yaml", {"adapt.mixtures": mixtures, **DENSE}, start="dense", text=text)

    arms = {
        "smola-4x4": adapted(4, 4),
        **{f"lora-{rank}": adapted(1, rank) for rank in (16, 17, 18)},
        "lora-4": adapted(1, 4),
        # of equal size, on two kinds of text: mixed for all tokens; the same and one for each kind; LoRA
        "smola-mixed-3x4": replace(adapted(3, 4, MIXED), probes={"gates": gates}),
        "omni-mixed-2x2": adapted(2, 2, MIXED, groups=[None, 0, 1]),
        "lora-mixed-12": adapted(1, 12, MIXED),
        "all-weights": Arm("dense.yaml", {**DENSE, "optim.lr": 0.003}, start="dense", text="tech-docs"),
        **dense(),
    }
    mixed, apart = "smola-mixed-3x4", "total variation of gates, less that within a kind"
    paper, forgets, lora = "2312.00968", "smola-4x4 all-weights", "smola-4x4 lora-16"
    below, above = "smola-4x4 lora-17", "smola-4x4 lora-18"
    return System(
        arms,
        (
            expect("A1", "as good as LoRA of equal size", paper, NEW, lora, excess, high=MARGIN),
            expect("A2", "better than LoRA of equal size", paper, NEW, lora, excess, high=0),
            expect("A3", "better than LoRA of one rank", paper, NEW, "smola-4x4 lora-4", excess, high=0),
            expect("A4", "forgets less than all weights", paper, f"{OLD}, less", forgets, forgets_more, high=0),
            expect("A5", "forgets no more than LoRA", paper, f"{OLD}, less", lora, forgets_more, high=MARGIN),
            expect("A6", "the old text suffers", paper, OLD, "smola-4x4", forgotten, low=0),
            expect("A7", "two kinds of text: gates separate", paper, apart, mixed, separated, low=0),
            expect("A8", "and more than at the start", paper, f"{apart}, rise", mixed, separated_in_time, low=0),
            expect("A9", "two kinds: better than LoRA", paper, BOTH, f"{mixed} lora-mixed-12", excess, high=0),
            expect("A10", "experts of a kind: better", paper, BOTH, f"omni-mixed-2x2 {mixed}", excess, high=0),
            expect("A11", "of 114k better than LoRA of 113k", paper, NEW, below, excess, high=0),
            expect("A12", "as good as LoRA of 120k", paper, NEW, above, excess, high=MARGIN),
            expect("A13", "forgets no more than LoRA of 113k", paper, f"{OLD}, less", below, forgets_more, high=MARGIN),
            expect("A14", "forgets no more than LoRA of 120k", paper, f"{OLD}, less", above, forgets_more, high=MARGIN),
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


def separated(run: Run) -> float:
    """Total variation of mean gates between two kinds of text, less that between halves of one kind."""
    return run["gates"]["between"] - run["gates"]["within"]


def separated_in_time(run: Run) -> float:
    """The same at the end of training, less that before it."""
    return separated(run) - (run["gates"]["between_start"] - run["gates"]["within_start"])
