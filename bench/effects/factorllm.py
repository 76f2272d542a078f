"""FactorLLM's and upcycling's effects: a dense model split or copied into experts, and trained on at equal FLOPs.

    python -m bench.effects.factorllm [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

Two dense models: stories260K, a public pretrained one (260 thousand parameters, llama2.c), on TinyStories; and one
trained here for each seed. Every network is cut into 4 equal experts, of which 2 serve a token, in the order in which
its units stand; the scale is fitted to the dense output but where an arm's name says otherwise. Arms:

dense: the dense model goes on. pa: routers taught by the dense networks (probe, then 300 steps), then straight-through
gates and the language-model loss. pa-lm: the same, and taught on during training (weight 0.05); the teacher and the
experts that are computed to be recorded count in its FLOPs. lm: routers from random rows, straight-through gates.
frozen: hard gates, so that the random routers stay as they are. released: the same with scale n/k, what the released
code does. upcycle, drop: 4 copies, 2 for each token; half of each copy's units redrawn.

Unequal splits (ours) are of 8 experts, of which 4 serve a token: even-8 as pa; uneven-8: units by falling importance,
widths that share it evenly. Both have routers taught as pa's and a balance loss, which keeps about half of the units
active. What they lose is also measured at half (`width_probes`).
"""

from dataclasses import replace

from bench.effects.command import main
from bench.effects.conversion import DENSE, PRETRAINED, ConversionWork
from bench.effects.effect import Effect, Run
from bench.effects.split_probes import N_EXPERTS, splits
from bench.effects.study import SMALL, Arm, Study
from bench.effects.width_probes import ACTIVE, routed, widths

SPLIT = {"kind": "split", "widths": {"kind": "equal", "n_experts": N_EXPERTS}, "top_k": 2, "scale": "fit"}
TAUGHT = {"start": "probe", "labels": "subset", "steps": 300}
COPIES = {"kind": "upcycle", "n_experts": N_EXPERTS, "top_k": 2}
PA_LM = [{"kind": "router_target", "weight": 0.05}]
BALANCED = [{"kind": "load_balance", "weight": 0.01}]


def converted(method: dict, **keys: object) -> Arm:
    """An arm that begins with a conversion."""
    return Arm("dense.yaml", {"method": method, **keys})


def eight(widths: str, grouping: str) -> Arm:
    """8 experts, 4 for each token, by a rule for widths and one for groups."""
    split = {"widths": {"kind": widths, "n_experts": 8}, "top_k": 4, "grouping": {"kind": grouping}}
    arm = converted({**SPLIT, **split}, router=TAUGHT, **{"run.objectives": BALANCED})
    return replace(arm, probes={"routed": routed})


STUDY = Study(
    name="factorllm",
    budget=1.5e11,
    common={**SMALL, "model.ffn.width": 256, "optim.lr": 0.003},
    arms={
        DENSE: Arm("dense.yaml", probes={"splits": splits, "widths": widths}),
        "pa": converted(SPLIT, router=TAUGHT),
        "pa-lm": converted(SPLIT, router=TAUGHT, taught=True, **{"run.objectives": PA_LM}),
        "lm": converted(SPLIT),
        "frozen": converted({**SPLIT, "gate": "hard"}),
        "released": converted({**SPLIT, "gate": "hard", "scale": "n/k"}),
        "upcycle": converted(COPIES),
        "drop": converted({**COPIES, "drop": 0.5}),
        "even-8": eight("equal", "contiguous"),
        "uneven-8": eight("equal_importance", "importance"),
    },
    corpora=("wikitext-2", PRETRAINED),
    final_tokens=32_768,
)


def split(run: Run, name: str) -> float:
    """Loss of the dense source when it is split and experts are chosen as `name` says, in nats a token."""
    return run["splits"][name]


def least_step(run: Run) -> float:
    """The smallest gain of one expert more, from 1 to all 4."""
    losses = [split(run, f"k{k}") for k in range(1, N_EXPERTS + 1)]
    return min(fewer - more for fewer, more in zip(losses, losses[1:], strict=False))


def start(run: Run) -> float:
    """Held-out loss of the converted model before training."""
    return run["start"]["loss"]["converted"]


def agreement(run: Run) -> float:
    """Share of the best experts that taught routers choose, mean over layers."""
    layers = run["start"]["layers"]
    return sum(layer["agreement"] for layer in layers) / len(layers)


def recovered(run: Run, dense: Run) -> float:
    """Share of what the conversion cost that training won back, against the dense model trained on."""
    return (start(run) - run["final"]["loss"]) / (start(run) - dense["final"]["loss"])


def worse(run: Run, other: Run) -> float:
    """Nats a token that the first run ends above the second."""
    return run["final"]["loss"] - other["final"]["loss"]


