"""What the generalization bound (arXiv:2403.17404) predicts of the gap between held-out and training loss.

    python -m bench.effects.generalization [--quick] [--json PATH] [--data FOLDER] [--out FOLDER] [--workers N]

K: at a fixed number T of experts of one width, the gap grows with k up to T/2. T: it grows with T at a fixed k. M: it
falls as 1/sqrt(m), m the training tokens. Gaps are compared where arms have the same training loss (interpolated
between saved states), because fewer experts a token also fit more slowly. A slope that is not positive, or a rank
correlation of the wrong sign, refutes the prediction at this size. With k = 1 the renormalised gate is 1, and the
router learns from the balance loss alone. Tokens are bytes, so that losses of different training texts compare.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.effects.command import main
from bench.effects.effect import Effect, Run
from bench.effects.loss_probes import figures
from bench.effects.study import Arm, Study, Trained
from moestro.evaluate.generalization import log_choices, router_term

T, WIDTH = 16, 32
# Share of the documents that is held out: what is left are about 38, 121 and 240 kB of the first corpus's 7.2 MB, and
# 84 kB and more of the second's 2.9 MB. The study takes corpora without a held-out file, whose training text would stay
# whole.
SCARCE, MORE, MOST = 0.99, 0.97, 0.95
# Tokens of the training and of the held-out text on which each saved state is measured.
MEASURED = 16_384
SPARSE = ("k1", "k2", "k4", "k8")
POOLS = ("t4", "t8", "k2", "t32")
SAMPLES = ("k2", "more-text", "most-text")


def mixture(top_k: int = 2, n_experts: int = T, held_out: float = SCARCE) -> Arm:
    """Experts of one width for every k and T: the class of experts stays the same, and compute grows with k."""
    settings = {
        "model.ffn.router.select.top_k": top_k,
        "model.ffn.branches.0.widths": {"kind": "equal", "n_experts": n_experts, "total": WIDTH * n_experts},
        "data.val_fraction": held_out,
    }
    return Arm("moe.yaml", settings)


def gaps(trained: Trained) -> dict[str, Any]:
    """{"m", "s_paper", "s_exact", "router", "curve"}: training tokens; the sparse factor by both counts and the
    router's term of the bound, of all layers; and of every saved state {"step", "train", "held_out"}, each [nats a
    token, share of wrong predictions], in evaluation mode."""
    model, m = trained.model(), trained.dataset.n_train_tokens
    families = [layer.router.selection_family() for layer in model.moe_layers().values()]
    first = families[0]
    patterns = {
        count: log_choices(first.n_experts, first.most, first.fixed, count)  # type: ignore[arg-type]
        for count in ("paper", "exact")
    }
    return {
        "m": m,
        "s_paper": math.sqrt(patterns["paper"] / m),
        "s_exact": math.sqrt(patterns["exact"] / m),
        "router": router_term(families, m),
        "curve": [{"step": step, **state(trained, step)} for step in trained.checkpoints()],
    }


def state(trained: Trained, step: int) -> dict[str, list[float]]:
    """Loss and error of one saved state on as many tokens of both texts."""
    model, tokens = trained.model(step), min(MEASURED, trained.final_tokens)
    size = trained.recipe.train.value("batch_size")
    steps = math.ceil(tokens / size / trained.dataset.seq_len)
    # an epoch's first batches, in an order that training did not have
    read = [trained.dataset.train_batch(number, size, seed=10**6) for number in range(steps)]
    return {"train": figures(model, read), "held_out": figures(model, trained.held_out(tokens))}


def matched(runs: tuple[Run, ...], which: int = 0) -> list[float]:
    """The gap of every run where its training loss first is the lowest that all runs reach; `which` is 0 for the gap of
    the loss, 1 for that of the error."""
    curves = [run["gaps"]["curve"] for run in runs]
    level = max(min(point["train"][0] for point in curve) for curve in curves)
    return [at_level(curve, level, which) for curve in curves]


def at_level(curve: list[dict[str, Any]], level: float, which: int = 0) -> float:
    """The gap where the training loss first falls to `level`, linear in the loss between saved states."""
    gap = [point["held_out"][which] - point["train"][which] for point in curve]
    losses = [point["train"][0] for point in curve]
    after = next(i for i, loss in enumerate(losses) if loss <= level)
    if after == 0:
        return gap[0]
    share = (losses[after - 1] - level) / (losses[after - 1] - losses[after])
    return gap[after - 1] + share * (gap[after] - gap[after - 1])


def last(runs: tuple[Run, ...]) -> list[float]:
    """The gap of every run at its end, at equal FLOPs."""
    return [point["held_out"][0] - point["train"][0] for point in (run["gaps"]["curve"][-1] for run in runs)]


def best(runs: tuple[Run, ...]) -> list[float]:
    """The gap of every run where its held-out loss is lowest."""
    states = [min(run["gaps"]["curve"], key=lambda point: point["held_out"][0]) for run in runs]
    return [point["held_out"][0] - point["train"][0] for point in states]


def errors(runs: tuple[Run, ...]) -> list[float]:
    """The gap of the 0/1 error, a bounded loss, at matched training loss."""
    return matched(runs, 1)


Gaps = Callable[[tuple[Run, ...]], list[float]]


def slope(by: Callable[[Run], float]) -> Callable[..., float]:
    """Least-squares slope of the matched gap on a figure of the bound."""
    return lambda *runs: float(np.polyfit([by(run) for run in runs], matched(runs), 1)[0])


def ranks(by: Callable[[Run], float], gap: Gaps = matched) -> Callable[..., float]:
    """Spearman's correlation of the gap with a figure of the bound."""

    def order(values: list[float]) -> np.ndarray:
        return np.argsort(np.argsort(values)).astype(float)

    return lambda *runs: float(np.corrcoef(order([by(run) for run in runs]), order(gap(runs)))[0, 1])


