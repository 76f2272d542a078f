"""Experts moved between ranks, with whatever an optimizer knows of them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moestro.experts import ExpertBank
from moestro.parallel.expert_parallel import ExpertParallel, rows_of
from moestro.parallel.placement import Placement


@torch.no_grad()
def move(bank: ExpertParallel, placement: Placement, state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Let every expert of `bank` lie where `placement` says: its weights go there, and of `state` (an optimizer's:
    {parameter: {entry: tensor}}) its rows of every entry that has as many as the parameter. Not a bit of either
    changes, and no random number is drawn. Parameters stay the same objects, of other sizes; gradients are forgotten.

    Every rank must call it between steps, with the same placement.
    """
    old = dict(bank.own.named_parameters())
    own = _empty(bank, placement)
    for name, new in list(own.named_parameters()):
        parameter, old_rows = old[name], len(old[name])
        of_rows = {entry: v for entry, v in state.get(parameter, {}).items() if _has_rows(v, old_rows)}
        moved = {entry: _moved(bank, name, own, placement, value) for entry, value in of_rows.items()}
        parameter.grad, data = None, _moved(bank, name, own, placement, parameter.data)
        parameter.data = data.view(new.shape)
        state.get(parameter, {}).update(moved)
        module, _, last = name.rpartition(".")
        own.get_submodule(module)._parameters[last] = parameter
    bank.hold_as(own, placement)


def _has_rows(value: Any, n_rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n_rows


def _empty(bank: ExpertParallel, placement: Placement) -> ExpertBank:
    """The bank of the experts that this rank will have, without numbers."""
    own = copy.deepcopy(bank.whole)
    with torch.random.fork_rng(devices=[]):
        own.reindex(torch.tensor(placement.experts[bank.network.rank]))
    return own


def _moved(bank: ExpertParallel, name: str, own: ExpertBank, placement: Placement, value: Tensor) -> Tensor:
    """The rows of this rank's next experts, in their order, of a tensor that is laid out as the parameter `name`."""
    before, network = bank.placement, bank.network
    mine = enumerate(before.experts[network.rank])
    parts = {expert: value[rows_of(bank.own, name, number)] for number, expert in mine}
    leaving = sorted(parts, key=lambda expert: (placement.rank[expert], expert))
    sent = torch.zeros(network.size, 1, dtype=torch.int64, device=value.device)
    for expert, rows in parts.items():
        sent[placement.rank[expert]] += len(rows)
    (exchange,) = network.exchanges(sent)
    arrived = exchange.begin(torch.cat([parts[expert] for expert in leaving]))()
    coming = sorted(placement.experts[network.rank], key=lambda expert: (before.rank[expert], expert))
    sizes = [_length(bank.whole, name, expert) for expert in coming]
    here = dict(zip(coming, arrived.split(sizes), strict=True))
    return torch.cat([here[expert] for expert in placement.experts[network.rank]])


def _length(whole: ExpertBank, name: str, expert: int) -> int:
    rows = rows_of(whole, name, expert)
    return rows.stop - rows.start
