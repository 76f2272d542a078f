"""How many parameters a model has, and how many of its experts' tokens did not touch."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.experts import ExpertBank, QuantizedBank
from moestro.routing import Routing, Trace


def total_parameters(model: nn.Module) -> int:
    """How many numbers a model consists of: its parameters, and the tables that experts keep in 8 bits, which are none;
    what several modules share once."""
    banks = [module for module in model.modules() if isinstance(module, QuantizedBank)]
    stored = {codes for bank in banks for codes in bank.stored()}
    return sum(numbers.numel() for numbers in (*model.parameters(), *stored))


def idle_parameters(traces: Sequence[Trace]) -> Float[Tensor, ""] | float:
    """Mean number of expert parameters that a token did not touch, over all banks in the traces; where experts share
    none, an expert's parameter is one multiply-add. A 0-d tensor where the traces are on a device.

    An expert that a token meets in several passes, or with several of its parts, counts once. Rows of one routing of
    whole tokens count each, as the heads of PEER do in its paper.
    """
    met: dict[ExpertBank, list[tuple[Trace, ExpertBank]]] = {}
    for trace in traces:
        for bank in trace.layer.banks():
            met.setdefault(bank.owner()[0], []).append((trace, bank))
    idle: Tensor | float = 0.0
    for owner, meetings in met.items():
        idle = idle + owner.n_parameters() - _touched(owner, meetings)
    return idle


def _touched(owner: ExpertBank, met: Sequence[tuple[Trace, ExpertBank]]) -> Tensor | float:
    """Mean number of the bank's parameters that a token of the model touched."""
    once = len(met) == 1 and met[0][0].origin is None
    pairs = [] if once else [trace.pairs(owner.n_experts, bank.owner()[1]) for trace, bank in met]
    if once or any(pair is None for pair in pairs):
        own = sum((_rows_own(bank, trace.routing) for trace, bank in met), 0.0)
    else:
        expert = _different(torch.cat([pair for pair in pairs if pair is not None]), owner.n_experts)
        each = torch.as_tensor(owner.own_parameters()).to(expert.device)
        own = torch.cat([each.expand(owner.n_experts), each.new_zeros(1)])[expert].sum()
    n_tokens = met[0][0].n_tokens
    return own / max(1, n_tokens) + owner.shared_parameters() * (n_tokens > 0)


def _rows_own(bank: ExpertBank, routing: Routing) -> Tensor | float:
    """Parameters of the experts of all rows, those that experts share left out."""
    each = bank.own_parameters()
    return (routing.load().to(each) * each).sum() if isinstance(each, Tensor) else each * routing.n_rows


def _different(pairs: Tensor, n_experts: int) -> Tensor:
    """The expert of every pair, `n_experts` where the pair was there before: no device is waited for."""
    pairs = pairs.sort().values
    again = torch.cat([pairs.new_zeros(1, dtype=torch.bool), pairs[1:] == pairs[:-1]])[: len(pairs)]
    return (pairs % n_experts).masked_fill(again, n_experts)
