"""AdamW over parameter groups, row by row where gradients are sparse, and clipping by the global norm."""

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from moestro.ops.row_gradients import collect_factors, pending_factors, row_gradient
from moestro.parallel.gradients import common_norm
from moestro.parallel.layout import is_sharded, local, own_layout, write_rows
from moestro.parallel.ranks import Ranks
from moestro.train.row_adamw import RowAdamW
from moestro.train.settings import OptimSettings, ParameterGroup
from moestro.train.tables import named_tensors, quantized_tables, row_tables

# Where torch.optim.AdamW has one fused kernel for all parameters.
FUSED_DEVICES = frozenset({"cpu", "cuda"})
MOMENTS = frozenset({"exp_avg", "exp_avg_sq"})


class Optimizers:
    """Several optimizers as one; every parameter belongs to one of them."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all parts; a change to one is a change to its part."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """{parameter: {entry: tensor}} of all parts."""
        return {parameter: entries for part in self.parts for parameter, entries in part.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of every part."""
        for part in self.parts:
            part.step()

    @torch.no_grad()
    def reset_rows(self, parameter: nn.Parameter, rows: slice | int) -> None:
        """Forget what was learned about these rows (first dimension): their moments are 0 again. The number of steps
        in AdamW's bias corrections is the whole parameter's and stays."""
        for part in self.parts:
            if isinstance(part, RowAdamW):
                part.reset_rows(parameter, rows)
                continue
            entries = part.state.get(parameter, {})
            for name in MOMENTS & entries.keys():
                write_rows(entries[name], rows, 0.0, own_layout(parameter))


def build_optimizer(model: nn.Module, settings: OptimSettings) -> Optimizers:
    """AdamW over `parameter_groups`, fused where the device has it, and `RowAdamW` for the parameters that banks of
    experts name as having sparse gradients.

    Raises: ValueError where `settings.fused_rows` is asked for and there are no such parameters, or is not and some are
    in 8 bits.
    """
    groups = parameter_groups(model, settings)
    tables, codes = row_tables(model), quantized_tables(model)
    if codes and not settings.fused_rows:
        raise ValueError("optim fused_rows=False: tables in 8 bits have no gradients but in factors, allowed: True")
    rows = {id(parameter) for parameter in tables}
    shared = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    parts: list[torch.optim.Optimizer] = []
    if dense := [half for g in groups for half in by_kind(part_of(g, rows, False)) if half["params"]]:
        devices = {parameter.device.type for group in dense for parameter in group["params"]}
        parts.append(torch.optim.AdamW(dense, **shared, fused=devices <= FUSED_DEVICES))
    if sparse := [group for group in (part_of(g, rows, True) for g in groups) if group["params"]]:
        parts.append(RowAdamW(sparse, **shared, skipped=settings.skipped_rows, quantized=codes))
    if settings.fused_rows:
        if not tables:
            raise ValueError("optim fused_rows=True: no bank trains by rows (sparse_gradients: true)")
        collect_factors(tables)
    return Optimizers(parts)


def part_of(group: dict, rows: set[int], inside: bool) -> dict:
    """A group with only those parameters that are among `rows` (by id), or only those that are not."""
    return {**group, "params": [parameter for parameter in group["params"] if (id(parameter) in rows) is inside]}


def by_kind(group: dict) -> tuple[dict, dict]:
    """A group's parameters that are sharded over ranks, and the others: one kernel takes tensors of one kind."""
    kinds = [[p for p in group["params"] if is_sharded(p) is sharded] for sharded in (True, False)]
    return {**group, "params": kinds[0]}, {**group, "params": kinds[1]}


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict]:
    """Trainable parameters by (learning-rate scale, weight decay), each parameter once, also where it is tied.

    Norms, biases (those of several experts in one tensor, too) and everything else of fewer than two dimensions do not
    decay, nor do embeddings (tied heads with them). A `settings.groups` pattern overrides both numbers for the
    parameters whose name it matches.

    Raises: ValueError where a pattern matches nothing, or nothing is trainable.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    unused = {group.pattern for group in settings.groups}
    for name, parameter in named_tensors(model).items():
        if isinstance(parameter, nn.Parameter) and not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or name.endswith("bias") or id(parameter) in embeddings
        decay = 0.0 if spared else settings.weight_decay
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


def set_learning_rate(optimizer: Optimizers, lr: float) -> None:
    """Give each group `lr` times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def clip_gradients(model: nn.Module, clip: float | None, ranks: Ranks | None = None) -> Tensor:
    """Scale all gradients, rows of sparse ones and factors included, so that their joint 2-norm, over all ranks, is at
    most `clip`; returns the norm before, on the device."""
    parameters = list(named_tensors(model).values())
    sparse = [p for p in parameters if pending_factors(p) or (p.grad is not None and p.grad.is_sparse)]
    tables = [(p, gradient) for p in sparse if (gradient := row_gradient(p)) is not None]
    dense = [p for p in parameters if p.grad is not None and not p.grad.is_sparse]
    gradients = [local(p.grad) for p in dense if p.grad is not None]
    if ranks is not None and ranks.several:
        norm = common_norm(dense, [(p, gradient.norm()) for p, gradient in tables], ranks)
    else:
        norm = torch.nn.utils.get_total_norm(gradients + [gradient.norm() for _, gradient in tables])
    if clip is not None:
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)
        if gradients:
            torch._foreach_mul_(gradients, scale)  # type: ignore[attr-defined]
        # torch would copy the values of a sparse gradient; here they are scaled where they lie
        for _, gradient in tables:
            gradient.scale_(scale)
    return norm
