"""Directions that HOBBIT reports (arXiv:2411.01433), on traces and texts of trained models: experts of one width, and
HMoE's.

    python -m bench.effects.offload [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

Held-out text is decoded token by token, as in generation, in windows of 128 tokens, each a sequence of its own."""

import math

from bench.effects.command import main
from bench.effects.effect import Effect, Figure, Run
from bench.effects.offload_probes import offloading
from bench.effects.study import SMALL, Arm, Study

HOBBIT = "arXiv:2411.01433"
ARMS = {"moe": ("M", Arm("moe.yaml")), "hmoe": ("H", Arm("hmoe.yaml"))}


def dearer(plan: str, other: str) -> Figure:
    """Loss of one plan less another's."""
    return lambda run: run["offload"]["nats"][plan] - run["offload"]["nats"][other]


def further(near: int, far: int) -> Figure:
    """Share of tokens whose first expert is among those predicted, at one distance less another."""
    return lambda run: run["offload"]["chosen"][near - 1] - run["offload"]["chosen"][far - 1]


def tuned(run: Run) -> float:
    """Penalty of the tuned mix over the best single policy's."""
    found = run["offload"]
    return found["mix"] / min(found["single"].values())


def mixed(run: Run) -> float:
    """Perplexity in mixed precision over exact."""
    return math.exp(dearer("mixed", "exact")(run))


def of_sequences(run: Run) -> float:
    """LFU's hit rate with records of a sequence, less with records of the model."""
    found = run["offload"]["lfu"]
    return found["sequence"] - found["model"]


def effects(arm: str) -> list[Effect]:
    """What is expected of one model."""
    letter, arms = ARMS[arm][0], (arm,)
    ahead, nats = "first expert among those predicted, nearer less further", "nats a token"
    return [
        Effect(f"{letter}1", f"{arm}: predictions fall from 1 to 2 layers", HOBBIT, ahead, arms, further(1, 2), low=0),
        Effect(f"{letter}2", f"{arm}: and from 2 to 3", HOBBIT, ahead, arms, further(2, 3), low=0),
        Effect(f"{letter}3", f"{arm}: the tuned mix is no worse than any policy alone on its trace", HOBBIT,
               "penalty over the best one's", arms, tuned, high=1),
        Effect(f"{letter}4", f"{arm}: records of a sequence beat records of the model", HOBBIT,
               "LFU hit rate, sequence less model", arms, of_sequences, low=0),
        Effect(f"{letter}5", f"{arm}: skipping costs more than int4 instead, T1 0.6", HOBBIT, nats, arms,
               dearer("skip 0.6", "int4 0.6"), low=0),
        Effect(f"{letter}6", f"{arm}: skipping costs more than int2 instead, T1 0.6", HOBBIT, nats, arms,
               dearer("skip 0.6", "int2 0.6"), low=0),
        Effect(f"{letter}7", f"{arm}: skipping costs more the more is skipped, T1 0.3 less 0.6", HOBBIT, nats, arms,
               dearer("skip 0.3", "skip 0.6"), low=0),
        Effect(f"{letter}8", f"{arm}: mixed precision (T1 0.6, T2 0.9, int4) costs at most 1 %", HOBBIT,
               "perplexity over exact", arms, mixed, high=1.01),
    ]  # fmt: skip


STUDY = Study(
    name="offload",
    budget=2e11,
    common={**SMALL, "model.n_layers": 4},
    arms={name: arm for name, (_, arm) in ARMS.items()},
    probes={"offload": offloading},
    corpora=("wikitext-2",),
    checkpoints=1,
    final_tokens=65_536,
)
EFFECTS = (
    *effects("moe"),
    *effects("hmoe"),
    Effect("B1", "narrow experts are a low tier of their own", "ours", "bytes a token, HMoE over MoE, a quarter cached",
           ("hmoe", "moe"), lambda unequal, equal: unequal["offload"]["bytes"] / equal["offload"]["bytes"], high=1),
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
