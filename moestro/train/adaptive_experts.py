"""`AdaptiveExperts`: experts that no token uses leave the pool, tokens that no expert serves bring one in."""

import copy
import hashlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moestro.evaluate.scoring import exact_dtype
from moestro.experts import ExpertBank
from moestro.layers import MoELayer
from moestro.parallel.layout import is_sharded, whole, write_rows
from moestro.parallel.spread_bank import SpreadBank
from moestro.parallel.sums import summed_over_ranks
from moestro.routers import ScoredRouter, TopAny
from moestro.routing import Trace
from moestro.train.optim import Optimizers
from moestro.train.rules import Rule

POLICIES = ("keep", "copy", "mean", "fresh")


class AdaptiveExperts(Rule):
    """The adaptive process of DynMoE (Guo 2024, arXiv:2405.14297, section 3.2), in every layer with `TopAny`.

    After step `first` (default: `every`) and every `every` steps from there, up to step `until`, each layer is updated
    from what its training micro-batches showed in the last `window` steps (default: `every`): the number of tokens
    that used each expert, and the sum of the inputs of the tokens that had none.

    - Remove: experts that no token used are no longer available. Nothing is freed: the pool's size is fixed.
    - Add: where tokens had no expert, the lowest slot that is then unused becomes one: its router row is the sum of
      those tokens' inputs at length 1, its threshold 0. One an update at most; none where the sum is exactly 0.

    An update that would leave no expert is not made. `new_experts` says what the weights of an added one are: those
    that its slot held (`keep`, the paper's code), a `copy` of the most used expert, the `mean` of those in use, or
    `fresh` ones drawn from `seed`, step and layer. The optimizer forgets the moments of the row and threshold and,
    where the weights are new, of the weights; its count of steps, which belongs to whole parameters, goes on.

    Where `torch.distributed` is initialised, what is recorded is summed over its ranks, and all come to one result.
    Evaluation and recomputation record nothing.

    Raises: ValueError for impossible values; on `start` where no layer selects by thresholds, or where experts that
    are to be copied or averaged differ in shape.
    """

    def __init__(
        self,
        every: int,
        window: int | None = None,
        first: int | None = None,
        until: int | None = None,
        new_experts: Literal["keep", "copy", "mean", "fresh"] = "keep",
        seed: int = 0,
    ) -> None:
        self.every, self.until, self.new_experts, self.seed = every, until, new_experts, seed
        self.window = every if window is None else window
        self.first = every if first is None else first
        if not 1 <= self.window <= every:
            raise ValueError(f"adaptive experts window={self.window} steps, allowed: 1 to every={every}")
        if self.first < self.window:
            raise ValueError(f"adaptive experts first={self.first}, allowed: at least window={self.window}")
        if new_experts not in POLICIES:
            raise ValueError(f"new_experts={new_experts!r}, allowed: {', '.join(POLICIES)}")
        self.step = 0
        self.records: dict[Any, Tensor] = {}
        self.seen: list[tuple[Tensor, Tensor]] = []

    def start(self, model: nn.Module, optimizer: Optimizers) -> None:
        self.optimizer = optimizer
        layers = [module for module in model.modules() if isinstance(module, MoELayer) and _adapts(module)]
        if not layers:
            raise ValueError("adaptive experts found no router with thresholds; allowed: select: {kind: top_any}")
        for bank in (bank for layer in layers for bank in layer.banks()):
            if self.new_experts in ("copy", "mean"):
                _require_alike(bank, self.new_experts)
        self.records = {layer: _empty(layer) for layer in layers}

    def observe(self, trace: Trace) -> None:
        record = self.records.get(trace.layer)
        if record is None or not self._recording(self.step + 1):
            return
        unserved = trace.x.detach()[trace.routing.per_token(1.0) == 0]
        direction = unserved.sum(0, dtype=record.dtype)
        count = record.new_tensor([len(unserved)])
        self.seen.append((record, torch.cat([trace.routing.load().to(record), count, direction])))

    @torch.no_grad()
    def apply(self, step: int) -> None:
        self.step = step
        if self._recording(step):
            self._gather()
        if self._next_update(step) != step:
            return
        for number, (layer, record) in enumerate(self.records.items()):
            self._update(layer, record.cpu(), number)
            record.zero_()

    def _gather(self) -> None:
        """Add what the step has shown on all ranks to the records, which are the same on each."""
        for record in self.records.values():
            own = [seen for of, seen in self.seen if of is record]
            record += summed_over_ranks(torch.stack(own).sum(0) if own else torch.zeros_like(record))
        self.seen.clear()

    def skip(self, step: int) -> None:
        """Updates are due by the number of the step; this one has shown nothing."""
        self.seen.clear()
        self.apply(step)

    def state_dict(self) -> dict:
        return {"step": self.step, "records": list(self.records.values())}

    def load_state_dict(self, state: dict) -> None:
        self.step = state["step"]
        for record, saved in zip(self.records.values(), state["records"], strict=True):
            record.copy_(saved)

    def _next_update(self, step: int) -> int | None:
        """The step of the first update from `step` on, None where there is none."""
        due = self.first + max(0, -(-(step - self.first) // self.every)) * self.every
        return due if self.until is None or due <= self.until else None

    def _recording(self, step: int) -> bool:
        due = self._next_update(step)
        return due is not None and step > due - self.window

    def _update(self, layer: MoELayer, record: Tensor, number: int) -> None:
        router, _ = _parts(layer)
        used, unserved, direction = record.split([router.n_experts, 1, len(record) - router.n_experts - 1])
        available, slot = decide(router.available.cpu(), used, bool(unserved > 0) and bool(direction.any()))
        if slot is not None:
            self._place(layer, slot, direction / direction.norm())
            in_use = used if bool(used.any()) else router.available.cpu().to(used)
            for bank in layer.banks():
                self._fill(bank, slot, in_use, number)
        router.set_available(available.to(router.available.device))

    def _place(self, layer: MoELayer, slot: int, row: Tensor) -> None:
        router, select = _parts(layer)
        write_rows(router.score.weight, slot, row[None])
        write_rows(select.thresholds, slot, 0.0)
        for parameter in (router.score.weight, select.thresholds):
            self.optimizer.reset_rows(parameter, slot)

    def _fill(self, bank: ExpertBank, slot: int, used: Tensor, number: int) -> None:
        if self.new_experts == "keep":
            return
        if self.new_experts == "fresh":
            new = _fresh(bank, slot, f"{self.seed} {self.step} {number}")
        else:
            chosen = [int(used.argmax())] if self.new_experts == "copy" else used.nonzero().flatten().tolist()
            each = [[whole(parameter)[rows] for parameter, rows in bank.weights_of(e)] for e in chosen]
            new = [torch.stack(alike).mean(0) for alike in zip(*each, strict=True)]
        for (parameter, rows), weights in zip(bank.weights_of(slot), new, strict=True):
            write_rows(parameter, rows, weights)
            self.optimizer.reset_rows(parameter, rows)


def decide(available: Tensor, used: Tensor, unserved: bool) -> tuple[Tensor, int | None]:
    """(experts available from now on, slot of the new one) from who was available, each one's tokens [e], and whether
    there were tokens without expert."""
    kept = available & (used > 0)
    free = (~kept).nonzero().flatten().tolist()
    slot = free[0] if unserved and free else None
    if slot is not None:
        kept[slot] = True
    return (kept, slot) if bool(kept.any()) else (available, None)


def _adapts(layer: MoELayer) -> bool:
    return isinstance(layer.router, ScoredRouter) and isinstance(layer.router.select, TopAny)


def _parts(layer: Any) -> tuple[ScoredRouter, TopAny]:
    return layer.router, layer.router.select


def _empty(layer: MoELayer) -> Tensor:
    """One layer's record: tokens of every expert, tokens without one, the sum of their inputs."""
    weight = _parts(layer)[0].score.weight
    return torch.zeros(sum(weight.shape) + 1, dtype=exact_dtype(weight.device), device=weight.device)


def _require_alike(bank: ExpertBank, policy: str) -> None:
    """Raises: ValueError where experts differ in kind or width."""
    shapes = {
        tuple((id(parameter), rows.stop - rows.start) for parameter, rows in bank.weights_of(e))
        for e in range(bank.n_experts)
    }
    if len(shapes) > 1:
        raise ValueError(
            f"new_experts={policy!r} needs experts of one shape, {type(bank).__name__} has others; allowed: keep, fresh"
        )


def _fresh(bank: ExpertBank, slot: int, seed: str) -> list[Tensor]:
    """The weights that a fresh expert in this slot would start with; the same on every rank."""
    devices = {parameter.device for parameter in bank.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1)
        twin = _twin(bank)
        index = torch.arange(bank.n_experts)
        index[slot] = -1
        twin.reindex(index)
    return [parameter[rows] for parameter, rows in twin.weights_of(slot)]


def _twin(bank: ExpertBank) -> ExpertBank:
    """A bank of the same sizes, whole and in this process alone."""
    if isinstance(bank, SpreadBank):
        return bank.blank()
    return copy.deepcopy(bank, {id(p): nn.Parameter(whole(p)) for p in bank.parameters() if is_sharded(p)})
