"""Whether experts whose router rows grow little in fine-tuning can go (provable pruning, Chowdhury 2024).

    python -m bench.effects.router_norms [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

A mixture is trained on two kinds of text, then trained on with one of them ("tuned"), on which everything is measured:
experts go by the signed change of their router rows' norms, beside chance, the reverse order, the norm of the change
(which the title is easily read as) and criteria that look at text. "zeroed": the router keeps all rows and what is gone
answers 0, as in the authors' code; else its rows go, too. "trained on": with all weights, after experts went."""

from bench.effects.command import main
from bench.effects.compression import COST, EXCESS, against, cost
from bench.effects.corpora import MIXED
from bench.effects.effect import Effect, Run
from bench.effects.router_norm_probes import RATIOS, by_router_norms
from bench.effects.study import SMALL, Arm, Study

PAPER, TUNED = "arXiv:2405.16646", ("tuned",)
WAYS = (
    *("change", "random", "reverse", "norm of change", "frequency", "reap", "recon"),
    *("change, zeroed", "random, zeroed", "reverse, zeroed"),
)


def compared(number: str, claim: str, way: str, other: str, source: str = PAPER, **bounds: float) -> list[Effect]:
    """One row for every ratio: one way against another."""
    return [
        Effect(
            f"{number}{'abc'[place]}",
            f"{label}: {claim}",
            source,
            EXCESS,
            TUNED,
            against(f"{way}, {label}", f"{other}, {label}"),
            **(bounds or {"high": 0.0}),
        )
        for place, label in enumerate(RATIOS)
    ]


def gap(label: str):
    """How far training on changes the cost of removing: cost after it, less cost before."""

    def figure(run: Run) -> float:
        after = against(f"change, trained on, {label}", "whole, trained on")
        return after(run) - cost(f"change, {label}")(run)

    return figure


def shrinks(place: int, label: str) -> Effect:
    """Whether training on closes the gap to the whole model, trained on as long."""
    claim = f"{label}: trained on, the gap to the whole model shrinks"
    return Effect(f"P8{'abc'[place]}", claim, PAPER, "cost after, less cost before", TUNED, gap(label), high=0)


def costs() -> list[Effect]:
    """One row for every way and ratio: the curve of perplexity against ratio."""
    ways = [f"{way}, {label}" for label in RATIOS for way in WAYS]
    return [Effect(f"C{number}", way, "ours", COST, TUNED, cost(way), low=0) for number, way in enumerate(ways, 1)]


STUDY = Study(
    name="router_norms",
    budget=3e11,
    common=SMALL,
    arms={
        "general": Arm("moe.yaml"),
        "tuned": Arm(
            "moe.yaml", {"optim.lr": 0.003}, start="general", text="speeches", probes={"compression": by_router_norms}
        ),
    },
    seeds=(0, 1, 2, 3),
    corpora=(MIXED,),
    checkpoints=1,
    final_tokens=65_536,
)
quarter, half, most = RATIOS
EFFECTS = (
    Effect("T1", "fine-tuning pays", "ours", EXCESS, TUNED, against("whole", "untuned, whole"), high=0),
    *compared("P1", "change beats chance", "change", "random"),
    *compared("P2", "chance beats the reverse", "random", "reverse"),
    *compared("P3", "change beats the reverse", "change", "reverse"),
    *compared("P4", "change beats the norm of the change", "change", "norm of change"),
    *compared("P5", "zeroed, change beats chance", "change, zeroed", "random, zeroed"),
    *compared("P6", "zeroed, chance beats the reverse", "random, zeroed", "reverse, zeroed"),
    *compared("P7", "zeroing beats slicing", "change, zeroed", "change", "ours"),
    *(shrinks(place, label) for place, label in enumerate(RATIOS)),
    *compared("P9", "untuned model: no better than chance", "untuned, change", "untuned, random", "ours", low=0),
    *compared("D1", "frequency beats change", "frequency", "change", "ours"),
    *compared("D2", "recon beats change", "recon", "change", "ours"),
    Effect("D3a", "half costs more than a quarter", "ours", EXCESS, TUNED,
           against(f"change, {half}", f"change, {quarter}"), low=0),
    Effect("D3b", "three quarters cost more than half", "ours", EXCESS, TUNED,
           against(f"change, {most}", f"change, {half}"), low=0),
    *costs(),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
