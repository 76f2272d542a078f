"""A model over several ranks: the one place that decides how each of its parts is spread."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from moestro.parallel.distribute import distribute_experts
from moestro.parallel.layout import own_layout
from moestro.parallel.ranks import Ranks
from moestro.parallel.settings import ParallelSettings
from moestro.routers import Router


def parallelize(
    model: Any, ranks: Ranks, settings: ParallelSettings, precision: str = "fp32", compiled: bool = False
) -> None:
    """Spread a model, which every rank built alike, over all of them, in place. Alone it stays as it is.

    First `distribute_experts` gives each rank its experts and its part of tables. Every other parameter becomes a
    DTensor (FSDP2): those of a block, or of blocks that share parameters, are gathered together before its forward
    pass, with bf16 in bfloat16; those of a router in its own precision, and until the end of backward, because
    objectives read them; embedding, last norm and head with the first block. Gradients are summed, never averaged, in
    float32. Scalars are whole on every rank: `sum_gradients` sums theirs, and those of experts with copies. With
    `compiled` torch compiles every block by itself.

    Raises: ValueError where the model cannot be spread so.
    """
    if not ranks.several:
        return
    # nothing here changes a block's output in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    distribute_experts(model, ranks, settings)
    apart = {parameter for parameter in model.parameters() if is_apart(parameter)}
    for parameter in apart:
        parameter.data = parameter.data.to(ranks.device)
    narrow = precision == "bf16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if narrow else None
    shared: dict[str, Any] = {"mesh": ranks.shards, "ignored_params": apart}
    lowered = {**shared, "mp_policy": policy} if policy is not None else shared
    if compiled:
        for block in model.decoder_layers():
            block.compile()
    for router in outermost(model, Router):
        fully_shard(router, **shared, reshard_after_forward=False)
    for blocks in blocks_that_share(model.decoder_layers()):
        fully_shard(blocks, **lowered, reshard_after_forward=settings.reshard)
    fully_shard(model, **lowered, reshard_after_forward=False)
    for module in sharded_modules(model):
        # a sum on every backend: gloo knows no product before the sum
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def is_apart(parameter: nn.Parameter) -> bool:
    """Whether FSDP leaves a parameter alone: it is one rank's own already, or a single number."""
    return parameter.ndim == 0 or own_layout(parameter) is not None


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that gather their parameters, the model first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def outermost(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """Modules of a kind that have parameters and lie in no other of that kind, each once."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, kind) and id(module) not in inside and any(True for _ in module.parameters()):
            found.append(module)
            inside.update(id(child) for child in module.modules())
    return found


def blocks_that_share(blocks: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Blocks in order, those with a parameter in common together."""
    groups: list[tuple[list[nn.Module], set[int]]] = []
    for block in blocks:
        own = {id(parameter) for parameter in block.parameters()}
        joint = [group for group in groups if group[1] & own]
        groups = [group for group in groups if not group[1] & own]
        members = [module for group in joint for module in group[0]]
        groups.append(([*members, block], own.union(*(group[1] for group in joint))))
    return [members for members, _ in groups]
