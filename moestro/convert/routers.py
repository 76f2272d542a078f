"""The router of a converted layer: how it starts, what it is taught before any training of the model, its scale."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moestro.convert.mixture import Mixture
from moestro.convert.seen import PIECE, Seen
from moestro.evaluate.perplexity import evaluating
from moestro.layers import MoELayer
from moestro.objectives.router_target import LABELS, LabelKind, label_experts, router_target_loss, target_distribution
from moestro.routers import TopK
from moestro.routing import SparseRouting

Start = Literal["random", "zero", "probe"]
STARTS = ("random", "zero", "probe")
# Ridge of the probe, as a share of the mean square of an input feature.
RIDGE = 1e-3


@dataclass(frozen=True)
class RouterSettings:
    """How routers of experts that differ begin. `start`: `random` rows, `zero`, or `probe`, the linear map that comes
    nearest to the labels by least squares. Then `steps` of Adam on the router alone (prior-approximate training, Zhao
    2024, FactorLLM, arXiv:2408.11855): KL from the labels to the router's probabilities, on `batch_tokens` calibration
    tokens a step. `labels` as in `label_experts`, of what the frozen dense network makes of the same inputs."""

    start: Start = "random"
    labels: LabelKind = "subset"
    steps: int = 0
    lr: float = 0.01
    batch_tokens: int = 512
    literal: bool = False

    def __post_init__(self) -> None:
        for name, allowed in {"start": STARTS, "labels": tuple(LABELS)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}, allowed: {', '.join(allowed)}")
        if self.steps < 0 or self.batch_tokens < 1 or not self.lr > 0:
            raise ValueError(
                f"steps={self.steps}, batch_tokens={self.batch_tokens}, lr={self.lr}, allowed: at least 0, at least 1, "
                "above 0"
            )

    @property
    def needs_labels(self) -> bool:
        return self.start == "probe" or self.steps > 0


@torch.no_grad()
def expert_outputs(layer: MoELayer, x: Float[Tensor, "t d"]) -> Float[Tensor, "t e d"]:
    """E_i(x) of every expert on every token."""
    n_experts, n_tokens = layer.bank.n_experts, len(x)
    offsets = torch.arange(n_experts + 1, device=x.device) * n_tokens
    return layer.bank.run(x.repeat(n_experts, 1), offsets).view(n_experts, n_tokens, -1).transpose(0, 1)


@torch.no_grad()
def wanted_sum(layer: MoELayer, seen: Seen, x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
    """What the experts of each token should add up to: the dense output less the branches that every token takes."""
    y = seen.network(x)
    for branch in layer.branches:
        if branch is not layer.bank:
            y = y - branch(x, None)
    return y


@torch.no_grad()
def labels_of(mixture: Mixture, seen: Seen, kind: LabelKind) -> Bool[Tensor, "t e"]:
    """The experts that each calibration token should choose."""
    select: Any = mixture.layer.router.select
    found = []
    for x in seen.x.split(PIECE):
        outputs, target = expert_outputs(mixture.layer, x), wanted_sum(mixture.layer, seen, x)
        found.append(label_experts(outputs, target, select.top_k, kind, getattr(select, "scale", 1.0)))
    return torch.cat(found)


def teach_router(mixture: Mixture, seen: Seen, settings: RouterSettings) -> dict[str, float]:
    """Start the router and train it; experts stay as they are. Returns the share of labelled experts that it chooses:
    `agreement_start` and `agreement`, where there are labels. k / n is what chance gives.

    Raises: ValueError where labels are asked for and there are too many sets of experts.
    """
    begin_router(mixture, seen, settings)
    if not settings.needs_labels:
        return {}
    chosen = labels_of(mixture, seen, settings.labels)
    router = mixture.layer.router
    if settings.start == "probe":
        probe(router.score, seen.x, chosen)
    figures = {"agreement_start": agreement(router, seen, chosen)}
    if settings.steps:
        train_router(router, seen, chosen, settings)
    return {**figures, "agreement": agreement(router, seen, chosen)}


@torch.no_grad()
def begin_router(mixture: Mixture, seen: Seen, settings: RouterSettings) -> None:
    """Random rows from the conversion's seed, or zeros; experts of one copy keep one row."""
    score: Any = mixture.layer.router.score
    groups = router_groups(mixture)
    rows = torch.randn(int(groups.max()) + 1, score.weight.shape[1], generator=seen.generator()) * score.init_std
    rows = rows if settings.start == "random" else torch.zeros_like(rows)
    score.weight.copy_(rows[groups])
    score.bias.zero_()


