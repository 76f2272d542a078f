"""Splits into experts of equal and of unequal widths, compared where half of the hidden units are active on average."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bench.effects.conversion import ConvertedJob
from bench.effects.split_probes import MEASURED, seen_by
from moestro.convert.grouping import BalancedKMeans, Contiguous, Grouping, Importance, equal_importance
from moestro.convert.layers import inputs_of
from moestro.convert.mixture import Mixture
from moestro.convert.network import Network
from moestro.convert.routers import expert_outputs
from moestro.convert.run import dense_sites
from moestro.convert.split import Split
from moestro.data import Batch
from moestro.evaluate import evaluate, routing_report
from moestro.experts.widths import arithmetic, equal, geometric, hybrid
from moestro.layers import MoELayer
from moestro.objectives.router_target import subset_errors
from moestro.recipe.evaluation import Run, opened_run
from moestro.routers import Router
from moestro.routing import SparseRouting

N_EXPERTS = 8
# Share of the units of a network that is active, mean over tokens.
ACTIVE, NEARLY = 0.5, 0.005
HALVINGS = 24


def listed(widths: Callable[..., list[int]]) -> Callable[..., list[int]]:
    """Widths that do not look at the units' importance."""
    return lambda n_experts, total, importance: widths(n_experts, total)


SPLITS: Mapping[str, tuple[Callable[..., list[int]], Grouping]] = {
    "equal": (listed(equal), Contiguous()),
    "equal kmeans": (listed(equal), BalancedKMeans(on="activations")),
    "equal by importance": (listed(equal), Importance()),
    "equal_importance": (equal_importance, Importance()),
    "arithmetic": (listed(arithmetic), Importance()),
    "hybrid": (listed(hybrid), Importance()),
    "geometric": (listed(geometric), Importance()),
}


class Priced(Router):
    """Chooses, of all sets of experts, the one of least squared error and price for its units, by the experts' outputs
    on the very token, which no real router knows; at the price at which half of the units are active on x. Gates are
    1."""

    @torch.no_grad()
    def __init__(self, made: Mixture, network: Network, x: Float[Tensor, "t d"]) -> None:
        super().__init__()
        self.made, self.network = (made,), network
        self.n_experts = made.layer.bank.n_experts
        self.units = torch.as_tensor(made.node["branches"][0]["widths"]).float()
        sets, errors = self.choices(x)
        self.price = balanced_price(lambda price: self.cheapest(sets, errors, price), self.units)

    def choices(self, x: Float[Tensor, "t d"]) -> tuple[Bool[Tensor, "c e"], Float[Tensor, "t c"]]:
        """All sets of experts, and what each leaves of the dense output of each token, squared."""
        outputs, wanted = expert_outputs(self.made[0].layer, x), self.network(x)
        found = [subset_errors(outputs, wanted, k) for k in range(1, self.n_experts + 1)]
        return torch.cat([some for some, _ in found]), torch.cat([error for _, error in found], dim=1)

    def cheapest(self, sets: Bool[Tensor, "c e"], errors: Float[Tensor, "t c"], price: float) -> Bool[Tensor, "t e"]:
        """The experts of each token at this price for a unit."""
        return sets[(errors + price * (sets.float() @ self.units)).argmin(1)]

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "t d"]) -> SparseRouting:
        token, expert = self.cheapest(*self.choices(x), self.price).nonzero().unbind(1)
        return SparseRouting(token, expert, torch.ones(len(token)), len(x), self.n_experts)

    def flops(self, n_tokens: int) -> float:
        """None: it is told."""
        return 0.0


@torch.no_grad()
def balanced_price(choose: Callable[[float], Bool[Tensor, "t e"]], units: Float[Tensor, "e"]) -> float:
    """The price of a unit at which half of the units are active on average, as nearly as the tokens allow; none where
    they are without one: widths that differ by a unit would need great prices for nothing."""

    def active(price: float) -> float:
        return float((choose(price).float() @ units).mean() / units.sum())

    if abs(active(0.0) - ACTIVE) <= NEARLY:
        return 0.0
    far = 1.0
    while active(far) > ACTIVE or active(-far) < ACTIVE:
        far *= 4
        if far > 1e12:
            break
    low, high = -far, far
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if active(middle) > ACTIVE else (low, middle)
    return high


def widths(job: ConvertedJob) -> dict[str, dict[str, float]]:
    """Of every split: held-out `loss` of the dense source, nats a token, and the share of `active` units, where the
    best experts are chosen at a price that makes half of the units active."""
    run = opened_run(job.source)
    sites = dense_sites(run.model, None)
    seen = seen_by(run, sites, job.seed)
    found = {}
    for name, (rule, grouping) in SPLITS.items():
        for site in sites:
            site.replace(site.module)
        for site, one in zip(sites, seen, strict=True):
            made = Split(told(rule), 1, grouping)(one)
            x = inputs_of(run.model, site.module, measured(run), "fp32")
            site.replace(MoELayer(Priced(made, site.network, x), [made.layer.bank]))
        found[name] = figures(run)
    return found


def told(rule: Callable[..., list[int]]) -> Callable[..., Sequence[int]]:
    """A rule for widths as `Split` calls it."""
    return lambda total, importance: rule(N_EXPERTS, total=total, importance=importance)


def measured(run: Run) -> Iterator[Batch]:
    """The held-out text on which losses are measured and prices found."""
    return run.dataset.val_batches(run.batch_size, MEASURED)


def figures(run: Run) -> dict[str, float]:
    """Held-out `loss` and the share of `active` units of its mixtures, mean over layers."""
    loss = evaluate(run.model, measured(run), precision=run.precision)["loss"]
    report = routing_report(run.model, measured(run), precision=run.precision)
    shares = [layer["active_width"]["mean"] / sum(layer["widths"]) for layer in report.values()]
    return {"loss": loss, "active": sum(shares) / len(shares)}


def routed(job: ConvertedJob) -> dict[str, dict[str, float]]:
    """Of a trained split: `as_trained`, and at `half` of the units, once every router's bias has a price for a unit."""
    run = opened_run(job.folder)
    found = {"as_trained": figures(run)}
    for layer in run.model.moe_layers().values():
        charge(layer, inputs_of(run.model, layer, measured(run), run.precision))
    return {**found, "half": figures(run)}


@torch.no_grad()
def charge(layer: MoELayer, x: Float[Tensor, "t d"]) -> None:
    """Lower each expert's logit by a price for its units, so that half of them are active on x; as many experts are
    chosen as before. Experts of equal widths are chosen as before."""
    router: Any = layer.router
    units = torch.as_tensor(layer.expert_widths()).float().expand(router.n_experts)
    logits = router.score(x).float()

    def chosen(price: float) -> Bool[Tensor, "t e"]:
        best = (logits - price * units / units.mean()).topk(router.select.top_k).indices
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True)

    router.score.bias -= balanced_price(chosen, units) * units / units.mean()
