"""Recovery after compression: low-rank additions to weights (LoRA), or routers taught by the model as it was."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moestro.compress.healing_steps import Text, steps_done
from moestro.data import Batch
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score


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
        for name in ("steps", "rank"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}, allowed: whole numbers from 1")
        for name in ("lr", "alpha", "clip"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r}, allowed: numbers above 0")


class Addition(nn.Module):
    """W + what was learned, which starts at 0 and is kept in float32 at least, so that steps smaller than the last bit
    of a narrow W add up."""

    def __init__(self, weight: Float[Tensor, "*_"]) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.zeros_like(weight, dtype=wide(weight)))

    def forward(self, weight: Float[Tensor, "*_"]) -> Float[Tensor, "*_"]:
        return (weight + self.learned).to(weight.dtype)


class LowRank(nn.Module):
    """W + scale B A, for a matrix or a stack of them; starts as W itself, because B starts at 0. A and B are kept in
    float32 at least."""

    def __init__(self, weight: Float[Tensor, "*e o i"], rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, o, i = weight.shape
        draw = torch.randn(*stack, rank, i, generator=generator) * i**-0.5
        self.a = nn.Parameter(draw.to(weight.device, wide(weight)))
        self.b = nn.Parameter(weight.new_zeros(*stack, o, rank, dtype=wide(weight)))
        self.scale = scale

    def forward(self, weight: Float[Tensor, "*e o i"]) -> Float[Tensor, "*e o i"]:
        return (weight + self.scale * (self.b @ self.a)).to(weight.dtype)


def wide(weight: Tensor) -> torch.dtype:
    """The dtype in which something is learned for a tensor: its own, float32 at least."""
    return torch.promote_types(weight.dtype, torch.float32)


def heal_by_lora(
    model: nn.Module, text: Text, settings: Healing, seed: int = 0, keep: Path | None = None
) -> list[float]:
    """Train low-rank additions to the matrices of attention and experts, then add them to the weights, in place;
    routers, norms, embeddings and head stay. Returns the loss of every step, nats a token.

    `text` gives the batch of a step. Experts in one tensor are reached as well as linear modules, since additions
    belong to parameters. Those of experts that share one concatenated matrix share A. With `keep`, a file, an
    interrupted call continues in the next one.

    Raises: ValueError where the model has no such matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = list(matrices(model))
    if not chosen:
        raise ValueError("no matrices of attention or experts to add to")
    scale = settings.alpha / settings.rank
    made = [LowRank(getattr(module, name), settings.rank, scale, generator) for module, name in chosen]
    return _learned(model, chosen, made, text, settings, lambda batch, output, nats: nats, keep)


def heal_routers(
    model: nn.Module, teacher: nn.Module, text: Text, settings: Healing, keep: Path | None = None
) -> list[float]:
    """Train the routers alone, in place, so that the model's next-token probabilities approach the teacher's: mean KL
    divergence of a token, nats. Returns it for every step; `keep` as for `heal_by_lora`.

    Raises: ValueError where the routers have no parameters.
    """
    chosen = [(module, name) for router in routers_of(model) for module in router.modules() for name in _own(module)]
    if not chosen:
        raise ValueError("the model's routers have no parameters")

    def divergence(batch: Batch, output: Any, nats: Tensor) -> Tensor:
        with evaluating(teacher):
            known = score(teacher, batch, "fp32")[0].logits.float().log_softmax(-1)
        mine = output.logits.float().log_softmax(-1)
        return F.kl_div(mine, known, log_target=True, reduction="none").sum(-1)

    made = [Addition(getattr(module, name)) for module, name in chosen]
    return _learned(model, chosen, made, text, settings, divergence, keep)


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that score experts: as the model says, or those of its mixture layers."""
    if (said := getattr(model, "routers", None)) is not None:
        return said()
    return [layer.router for layer in model.moe_layers().values()]  # type: ignore[operator]


def matrices(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and names of the matrices that LoRA adds to: those of decoder layers, but for routers'."""
    seen = {id(p) for router in routers_of(model) for p in router.parameters()}
    mixtures = getattr(model, "moe_layers", dict)()
    for layer in [*model.decoder_layers(), *mixtures.values()]:  # type: ignore[operator]
        for module in layer.modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_matrix = parameter.ndim >= 2 and not name.endswith("bias") and parameter.is_floating_point()
                if is_matrix and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield module, name


def _own(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.is_floating_point()]


def _learned(
    model: nn.Module,
    chosen: list[tuple[nn.Module, str]],
    additions: Sequence[nn.Module],
    text: Text,
    settings: Healing,
    loss_of: Any,
    keep: Path | None,
) -> list[float]:
    """Train what is added to the chosen tensors and nothing else, then add it to them."""
    frozen = _frozen(model)
    for (module, name), addition in zip(chosen, additions, strict=True):
        parametrize.register_parametrization(module, name, addition)
    learned = [parameter for addition in additions for parameter in addition.parameters()]
    try:
        return steps_done(model, learned, text, settings, loss_of, keep)
    finally:
        for module, name in chosen:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        _restore(model, frozen)


def _frozen(model: nn.Module) -> Mapping[nn.Parameter, bool]:
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    return before


def _restore(model: nn.Module, before: Mapping[nn.Parameter, bool]) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(before.get(parameter, True))
        parameter.grad = None
