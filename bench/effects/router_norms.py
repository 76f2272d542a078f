"""Whether experts whose router rows grow little in fine-tuning can go (provable pruning, Chowdhury 2024).

    python -m bench.effects.router_norms [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

A mixture is trained on two kinds of text, then trained on with one of them ("tuned"), on which everything is measured:
experts go by the signed change of their router rows' norms, beside chance, the reverse order, the norm of the change
(which the title is easily read as) and criteria that look at text. "zeroed": the router keeps all rows and what is gone
answers 0, as in the authors' code; else its rows go, too. "trained on": with all weights, after experts went. "free" is
tuned without the load-balance loss, which holds router rows together."""

from typing import Any

from bench.effects.command import main
from bench.effects.compression import COST, EXCESS, against, cost
from bench.effects.corpora import MIXED
from bench.effects.effect import Effect, Figure, Run
from bench.effects.router_norm_probes import RATIOS, by_router_norms
from bench.effects.study import SMALL, Arm, Study

PAPER = "arXiv:2405.16646"
# Where letters before an effect's number stand for arms.
ARMS = {"": "tuned", "F": "free"}
WAYS = (
    *("change", "random", "reverse", "norm of change", "frequency", "reap", "recon"),
    *("change, zeroed", "random, zeroed", "reverse, zeroed"),
)


def one(letter: str, number: str, claim: str, value: Figure, source: str = "ours", **more: Any) -> Effect:
    """A row of one arm."""
    arm = ARMS[letter]
    return Effect(f"{letter}{number}", f"{arm}: {claim}", source, more.pop("quantity", EXCESS), (arm,), value, **more)


def compared(
    letter: str, number: str, claim: str, way: str, other: str, source: str = PAPER, **bounds: float
) -> list[Effect]:
    """One row for every ratio: one way against another."""
    return [
        one(
            letter,
            f"{number}{'abc'[place]}",
            f"{label}, {claim}",
            against(f"{way}, {label}", f"{other}, {label}"),
            source,
            **(bounds or {"high": 0.0}),
        )
        for place, label in enumerate(RATIOS)
    ]


def gap(label: str) -> Figure:
    """How far training on changes the cost of removing: cost after it, less cost before."""

    def figure(run: Run) -> float:
        after = against(f"change, trained on, {label}", "whole, trained on")
        return after(run) - cost(f"change, {label}")(run)

    return figure


def shrinks(letter: str, place: int, label: str) -> Effect:
    """Whether training on closes the gap to the whole model, trained on as long."""
    claim = f"{label}, trained on, the gap to the whole model shrinks"
    return one(letter, f"P8{'abc'[place]}", claim, gap(label), PAPER, quantity="cost after, less cost before", high=0)


def of_arm(letter: str) -> list[Effect]:
    """What is expected of one way of tuning, and the curve of perplexity against ratio."""
    ways = [f"{way}, {label}" for label in RATIOS for way in WAYS]
    quarter, half, most = (f"change, {label}" for label in RATIOS)
    return [
        one(letter, "T1", "fine-tuning pays", against("whole", "untuned, whole"), high=0),
        *compared(letter, "P1", "change beats chance", "change", "random"),
        *compared(letter, "P2", "chance beats the reverse", "random", "reverse"),
        *compared(letter, "P3", "change beats the reverse", "change", "reverse"),
        *compared(letter, "P4", "change beats the norm of the change", "change", "norm of change"),
        *compared(letter, "P5", "zeroed, change beats chance", "change, zeroed", "random, zeroed"),
        *compared(letter, "P6", "zeroed, chance beats the reverse", "random, zeroed", "reverse, zeroed"),
        *compared(letter, "P7", "zeroing beats slicing", "change, zeroed", "change", "ours"),
        *(shrinks(letter, place, label) for place, label in enumerate(RATIOS)),
        *compared(letter, "P9", "untuned, no better than chance", "untuned, change", "untuned, random", "ours", low=0),
        *compared(letter, "D1", "frequency beats change", "frequency", "change", "ours"),
        *compared(letter, "D2", "recon beats change", "recon", "change", "ours"),
        one(letter, "D3a", "half costs more than a quarter", against(half, quarter), low=0),
        one(letter, "D3b", "three quarters cost more than half", against(most, half), low=0),
        *(one(letter, f"C{n}", way, cost(way), quantity=COST, low=0) for n, way in enumerate(ways, 1)),
    ]


def tuned(**settings: Any) -> Arm:
    """A mixture that goes on with one of the kinds of text."""
    probes = {"compression": by_router_norms}
    return Arm("moe.yaml", {"optim.lr": 0.003, **settings}, start="general", text="speeches", probes=probes)


STUDY = Study(
    name="router_norms",
    budget=3e11,
    common=SMALL,
    arms={"general": Arm("moe.yaml"), "tuned": tuned(), "free": tuned(objectives=[])},
    seeds=(0, 1, 2, 3),
    corpora=(MIXED,),
    checkpoints=1,
    final_tokens=65_536,
)
EFFECTS = tuple(effect for letter in ARMS for effect in of_arm(letter))

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