def growth(first: Run, last_: Run) -> float:
    """The second run's matched gap over the first's."""
    low, high = matched((first, last_))
    return high / low


def beyond_the_bound(first: Run, last_: Run) -> float:
    """That ratio over the ratio of the router's terms of the bound."""
    return growth(first, last_) / (last_["gaps"]["router"] / first["gaps"]["router"])


def of(name: str) -> Callable[[Run], float]:
    """A figure of the bound by its name."""
    return lambda run: run["gaps"][name]


def expect(number: str, claim: str, quantity: str, arms: tuple[str, ...], value: Any, **bounds: float) -> Effect:
    """A prediction of the bound."""
    return Effect(number, claim, "arXiv:2403.17404, theorem", quantity, arms, value, **bounds)


def inverse_root(run: Run) -> float:
    """1/sqrt(m)."""
    return run["gaps"]["m"] ** -0.5


STUDY = Study(
    name="generalization",
    budget=2e11,
    common={
        "data.tokenizer": {"kind": "bytes"},
        "data.seq_len": 64,
        "model.d_model": 64,
        "model.n_layers": 2,
        "train.batch_size": 16,
        "optim.lr": 0.01,
        "optim.weight_decay": 0.0,
    },
    arms={
        **{f"k{k}": mixture(k) for k in (1, 2, 4, 8, 16)},
        **{f"t{t}": mixture(n_experts=t) for t in (4, 8, 32)},
        "more-text": mixture(held_out=MORE),
        "most-text": mixture(held_out=MOST),
    },
    probes={"gaps": gaps},
    seeds=(0, 1, 2, 3, 4),
    corpora=("redpajama", "speeches"),
    checkpoints=12,
)
RHO, SLOPE = "rank correlation", "slope, nats"
S_PAPER, S_EXACT, ROUTER = of("s_paper"), of("s_exact"), of("router")
EFFECTS = (
    expect("K1", "k to T/2: gap on the paper's s", SLOPE, SPARSE, slope(S_PAPER), low=0),
    expect("K2", "k to T/2: gap on the exact s", SLOPE, SPARSE, slope(S_EXACT), low=0),
    expect("K3", "k to T/2: gap rises with k", RHO, SPARSE, ranks(S_PAPER), low=0),
    expect("K4", "gap of k = 8 over that of k = 1", "ratio", ("k1", "k8"), growth, low=1),
    expect("K5", "that ratio at most the bound's", "ratio over ratio", ("k1", "k8"), beyond_the_bound, high=1),
    expect("K6", "K3 at equal FLOPs", RHO, SPARSE, ranks(S_PAPER, last), low=0),
    expect("K7", "K3 at the best held-out loss", RHO, SPARSE, ranks(S_PAPER, best), low=0),
    expect("K8", "K3 for the 0/1 error", RHO, SPARSE, ranks(S_PAPER, errors), low=0),
    expect("K9", "all k: gap on the exact s, 0 at k = T", SLOPE, (*SPARSE, "k16"), slope(S_EXACT), low=0),
    expect("T1", "k = 2: gap on the router's term", SLOPE, POOLS, slope(ROUTER), low=0),
    expect("T2", "k = 2: gap rises with T", RHO, POOLS, ranks(ROUTER), low=0),
    expect("M1", "gap on 1/sqrt(m)", SLOPE, SAMPLES, slope(inverse_root), low=0),
    expect("M2", "gap falls with m", RHO, SAMPLES, ranks(inverse_root), low=0),
)

if __name__ == "__main__":
    main(STUDY, EFFECTS, __doc__)
