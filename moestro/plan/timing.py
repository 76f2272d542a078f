"""How long a step takes, on paper: arithmetic, memory and messages, and which of them hide behind which.

Stated: products run at the machine's `efficiency`; what other kernels read and write (`moved_per_token`), rows of
tables and optimizer state move at the full memory bandwidth; every block launches 60 kernels forward and 120 backward,
a layer of experts as many again; FSDP's messages hide behind the machine's `overlap` of computation but for the first
gather and the last reduction; exchanges of rows hide behind nothing; the busiest rank's experts are what all wait for.
Nothing else is counted: no input, evaluation or checkpoint. Blocks that `torch.compile` fuses move less than is counted
here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from moestro.cost import TRAINING_FLOPS
from moestro.plan import traffic
from moestro.plan.imbalance import even
from moestro.plan.machines import Machine
from moestro.plan.spread import Spread
from moestro.plan.workload import Workload, training_flops
from moestro.train.estimate import ITEMSIZE, PER_LOGIT

# Bytes that a step moves of a float32 number that learns: AdamW reads weight, gradient and moments and writes weight
# and moments; clipping reads the gradient twice and writes it.
ADAMW = (7 + 3) * 4
# Times that kernels other than products read or write, forward and backward: every byte that is kept for backward;
# every float32 number of a block's input (norms, rotations, residuals); every number of a row that goes to an expert;
# every byte that a logit holds (`PER_LOGIT`). Counted on small recipes, kernel by kernel (tests/plan/test_timing.py).
KEPT_MOVED, STREAM_MOVED, ROWS_MOVED, LOGITS_MOVED = 4.5, 90, 20, 2
# Times that a row of a table is read or written in a step besides the forward pass: for the gradients of x and of the
# gates (2), the sum of its own gradient (1), its update (read and write of itself and two moments: 6).
ROW_AGAIN = 9
# Kernels that a block launches in a forward pass, and a layer of experts adds; backward launches twice as many.
KERNELS = 60


@dataclass(frozen=True)
class Message:
    """One kind of message: bytes that a rank sends in a step in `count` operations among `ranks`, every `stride`-th
    one. `rings` says that data goes round all ranks, so that the cards of those on one host share what leaves it."""

    what: str
    sent: float
    count: int
    ranks: int
    stride: int = 1
    rings: bool = True

    def seconds(self, machine: Machine) -> float:
        """Latency of a tree's depth for every operation, and the bytes at the rate of the slowest link."""
        if self.ranks == 1 or not self.sent:
            return 0.0
        inside = self.ranks * self.stride <= machine.per_host
        latency = machine.latency if inside else machine.network_latency
        return self.count * latency * math.ceil(math.log2(self.ranks)) + self.sent / self._rate(machine, inside)

    def _rate(self, machine: Machine, inside: bool) -> float:
        if inside:
            return machine.link
        neighbours = max(1.0, machine.per_host / self.stride)
        if self.rings:
            return min(machine.link, machine.network * neighbours)
        # each with each: what leaves the host goes by the rank's own card
        outside = (self.ranks - neighbours) / (self.ranks - 1)
        return min(machine.network / outside, machine.link)


def kernels(work: Workload) -> int:
    """Kernels of a forward pass."""
    return KERNELS * (len(work.blocks) + len(work.mixtures) + len(work.unspread) + len(work.lookups))


def units(work: Workload) -> int:
    """What FSDP gathers by itself: blocks and routers; the model's other parameters come once more."""
    return len(work.blocks) + work.routers


def moved_per_token(work: Workload) -> float:
    """Bytes that kernels other than products read and write for a token, forward and backward, but of tables."""
    itemsize = ITEMSIZE[work.settings.precision]
    kept = KEPT_MOVED * sum(kept.total(itemsize) for kept in work.kept)
    stream = STREAM_MOVED * traffic.FLOAT32 * work.d_model * len(work.kept)
    rows = ROWS_MOVED * itemsize * work.d_model * sum(mixture.rows for mixture in work.mixtures)
    return kept + stream + rows + LOGITS_MOVED * PER_LOGIT[work.settings.precision] * work.vocab_size


