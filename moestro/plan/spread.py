"""One way to spread a recipe over ranks, and what each rank then holds, sends and waits for."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from moestro.parallel import ParallelSettings
from moestro.plan import traffic
from moestro.plan.imbalance import Balance, even
from moestro.plan.machines import Machine
from moestro.plan.workload import Lookup, Mixture, Workload
from moestro.train.estimate import (
    FLOAT32,
    FRAGMENTS,
    ITEMSIZE,
    PER_LOGIT,
    PROCESS,
    ROW_FACTORS,
    activation_bytes,
    different_rows,
)

# What an accelerator holds besides tensors: its context, and buffers of the communication library.
CONTEXT = 2.5e9


@dataclass(frozen=True)
class Spread:
    """A recipe on `world` ranks: `settings` say how, in `accumulate` micro-batches, with `recompute`. `balance` of
    experts over the ranks of a group, where there is one."""

    work: Workload
    machine: Machine
    world: int
    settings: ParallelSettings
    accumulate: int
    recompute: bool
    balance: Balance

    @property
    def copies(self) -> int:
        """Ranks that hold the same shard."""
        return self.settings.copies(self.world)

    @property
    def shards(self) -> int:
        """Ranks that hold one copy together."""
        return self.world // self.copies

    @property
    def experts(self) -> int:
        """Ranks that hold all experts together; 1 where experts are sharded like everything else."""
        return self.settings.experts

    @property
    def micro_batch(self) -> int:
        """Sequences that a rank has at a time."""
        return self.work.settings.batch_size // (self.accumulate * self.world)

    @property
    def tokens(self) -> int:
        """Tokens that a rank has at a time."""
        return self.micro_batch * self.work.seq_len

    @property
    def itemsize(self) -> int:
        """Bytes of a number that matrices multiply."""
        return ITEMSIZE[self.work.settings.precision]

    @property
    def sharded(self) -> float:
        """Parameters that FSDP shards: experts too, where they have no ranks of their own."""
        return self.work.dense + (0.0 if self.experts > 1 else self.work.experts)

    @property
    def largest_block(self) -> float:
        """Parameters that FSDP gathers together for the largest block."""
        alone = self.experts > 1
        own = 0.0 if alone else max((sum(m.parameters) for m in self.work.mixtures), default=0.0)
        return max(self.work.blocks) + own

    @property
    def own_experts(self) -> float:
        """Parameters of experts on the rank that has most."""
        return self.work.experts / self.experts * self.balance.parameters if self.experts > 1 else 0.0

    @property
    def learning(self) -> float:
        """Share of the parameters besides tables' that learn."""
        return 1 - self.work.frozen / max(1, self.work.dense + self.work.experts)

    @cached_property
    def memory(self) -> dict[str, float]:
        """Bytes by part on the fullest rank."""
        parts = {
            "parameters and optimizer": self.state_bytes(),
            "gathered weights": self.gathered_bytes(),
            "gradients": self.gradient_bytes(),
            "tables": self.work.table_bytes / self.world + self.row_gradient_bytes(),
            **self._activations(),
        }
        return {**parts, "allowance": FRAGMENTS * sum(parts.values()) + (CONTEXT if self._accelerator else PROCESS)}

    @property
    def _accelerator(self) -> bool:
        return self.machine.name != "CPU"

    @property
    def total(self) -> float:
        """Bytes on the fullest rank."""
        return sum(self.memory.values())

    def state_bytes(self) -> float:
        """Float32 weights and two moments: 4 P + 8 of those that learn, P = sharded / shards + the rank's experts."""
        return (FLOAT32 + 2 * FLOAT32 * self.learning) * (self.sharded / self.shards + self.own_experts)

    def gathered_bytes(self) -> float:
        """Whole weights in the dtype of products: those outside of blocks always, two blocks at a time (the next one
        comes while one computes) or, kept between micro-batches or after forward, all. Experts' casts with them."""
        if self.world == 1:
            return 0.0 if self.itemsize == FLOAT32 else self.itemsize * (self.sharded + self.own_experts)
        kept = self.accumulate > 1 or not self.settings.reshard
        blocks = self.sharded - self.work.rest if kept else min(2 * self.largest_block, self.sharded - self.work.rest)
        casts = 0.0 if self.itemsize == FLOAT32 else self.itemsize * self.own_experts
        return self.itemsize * (self.work.rest + blocks) + casts

    def gradient_bytes(self) -> float:
        """Float32: of experts their own; of what is sharded the shard and two blocks on their way, or everything whole
        where micro-batches are summed before they are sent."""
        moving = min(2 * self.largest_block, self.sharded)
        whole = self.sharded if self.accumulate > 1 else moving
        shard = self.sharded / self.shards if self.world > 1 else 0.0
        return FLOAT32 * (whole + shard + self.own_experts)

    def row_gradient_bytes(self) -> float:
        """Row-sparse gradients of the rank's part of the tables, from the tokens of all ranks. Factors of them are of
        the tokens that come to the rank, whole, for rows; of columns a part of all tokens, with all of their rows."""
        total, columns = 0.0, self.settings.tables == "columns"
        for tables in self.work.tables:
            met = self.accumulate * self.tokens * tables.rows
            if self.work.settings.optim.fused_rows:
                come = 1.0 if columns else self.world * (1 - (1 - 1 / self.world) ** tables.rows)
                vectors = self.accumulate * self.tokens * come * FLOAT32 * tables.width
                total += tables.count * (vectors + ROW_FACTORS * met * (self.world if columns else 1))
            else:
                rows = different_rows(tables.n_rows, met * self.world) / self.world
                total += tables.count * rows * (FLOAT32 * tables.width + 8) * (1 if self.accumulate == 1 else 2)
        return total

    def _activations(self) -> dict[str, float]:
        settings = replace(self.work.settings, recompute=self.recompute)
        tokens = self.tokens
        kept, working = activation_bytes(list(self.work.kept), tokens, self.work.d_model, settings)
        logits = tokens * self.work.vocab_size * float(PER_LOGIT[self.work.settings.precision])
        gone = logits * (1 - self.itemsize / PER_LOGIT[self.work.settings.precision])
        return {
            "activations": kept + max(working - gone, 0.0),
            "logits": logits,
            "exchanged rows": max(map(self.exchanged_bytes, (*self.work.mixtures, *self.work.lookups)), default=0.0),
        }

    def exchanged_bytes(self, layer: Mixture | Lookup) -> float:
        """Buffers of one layer's exchange on the busiest rank, there and back: tokens that leave and arrive, or parts
        of all tokens, with ids and gates of all their rows, where tables are split by columns."""
        if isinstance(layer, Mixture):
            ranks, n_experts, size = self.experts, len(layer.widths), self.itemsize * self.balance.work
        else:
            ranks, n_experts, size = self.world, math.inf, float(FLOAT32)
        if ranks == 1:
            return 0.0
        if isinstance(layer, Lookup) and self.settings.tables == "columns":
            return self.tokens * (4 * layer.width * size + layer.rows * ranks * (traffic.ID + FLOAT32))
        return 4 * self.tokens * traffic.ranks_met(layer.rows, even(ranks), n_experts) * self.work.d_model * size