def expect(number: str, claim: str, quantity: str, arms: tuple[str, ...], value, **bounds: float) -> Effect:
    """An effect of the specification of arXiv:2408.11855 or of its neighbours."""
    sources = {"U": "arXiv:2212.05055, arXiv:2502.19261", "G": "arXiv:2110.01786", "W": "ours, after arXiv:2408.10681"}
    source = sources.get(number[0], "arXiv:2408.11855")
    return Effect(number, claim, source, quantity, arms, value, **bounds)


def gap(number: str, claim: str, above: str, below: str, **bounds: float) -> Effect:
    """One way of choosing experts loses more than another."""

    def apart(run: Run) -> float:
        return split(run, above) - split(run, below)

    return expect(number, claim, "nats a token", (DENSE,), apart, **(bounds or {"low": 0}))


def difference(number: str, claim: str, above: str, below: str, **bounds: float) -> Effect:
    """One arm ends above another."""
    return expect(number, claim, "nats a token", (above, below), worse, **(bounds or {"low": 0}))


def cheaper(run: Run, other: Run) -> float:
    """Nats a token that the first run starts above the second."""
    return start(run) - start(other)


def kept(run: Run) -> float:
    """How far the copies' loss is from the dense one's before training."""
    return abs(start(run) - run["start"]["loss"]["dense"])


def oracle(number: str, claim: str, above: str, below: str = "equal_importance") -> Effect:
    """One split loses more than another where the best experts are chosen, with half of the units."""

    def apart(run: Run) -> float:
        return run["widths"][above]["loss"] - run["widths"][below]["loss"]

    return expect(number, claim, "nats a token", (DENSE,), apart, low=0)


def furthest(run: Run) -> float:
    """The greatest distance of a split's share of active units from half."""
    return max(abs(one["active"] - ACTIVE) for one in run["widths"].values())


def active(run: Run, other: Run) -> float:
    """Active units of the first run, as a share of the second's, as trained."""
    return run["routed"]["as_trained"]["active"] / other["routed"]["as_trained"]["active"]


def worse_at_half(run: Run, other: Run) -> float:
    """Nats a token that the first run loses more with half of the units."""
    return run["routed"]["half"]["loss"] - other["routed"]["half"]["loss"]


EIGHTS = ("even-8", "uneven-8")
EFFECTS = (
    gap("S1", "all 4 experts are the dense model", "k4", "dense", low=-1e-4, high=1e-4),
    expect("S2", "best subsets: each expert more helps", "least gain, nats", (DENSE,), least_step, low=0),
    gap("S3", "k = 2: projection above best subset", "projection", "k2"),
    gap("S4", "k = 2: random above projection", "random", "projection"),
    gap("S5", "k = 2: released label above projection", "released", "projection"),
    gap("S6", "k = 2, random: scale n/k above 1", "random n/k", "random"),
    gap("G1", "k = 1: contiguous and random alike", "k1 random", "k1", low=-0.05, high=0.05),
    gap("G2", "k = 1: k-means below contiguous", "k1", "k1 kmeans"),
    gap("G3", "k = 1: co-activation below contiguous", "k1", "k1 co-activation"),
    expect("P1", "taught routers choose the best 2 of 4", "share met", ("pa",), agreement, low=0.6),
    expect("P2", "taught routers lower loss, untrained", "nats a token", ("lm", "pa"), cheaper, low=0),
    expect("R1", "training wins back most of the cost", "share", ("pa", DENSE), recovered, low=0.5),
    difference("R2", "frozen routers above PA + LM", "frozen", "pa-lm"),
    difference("R3", "frozen routers above PA, then LM", "frozen", "pa"),
    difference("R4", "LM from random routers above PA, then LM", "lm", "pa"),
    difference("R5", "released code above PA, then LM", "released", "pa"),
    expect("U1", "copies start as the dense model", "nats a token", ("upcycle",), kept, high=1e-4),
    difference("U2", "dense training on above copies, equal FLOPs", DENSE, "upcycle"),
    expect("U3", "redrawn copies start worse", "nats a token", ("drop", "upcycle"), cheaper, low=0),
    difference("U4", "redrawn copies end above copies", "drop", "upcycle"),
    expect("W1", "told: half of the units active", "greatest distance", (DENSE,), furthest, high=0.01),
    oracle("W2", "told: equal above equal_importance", "equal"),
    oracle("W3", "told: equal, k-means, above it", "equal kmeans"),
    oracle("W4", "told: equal, by importance, above it", "equal by importance"),
    oracle("W5", "told: equal above arithmetic", "equal", "arithmetic"),
    oracle("W6", "told: equal above hybrid", "equal", "hybrid"),
    oracle("W7", "told: equal above geometric", "equal", "geometric"),
    expect(
        "W8", "units as equal_importance routes", "ratio to equal", ("uneven-8", "even-8"), active, low=0.95, high=1.05
    ),
    difference("W9", "trained: equal above equal_importance", "even-8", "uneven-8"),
    expect("W10", "trained, half of the units: equal above it", "nats a token", EIGHTS, worse_at_half, low=0),
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__, work_of=ConversionWork)
