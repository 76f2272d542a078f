"""What a dense model loses where its networks are split and only some experts serve a token: no training, no router."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bench.effects.conversion import ConvertedJob
from moestro.convert.grouping import BalancedKMeans, CoActivation, Contiguous, Grouping, Shuffled
from moestro.convert.layers import Site, inputs_of
from moestro.convert.mixture import Mixture
from moestro.convert.routers import expert_outputs
from moestro.convert.run import dense_sites
from moestro.convert.seen import Seen
from moestro.convert.split import Split
from moestro.evaluate import evaluate
from moestro.experts.widths import equal
from moestro.layers import MoELayer
from moestro.objectives.router_target import label_experts
from moestro.recipe.evaluation import Run, opened_run
from moestro.routers import Router
from moestro.routing import SparseRouting

N_EXPERTS = 4
CALIBRATION, MEASURED = 4096, 8192
GROUPINGS: dict[str, Grouping] = {
    "contiguous": Contiguous(),
    "random": Shuffled(),
    "kmeans": BalancedKMeans(on="activations"),
    "co-activation": CoActivation(),
}


class Told(Router):
    """Chooses by the experts' outputs on the very token, which no real router knows: `labels` as in `label_experts`, or
    `random`. Gates are `scale`."""

    def __init__(self, made: Mixture, seen: Seen, top_k: int, labels: str, scale: float) -> None:
        super().__init__()
        self.made, self.seen = (made,), seen
        self.n_experts, self.top_k, self.labels, self.scale = made.layer.bank.n_experts, top_k, labels, scale
        self.generator = seen.generator()

    def forward(self, x: Float[Tensor, "t d"]) -> SparseRouting:
        if self.labels == "random":
            expert = torch.rand(len(x), self.n_experts, generator=self.generator).topk(self.top_k).indices
        else:
            outputs, wanted = expert_outputs(self.made[0].layer, x), self.seen.network(x)
            chosen: Any = label_experts(outputs, wanted, self.top_k, self.labels, self.scale)  # type: ignore[arg-type]
            expert = chosen.nonzero()[:, 1].view(len(x), self.top_k)
        return SparseRouting.from_topk(expert, torch.full(expert.shape, self.scale), self.n_experts)


def splits(job: ConvertedJob) -> dict[str, float]:
    """Held-out loss (nats a token) of a job's dense source: `dense`; split in 4 with the best subset of k = 1, ..., 4
    experts (`k1`...) and, at k = 2, with other choices; and with other groupings at k = 1."""
    run = opened_run(job.source)
    sites = dense_sites(run.model, None)
    seen = seen_by(run, sites, job.seed)
    made = {name: [split(one, grouping) for one in seen] for name, grouping in GROUPINGS.items()}

    def loss(grouping: str = "contiguous", top_k: int = 2, labels: str = "subset", scale: float = 1.0) -> float:
        for site, one, mixture in zip(sites, seen, made[grouping], strict=True):
            site.replace(MoELayer(Told(mixture, one, top_k, labels, scale), [mixture.layer.bank]))
        return evaluate(run.model, run.dataset.val_batches(run.batch_size, MEASURED))["loss"]

    found = {"dense": evaluate(run.model, run.dataset.val_batches(run.batch_size, MEASURED))["loss"]}
    found |= {f"k{k}": loss(top_k=k) for k in (1, 2, 3, 4)}
    choices: dict[str, Callable[[], float]] = {
        "projection": partial(loss, labels="projection"),
        "expert_error": partial(loss, labels="expert_error"),
        "released": partial(loss, labels="expert_error", scale=2.0),
        "random": partial(loss, labels="random"),
        "random n/k": partial(loss, labels="random", scale=2.0),
    }
    found |= {name: measure() for name, measure in choices.items()}
    found |= {f"k1 {name}": loss(name, top_k=1) for name in GROUPINGS if name != "contiguous"}
    return found


def seen_by(run: Run, sites: Sequence[Site], seed: int) -> list[Seen]:
    """Every dense network with its inputs on the training text that calibration reads."""
    steps = max(1, CALIBRATION // (run.batch_size * run.dataset.seq_len))
    batches = [run.dataset.train_batch(i, run.batch_size, seed) for i in range(steps)]
    return [
        Seen(site.network, inputs_of(run.model, site.module, batches, "fp32"), seed * 1000 + site.index)
        for site in sites
    ]


def split(seen: Seen, grouping: Grouping) -> Mixture:
    """4 equal experts; the router is not used."""

    def widths(total: int, importance: Tensor) -> Sequence[int]:
        return equal(N_EXPERTS, total)

    return Split(widths, 1, grouping)(seen)
