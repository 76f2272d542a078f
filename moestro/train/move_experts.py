"""`MoveExperts`: experts placed anew where ranks turn out to be unevenly busy."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moestro.evaluate.scoring import exact_dtype
from moestro.experts import MixedBank
from moestro.parallel.expert_parallel import ExpertParallel
from moestro.parallel.moving import move
from moestro.parallel.placement import Greedy, Placement, Strategy, tokens_times_width
from moestro.parallel.sums import summed_over_ranks
from moestro.routing import Trace
from moestro.train.optim import Optimizers
from moestro.train.rules import Rule


class MoveExperts(Rule):
    """Every `every` steps, places the experts that are spread over ranks anew by what they cost since the last time:
    rows times width, summed over all ranks (`placement`, `Greedy` where it is None). Experts and what the optimizer
    knows of them move where that makes the busiest rank's work smaller by `gain` of itself, and stay where not.

    What is computed stays the same, but for the order in which outputs of a token's experts are added up. Alone, or
    where experts are not spread, it does nothing: a recipe is the same for any number of ranks. A run that goes on with
    as many ranks goes on with the placements that it had; with others it begins with those of its settings.

    Raises: ValueError for impossible values.
    """

    def __init__(self, every: int, placement: Strategy | None = None, gain: float = 0.05) -> None:
        if every < 1:
            raise ValueError(f"move experts every={every} steps, allowed: at least 1")
        if not 0 <= gain < 1:
            raise ValueError(f"move experts gain={gain}, allowed: at least 0, below 1")
        self.every, self.strategy, self.gain = every, placement or Greedy(), gain
        self.loads: dict[ExpertParallel, Tensor] = {}
        self.seen: dict[ExpertParallel, Tensor] = {}

    def start(self, model: nn.Module, optimizer: Optimizers) -> None:
        self.optimizer = optimizer
        banks = [module for module in model.modules() if isinstance(module, ExpertParallel)]
        self.loads, self.seen = ({bank: _no_load(bank) for bank in banks} for _ in range(2))

    def observe(self, trace: Trace) -> None:
        """Rows of every expert; of slices and mixtures of banks, those of each bank."""
        for bank, experts, columns in _spread_in(trace.layer.banks()) if self.loads else ():
            self.seen[bank][experts] += trace.routing.load()[columns].to(self.seen[bank])

    @torch.no_grad()
    def apply(self, step: int) -> None:
        for bank, load in self.loads.items():
            load += summed_over_ranks(self.seen[bank])
        self.skip(step)
        if step % self.every:
            return
        for bank, load in self.loads.items():
            self._place(bank, load.tolist())
            load.zero_()

    def skip(self, step: int) -> None:
        for seen in self.seen.values():
            seen.zero_()

    def state_dict(self) -> dict:
        placements = [{"rank": list(bank.placement.rank), "ranks": bank.placement.n_ranks} for bank in self.loads]
        return {"placements": placements, "loads": list(self.loads.values())}

    def load_state_dict(self, state: dict) -> None:
        for (bank, load), saved, then in zip(self.loads.items(), state["loads"], state["placements"], strict=False):
            load.copy_(saved)
            if then["ranks"] == bank.network.size:
                move(bank, Placement(tuple(then["rank"]), then["ranks"]), self.optimizer.state)

    def _place(self, bank: ExpertParallel, load: list[float]) -> None:
        widths = torch.as_tensor(bank.row_widths()).expand(bank.n_experts).tolist()
        work = tokens_times_width(load, widths)
        placement, now = self.strategy(work, widths, bank.network.size), bank.placement
        if max(placement.per_rank(work)) < (1 - self.gain) * max(now.per_rank(work)):
            move(bank, placement, self.optimizer.state)


def _no_load(bank: ExpertParallel) -> Tensor:
    device = next(bank.parameters()).device
    return torch.zeros(bank.n_experts, dtype=exact_dtype(device), device=device)


def _spread_in(banks: Any) -> Iterator[tuple[ExpertParallel, slice, slice]]:
    """The spread banks among a layer's, the experts of each that the layer shows, and their numbers in its routings."""
    for bank in banks:
        parts = bank.ranges() if isinstance(bank, MixedBank) else [(bank, 0, bank.n_experts)]
        for part, first, end in parts:
            whole, shown = part.owner()
            if isinstance(whole, ExpertParallel):
                yield whole, slice(shown, shown + end - first), slice(first, end)
