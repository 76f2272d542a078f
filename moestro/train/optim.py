"""AdamW over parameter groups, and clipping by the global norm."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moestro.train.settings import OptimSettings, ParameterGroup

# Where torch.optim.AdamW has one fused kernel for all parameters.
FUSED_DEVICES = frozenset({"cpu", "cuda"})


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, fused where the device has it."""
    groups = parameter_groups(model, settings)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=devices <= FUSED_DEVICES
    )


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict]:
    """Trainable parameters by (learning-rate scale, weight decay), each parameter once, also where it is tied.

    Norms, biases and everything else of fewer than two dimensions do not decay, nor do embeddings (tied heads with
    them). A `settings.groups` pattern overrides both numbers for the parameters whose name it matches.

    Raises: ValueError where a pattern matches nothing, or nothing is trainable.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    unused = {group.pattern for group in settings.groups}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim < 2 or id(parameter) in embeddings else settings.weight_decay
        special = first_match(settings.groups, name)
        scale = 1.0
        if special is not None:
            unused.discard(special.pattern)
            scale = special.lr_scale
            decay = decay if special.weight_decay is None else special.weight_decay
        groups.setdefault((scale, decay), []).append(parameter)
    if unused:
        names = ", ".join(name for name, _ in model.named_parameters())
        raise ValueError(f"optim groups pattern={sorted(unused)[0]!r} matches no parameter; there are: {names}")
    if not groups:
        raise ValueError(f"{type(model).__name__} has no trainable parameters")
    return [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]


def first_match(groups: Iterable[ParameterGroup], name: str) -> ParameterGroup | None:
    """The first group whose pattern is found in the parameter's name."""
    return next((group for group in groups if re.search(group.pattern, name)), None)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(model: nn.Module, clip: float | None) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most `clip`; returns the norm before, on the device."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm
