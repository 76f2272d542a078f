"""Experts and tables that ranks hold for each other."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moestro.experts import BankSlice, ExpertBank, MixedBank, TableBank
from moestro.parallel.collectives import summed
from moestro.parallel.exchange import Network, TwoLevelNetwork
from moestro.parallel.expert_parallel import ExpertParallel
from moestro.parallel.placement import Greedy, Strategy
from moestro.parallel.ranks import COPIES, EXPERTS, Ranks, waiting_time
from moestro.parallel.row_tables import ColumnParallel, RowParallel
from moestro.parallel.settings import ParallelSettings
from moestro.routers.query_norm import BatchQueryNorm


def distribute_experts(model: nn.Module, ranks: Ranks, settings: ParallelSettings) -> None:
    """Put in place of banks of experts those that hold a rank's own experts or its part of a table; `lay_out` tells of
    each such parameter where it lies in the whole one, under the name that it has in one process.

    Tables that train by rows are spread over all ranks, by rows or by columns as `settings.tables` says. With
    `settings.experts` above 1 every other bank is spread over so many ranks, as `settings.placement` says of widths
    (`Greedy` where it is None). In a mixed bank, experts of width 0 stay on every rank: what costs nothing needs no
    journey (Jin 2024, MoE++, arXiv:2410.07348, section 3.4). Queries are normalised over the batch of all ranks.

    Raises: ValueError where a bank cannot be spread, naming it.
    """
    if settings.placement is not None and settings.experts == 1:
        raise ValueError("parallel placement= says where experts lie; allowed: with experts above 1")
    for norm in (module for module in model.modules() if isinstance(module, BatchQueryNorm)):
        norm.together = summed
    if not (ways := _ways(model, settings)):
        return
    network = network_of_experts(ranks, settings) if settings.experts > 1 else None
    spread = {bank: _spread(name, bank, ranks, settings, network) for name, bank in ways.items()}
    _put_in_place(model, spread)


def _ways(model: nn.Module, settings: ParallelSettings) -> dict[str, ExpertBank]:
    """The banks to spread, each under the first of its names."""
    found: dict[str, ExpertBank] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, ExpertBank) or isinstance(module, BankSlice) or id(module) in inside:
            continue
        if isinstance(module, MixedBank):
            costless = [bank for bank in module.banks if not isinstance(bank, TableBank) and not _widths(bank).any()]
            inside.update(id(bank) for bank in costless)
        elif module.row_parameters() or settings.experts > 1:
            found[name] = module
            inside.update(id(part) for part in module.modules())
    return found


def _spread(
    name: str, bank: ExpertBank, ranks: Ranks, settings: ParallelSettings, network: Network | None
) -> ExpertBank:
    try:
        if isinstance(bank, TableBank) and bank.row_parameters():
            return RowParallel(bank, Network()) if settings.tables == "rows" else ColumnParallel(bank)
        if network is None or ranks.experts is None:
            raise ValueError(f"{type(bank).__name__} trains by rows, and is no table that can be spread over ranks")
        copies = ranks.experts.get_group(COPIES) if settings.experts < ranks.world else None
        if isinstance(bank, TableBank):
            return RowParallel(bank, network, copies)
        widths = _widths(bank).tolist()
        place: Strategy = settings.placement or Greedy()
        return ExpertParallel(bank, place(widths, widths, settings.experts), network, copies)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _put_in_place(model: nn.Module, spread: dict[ExpertBank, ExpertBank]) -> None:
    """Let every module that has a bank as a part, or shows some of its experts, have its spread one."""
    by_id = {id(bank): new for bank, new in spread.items()}
    inside = {id(part) for new in spread.values() for part in new.modules()}
    for module in [module for module in model.modules() if id(module) not in inside]:
        for name, part in list(module.named_children()):
            if id(part) in by_id:
                module.register_module(name, by_id[id(part)])
        if isinstance(module, BankSlice) and (new := by_id.get(id(module.shown))) is not None:
            module.show(new)


def _widths(bank: Any) -> Tensor:
    """Hidden units of every expert."""
    widths = bank.row_widths()
    return widths.cpu() if isinstance(widths, Tensor) else torch.full((bank.n_experts,), widths, dtype=torch.float64)


def network_of_experts(ranks: Ranks, settings: ParallelSettings) -> Network:
    """How ranks that hold experts together exchange rows: by way of their hosts where they are whole hosts of several
    ranks (`LOCAL_WORLD_SIZE` of the launcher) and all hosts have as many, else each with each. Every rank must call
    it."""
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks.experts is None:
        raise ValueError(f"parallel experts={settings.experts} needs several ranks")
    # all ranks have to decide alike: groups are made by all
    uneven = ranks.any(per_host != ranks.told(per_host))
    apart = per_host == 1 or settings.experts <= per_host or settings.experts % per_host or ranks.world % per_host
    if uneven or apart:
        return Network(ranks.experts.get_group(EXPERTS))
    return two_level(ranks.world, settings.experts, per_host, timeout=waiting_time(settings))


def two_level(world: int, together: int, per_host: int, **options: Any) -> TwoLevelNetwork:
    """The network of `together` consecutive ranks, of which `per_host` consecutive ones share a host. Every rank of the
    world must call it."""
    numbers = torch.arange(world).view(-1, together // per_host, per_host)
    inside = numbers.flatten(0, 1).tolist()
    hosts = numbers.transpose(1, 2).flatten(0, 1).tolist()
    groups = [dist.new_subgroups_by_enumeration(members, **options)[0] for members in (hosts, inside)]
    return TwoLevelNetwork(*groups)
