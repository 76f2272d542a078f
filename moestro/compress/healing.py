"""Recovery after compression: low-rank additions to weights (LoRA), or routers taught by the model as it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score

Text = Callable[[int], Batch]


@dataclass(frozen=True)
class Healing:
    """`steps` steps of AdamW at rate `lr`, warmed up and then falling to 0, on batches of text; LoRA of `rank`, scaled
    by `alpha` / rank (Hu 2021, arXiv:2106.09685). MoE-I2 heals by LoRA (arXiv:2411.01016, stage 3), of unknown
    settings: these are ours."""

    steps: int = 100
    lr: float = 1e-3
    rank: int = 16
    alpha: float = 32.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0 or self.rank < 1 or not self.alpha > 0 or not self.clip > 0:
            raise ValueError(f"{self}, allowed: steps and rank from 1, lr, alpha and clip above 0")


class LowRank(nn.Module):
    """W + scale B A, for a matrix or a stack of them; starts as W itself, because B starts at 0."""

    def __init__(self, weight: Float[Tensor, "*e o i"], rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, o, i = weight.shape
        draw = torch.randn(*stack, rank, i, generator=generator) * i**-0.5
        self.a = nn.Parameter(draw.to(weight.device, weight.dtype))
        self.b = nn.Parameter(weight.new_zeros(*stack, o, rank))
        self.scale = scale

    def forward(self, weight: Float[Tensor, "*e o i"]) -> Float[Tensor, "*e o i"]:
        return weight + self.scale * (self.b @ self.a)


def heal_by_lora(model: nn.Module, text: Text, settings: Healing, seed: int = 0) -> list[float]:
    """Train low-rank additions to the matrices of attention and experts, then add them to the weights, in place;
    routers, norms, embeddings and head stay. Returns the loss of every step, nats a token.

    `text` gives the batch of a step. Experts in one tensor are reached as well as linear modules, since additions
    belong to parameters. Those of experts that share one concatenated matrix share A.

    Raises: ValueError where the model has no such matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = list(matrices(model))
    if not chosen:
        raise ValueError("no matrices of attention or experts to add to")
    frozen = _frozen(model)
    for module, name in chosen:
        addition = LowRank(getattr(module, name), settings.rank, settings.alpha / settings.rank, generator)
        parametrize.register_parametrization(module, name, addition)
    additions = [p for key, p in model.named_parameters() if ".parametrizations." in f".{key}" and p.requires_grad]
    try:
        return _train(model, additions, text, settings, lambda batch, output, nats: nats)
    finally:
        for module, name in chosen:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        _restore(model, frozen)


def heal_routers(model: nn.Module, teacher: nn.Module, text: Text, settings: Healing) -> list[float]:
    """Train the routers alone, in place, so that the model's next-token probabilities approach the teacher's: mean KL
    divergence of a token, nats. Returns it for every step.

    Raises: ValueError where the routers have no parameters.
    """
    frozen = _frozen(model)
    layers = model.moe_layers().values()  # type: ignore[operator]
    routers = [p for layer in layers for p in layer.router.parameters()]
    if not routers:
        raise ValueError("the model's routers have no parameters")
    for parameter in routers:
        parameter.requires_grad_()

    def divergence(batch: Batch, output: Any, nats: Tensor) -> Tensor:
        with evaluating(teacher):
            known = score(teacher, batch, "fp32")[0].logits.float().log_softmax(-1)
        mine = output.logits.float().log_softmax(-1)
        return F.kl_div(mine, known, log_target=True, reduction="none").sum(-1)

    try:
        return _train(model, routers, text, settings, divergence)
    finally:
        _restore(model, frozen)


def matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and names of the matrices that LoRA adds to: those of decoder layers, but for routers'."""
    routers = {id(p) for layer in model.moe_layers().values() for p in layer.router.parameters()}  # type: ignore[operator]
    seen: set[int] = set()
    for layer in [*model.decoder_layers(), *model.moe_layers().values()]:  # type: ignore[operator]
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim >= 2 and id(parameter) not in seen | routers and parameter.is_floating_point():
                    seen.add(id(parameter))
                    yield module, name


def _frozen(model: nn.Module) -> Mapping[nn.Parameter, bool]:
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    return before


def _restore(model: nn.Module, before: Mapping[nn.Parameter, bool]) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(before.get(parameter, True))
        parameter.grad = None


def _train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    text: Text,
    settings: Healing,
    loss_of: Callable[[Batch, Any, Tensor], Tensor],
) -> list[float]:
    """The loss of every step, a mean over the tokens that count; the model in the mode it is evaluated in."""
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    warm = max(1, settings.steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (settings.steps - step) / max(1, settings.steps - warm))
    )
    losses = []
    for step in range(settings.steps):
        batch = text(step)
        with torch.enable_grad():
            output, nats = score(model, batch, "fp32")
            values = loss_of(batch, output, nats)
            loss = values[batch.keep.to(values.device)].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