@dataclass(frozen=True)
class StepTime:
    """What a step is made of."""

    spread: Spread

    def messages(self) -> Iterator[Message]:
        """Every kind of message of a step."""
        s = self.spread
        if s.world == 1:
            return
        yield from self._fsdp()
        if s.experts > 1:
            copies = s.world // s.experts
            size = traffic.FLOAT32 * s.own_experts
            yield Message("experts' gradients", traffic.all_reduce(size, copies), 1, copies, s.experts)
            yield self._exchange()
        if s.work.tables:
            yield self._tables()
        if s.work.query_features:
            yield self._query_statistics()

    def _fsdp(self) -> Iterator[Message]:
        s = self.spread
        blocks, n = s.sharded - s.work.rest, units(s.work)
        times = traffic.gathers(s.accumulate, s.settings.reshard)
        gathered = traffic.all_gather(s.itemsize * (times * blocks + s.work.rest), s.shards)
        learns = s.sharded - s.work.frozen
        yield Message("gathered weights", gathered, times * n + 1, s.shards)
        scattered = traffic.reduce_scatter(traffic.FLOAT32 * learns, s.shards)
        yield Message("reduced gradients", scattered, n + 1, s.shards)
        if s.copies > 1:
            between = traffic.all_reduce(traffic.FLOAT32 * learns / s.shards, s.copies)
            yield Message("gradients of copies", between, n + 1, s.copies, s.shards)

    @property
    def _forwards(self) -> int:
        """How often a micro-batch goes through a block."""
        return 2 if self.spread.recompute else 1

    def _exchange(self) -> Message:
        s, f = self.spread, self._forwards
        shares = even(s.experts)
        sent = sum(
            traffic.expert_exchange(s.tokens, s.work.d_model, m.rows, shares, s.itemsize, len(m.widths), f)
            for m in s.work.mixtures
        )
        count = s.accumulate * 2 * (f + 1) * len(s.work.mixtures)
        return Message("exchange of rows", s.accumulate * sent * s.balance.work, count, s.experts, rings=False)

    def _tables(self) -> Message:
        """The tables of one layer are met together: the rows' vectors travel once."""
        s, f = self.spread, self._forwards
        by = traffic.table_rows_exchange if s.settings.tables == "rows" else traffic.table_columns_exchange
        met = s.work.lookups
        sent = sum(by(s.tokens, one.width, one.rows, s.world, traffic.FLOAT32, one.tables, f) for one in met)
        count = s.accumulate * 2 * (f + 1) * len(met)
        return Message("rows of tables", s.accumulate * sent, count, s.world, rings=False)

    def _query_statistics(self) -> Message:
        """Of every layer that normalises queries two sums forward and two backward in every micro-batch, two more where
        it is recomputed, and two after the step."""
        s, each = self.spread, self.spread.work.query_features
        passes = (self._forwards + 1) * s.accumulate
        sent = sum(passes * traffic.query_statistics(f, s.world) + traffic.pooled_statistics(f, s.world) for f in each)
        return Message("query statistics", sent, 2 * (passes + 1) * len(each), s.world)

    @cached_property
    def sent(self) -> dict[str, float]:
        """Bytes that a rank sends in a step, by kind."""
        return {message.what: message.sent for message in self.messages()}

    @cached_property
    def compute(self) -> float:
        """Seconds of kernels in a step on the busiest rank: of products, of what others move, of launches and of
        sharding."""
        s = self.spread
        tokens = s.accumulate * s.tokens
        flops = tokens * training_flops(s.work, s.recompute)
        again = TRAINING_FLOPS + self._forwards - 1
        experts = tokens * again * sum(m.rows * m.row_flops for m in s.work.mixtures)
        late = experts * (s.balance.work - 1)
        times = self._forwards + ROW_AGAIN
        moved = sum(t.count * t.rows * t.width * traffic.FLOAT32 * times for t in s.work.tables) * tokens
        launches = s.accumulate * kernels(s.work) * again
        moved += tokens * moved_per_token(s.work) * (again / TRAINING_FLOPS)
        products = (flops + late) / s.machine.flops(s.work.settings.precision)
        engine = s.accumulate * units(s.work) * s.machine.sharded_unit if s.world > 1 else 0.0
        return products + moved / s.machine.memory_bandwidth + launches * s.machine.launch + engine

    @cached_property
    def optimizer(self) -> float:
        """Seconds of the update of the rank's own numbers."""
        s = self.spread
        return ADAMW * s.learning * (s.sharded / s.shards + s.own_experts) / s.machine.memory_bandwidth

    @cached_property
    def waiting(self) -> float:
        """Seconds of messages that nothing hides."""
        s = self.spread
        hidden = ("gathered weights", "reduced gradients", "gradients of copies", "experts' gradients")
        seconds = {message.what: message.seconds(s.machine) for message in self.messages()}
        behind = sum(seconds.get(what, 0.0) for what in hidden)
        ends = behind / max(1, len(s.work.blocks))
        return sum(t for what, t in seconds.items() if what not in hidden) + max(
            ends, behind - s.machine.overlap * self.compute
        )

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.compute + self.waiting + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.spread.work.tokens / self.total
