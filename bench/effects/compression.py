"""What making experts fewer, fewer in kind, thinner or coarser costs: perplexity against ratio for every criterion.

    python -m bench.effects.compression [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

Two models: a mixture trained from scratch, and a dense model of as many useful training FLOPs that is copied into 8
experts with 5 % of noise and trained on for 200 steps ("upcycled"), where experts are alike. Healing by LoRA is
training, too: the whole model is given as much, and healed ones are compared with it."""

from bench.effects.command import main
from bench.effects.compression_probes import RATIOS, compression
from bench.effects.effect import Effect, Figure, Run
from bench.effects.study import SMALL, Arm, Study

MODELS = {"scratch": "S", "upcycled": "U"}
REMOVING = ("frequency", "gate-sum", "man", "reap", "recon", "random", "reap, zeroed", "moe-i2, uniform", "moe-i2")
MERGING = ("cka remap", "cka shrink", "random groups", "hc-smoe")
HEALED = ("moe-i2, router-kd",)
OTHERS = (
    *(f"svd{kind}, {share} kept" for share in (0.75, 0.5) for kind in ("", " whitened")),
    *("skipping", "int8", "fp8", "int4", "int4 calibrated", "reap, 2 of 8, int4"),
)
MOE_I2, DEK = "arXiv:2411.01016", "arXiv:2407.09590"
COST, EXCESS = "perplexity over the whole model's, less 1", "perplexity over the other's, less 1"


def cost(way: str) -> Figure:
    """How far perplexity lies above the whole model's, as a share."""

    def figure(run: Run) -> float:
        found = run["compression"]
        return found[way] / found["whole"] - 1

    return figure


def against(way: str, other: str) -> Figure:
    """How far the perplexity of one way lies above another's, as a share."""

    def figure(run: Run) -> float:
        found = run["compression"]
        return found[way] / found[other] - 1

    return figure


def adding(way: str, first: str, second: str) -> Figure:
    """The cost of two ways together over the sum of their costs."""

    def figure(run: Run) -> float:
        return cost(way)(run) / (cost(first)(run) + cost(second)(run))

    return figure


def likeness(run: Run) -> float:
    """Mean CKA of the outputs of two experts of a layer."""
    return run["compression"]["similarity"]


def costs(model: str) -> list[Effect]:
    """One row for every way and ratio: the curve of perplexity against ratio."""
    ways = [f"{way}, {label}" for label in RATIOS for way in (*REMOVING, *MERGING, *HEALED)]
    letter = MODELS[model]
    return [
        Effect(f"{letter}C{number}", f"{model}: {way}", "ours", COST, (model,), cost(way), low=0)
        for number, way in enumerate((*ways, *OTHERS), start=1)
    ]


def compared(model: str, number: str, claim: str, source: str, way: str, other: str, **bounds: float) -> list[Effect]:
    """One row for every ratio: one way against another."""
    letter = MODELS[model]
    return [
        Effect(
            f"{letter}{number}{'ab'[place]}",
            f"{model}, {label}: {claim}",
            source,
            EXCESS,
            (model,),
            against(f"{way}, {label}", f"{other}, {label}"),
            **bounds,
        )
        for place, label in enumerate(RATIOS)
    ]


def healed_against_whole(model: str, place: int, label: str) -> Effect:
    """Whether pruning still costs after LoRA, beside the whole model after as much of it."""
    claim, number = f"{model}, {label}: healed, it still costs", f"{MODELS[model]}12{'ab'[place]}"
    return Effect(number, claim, "ours", EXCESS, (model,), against(f"moe-i2, lora, {label}", "whole, lora"), low=0)


def both(model: str) -> list[Effect]:
    """What is expected of either model."""
    letter = MODELS[model]
    quarter, half = RATIOS
    rows = [
        *compared(model, "1", "recon beats frequency", "arXiv:2402.14800", "recon", "frequency", high=0),
        *compared(model, "2", "frequency beats random", "arXiv:2404.05089", "frequency", "random", high=0),
        *compared(model, "3", "REAP beats random", "arXiv:2510.13999", "reap", "random", high=0),
        *compared(model, "4", "unequal counts beat equal ones", MOE_I2, "moe-i2", "moe-i2, uniform", high=0),
        *compared(model, "5", "blocks beat layers alone", MOE_I2, "moe-i2, uniform", "recon", high=0),
        *compared(model, "6", "LoRA recovers", MOE_I2, "moe-i2, lora", "moe-i2", high=0),
        *compared(model, "7", "taught routers recover", "ours", "moe-i2, router-kd", "moe-i2", high=0),
        *compared(model, "8", "remap beats shrink", "ours", "cka remap", "cka shrink", high=0),
        *compared(model, "9", "slicing beats zeroing", "ours", "reap", "reap, zeroed", high=0),
        *(healed_against_whole(model, place, label) for place, label in enumerate(RATIOS)),
    ]
    single = [
        ("D1", "dropping half costs more than a quarter", f"reap, {half}", f"reap, {quarter}", {"low": 0.0}),
        ("D2", "thinner beats fewer, 3/4 kept", "svd, 0.75 kept", f"recon, {quarter}", {"high": 0.0}),
        ("D3", "whitening beats plain, 1/2 kept", "svd whitened, 0.5 kept", "svd, 0.5 kept", {"high": 0.0}),
        ("D4", "calibrated 4 bits beat plain", "int4 calibrated", "int4", {"high": 0.0}),
        ("D5", "8 bits are free", "int8", "whole", {"low": -0.001, "high": 0.001}),
    ]
    rows += [
        Effect(letter + number, f"{model}: {claim}", "ours", EXCESS, (model,), against(way, other), **bounds)
        for number, claim, way, other, bounds in single
    ]
    claim = f"{model}: pruning and 4 bits add up"
    parts = ("reap, 2 of 8, int4", "reap, 2 of 8", "int4")
    rows.append(Effect(f"{letter}D6", claim, "ours", "ratio", (model,), adding(*parts), low=0.8, high=1.2))
    return rows


STUDY = Study(
    name="compression",
    budget=2e11,
    common=SMALL,
    arms={
        "scratch": Arm("moe.yaml"),
        "upcycled": Arm("dense.yaml", {"model.ffn": {"kind": "dense", "width": 64}}),
    },
    probes={"compression": compression},
    corpora=("wikitext-2",),
    checkpoints=1,
    final_tokens=65_536,
)
EFFECTS = (
    *both("scratch"),
    *both("upcycled"),
    Effect("S0", "scratch: experts are not alike", "ours", "mean CKA", ("scratch",), likeness, high=0.3),
    Effect("U0", "upcycled: experts are alike", "ours", "mean CKA", ("upcycled",), likeness, low=0.3),
    *compared("scratch", "10", "merging costs more than removing", "ours", "cka remap", "frequency", low=0),
    *compared("upcycled", "10", "merging costs less than removing", DEK, "cka remap", "frequency", high=0),
    *compared("upcycled", "11", "CKA groups beat drawn ones", DEK, "cka remap", "random groups", high=0),
    *costs("scratch"),
    *costs("upcycled"),
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