def router_groups(mixture: Mixture) -> Tensor:
    """The virtual group of every expert; each its own where there are none."""
    return torch.arange(mixture.layer.router.n_experts) // mixture.parts


@torch.no_grad()
def probe(score: Any, x: Float[Tensor, "t d"], chosen: Bool[Tensor, "t e"]) -> None:
    """Least squares from the input to the labels, less their mean, with a small ridge."""
    inputs = x.double()
    wanted = chosen.double() - chosen.double().mean(0)
    centre = inputs.mean(0)
    inputs = inputs - centre
    gram = inputs.T @ inputs
    gram += RIDGE * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, inputs.T @ wanted).T
    score.weight.copy_(weight)
    score.bias.copy_(chosen.double().mean(0) - weight @ centre)


def train_router(router: Any, seen: Seen, chosen: Bool[Tensor, "t e"], settings: RouterSettings) -> None:
    """`settings.steps` steps of Adam on the router's parameters; nothing else gets a gradient."""
    wanted, generator = target_distribution(chosen), seen.generator()
    optimizer = torch.optim.Adam(router.score.parameters(), lr=settings.lr)
    for step in range(settings.steps):
        # a cosine, so that the last steps settle
        share = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / settings.steps)))
        optimizer.param_groups[0]["lr"] = settings.lr * float(share)
        some = torch.randint(len(seen.x), (settings.batch_tokens,), generator=generator).to(seen.x.device)
        loss = router_target_loss(router.score(seen.x[some]), wanted[some], settings.literal)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def agreement(router: Any, seen: Seen, chosen: Bool[Tensor, "t e"]) -> float:
    """Share of the labelled experts among those that the router chooses."""
    hits = 0
    with evaluating(router):
        for x, label in zip(seen.x.split(PIECE), chosen.split(PIECE), strict=True):
            hits += int(label.gather(1, router(x).matrix()[0]).sum())
    return hits / max(1, int(chosen.sum()))


@torch.no_grad()
def fitted_scale(mixture: Mixture, seen: Seen) -> float:
    """<T, Y> / <Y, Y> over the calibration tokens: T what the experts should add up to, Y what the chosen ones do at
    scale 1.

    Raises: ValueError where that is not above 0.
    """
    layer, along, size = mixture.layer, 0.0, 0.0
    scale = getattr(layer.router.select, "scale", 1.0)
    with evaluating(layer):
        for x in seen.x.split(PIECE):
            y = layer.bank(x, layer.router(x)).double() / scale
            along += float((wanted_sum(layer, seen, x).double() * y).sum())
            size += float(y.square().sum())
    if not along > 0:
        raise ValueError(f"scale='fit': the chosen experts point away from the dense output (<T, Y> = {along:.3g})")
    return along / size


def set_scale(mixture: Mixture, scale: float) -> None:
    """In the layer and in its recipe."""
    select: Any = mixture.layer.router.select
    select.scale = scale
    mixture.node["router"]["select"]["scale"] = scale


class EveryExpert(TopK):
    """All experts with gates of 1, whatever the logits: the selection under which a split network is whole."""

    def __init__(self) -> None:
        super().__init__(top_k=1)

    def forward(self, logits: Float[Tensor, "t e"]) -> SparseRouting:
        t, e = logits.shape
        expert = torch.arange(e, device=logits.device).expand(t, e)
        return SparseRouting.from_topk(expert.contiguous(), torch.ones_like(logits), e, logits)
