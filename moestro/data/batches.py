"""Batches: fixed windows of packed documents, in an order that is a pure function of (seed, step)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moestro.data.shards import Shard

IGNORE = -100


@dataclass(frozen=True, eq=False)
class Batch:
    """What one step reads; every field is int64 (b, s). `groups` is None where the corpus tells none apart."""

    tokens: Tensor
    targets: Tensor  # the next token; IGNORE where there is none
    documents: Tensor  # which document of its row a token belongs to; eos belongs to the document it opens
    n_bytes: Tensor  # bytes of text each target stands for; 0 for eos and where ignored
    groups: Tensor | None = None  # what kind of text each token's document is

    @property
    def keep(self) -> Tensor:
        """False where a token is only padding."""
        return self.targets != IGNORE

    def rows(self, start: int, stop: int) -> "Batch":
        """Some rows of the batch: a micro-batch, or one rank's share."""
        return self._each(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{name: change(tensor) for name, tensor in held.items() if tensor is not None})


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    """The order of the windows in one epoch: argsort of Philox(seed, epoch)'s raw numbers.

    Raw numbers, because numpy promises the same stream in every version for these and not for `permutation`.
    """
    random = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n_windows)
    order = np.argsort(random, kind="stable").astype(np.uint32 if n_windows <= 2**32 else np.uint64)
    order.flags.writeable = False
    return order


class Windows:
    """A split cut into windows of seq_len + 1 tokens, neighbours sharing one, so that each token is a target once."""

    def __init__(self, shard: Shard, seq_len: int, eos_id: int, byte_lengths: np.ndarray):
        self.shard, self.seq_len, self.eos_id, self.byte_lengths = shard, seq_len, eos_id, byte_lengths
        self.n_targets = len(shard.tokens) - 1
        self.n_full = self.n_targets // seq_len  # windows that need no padding
        self.n_all = -(-self.n_targets // seq_len)

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        """The windows of one step; the unfilled end of the split is left out."""
        sample = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, places = np.divmod(sample, self.n_full)
        windows = [epoch_order(seed, int(e), self.n_full)[p] for e, p in zip(epochs, places, strict=True)]
        return self.batch(np.array(windows, np.int64))

    def in_order(self, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """Every window once, the last one padded; under `max_tokens`, windows spread evenly over the split."""
        n = self.n_all if max_tokens is None else min(self.n_all, max(1, max_tokens // self.seq_len))
        windows = np.linspace(0, self.n_all - 1, n).astype(np.int64)
        for start in range(0, n, batch_size):
            yield self.batch(windows[start : start + batch_size])

    def batch(self, windows: np.ndarray) -> Batch:
        """The windows with these numbers, as one batch."""
        positions = windows[:, None] * self.seq_len + np.arange(self.seq_len + 1)  # (b, s+1)
        valid = positions[:, 1:] <= self.n_targets
        held = self.shard.tokens[np.minimum(positions, self.n_targets)].astype(np.int64)
        tokens, targets = held[:, :-1], held[:, 1:]
        opens = tokens == self.eos_id
        n_bytes = self.byte_lengths[targets]
        if self.shard.meta.inexact_documents:
            opening = positions[:, :-1][opens & valid]
            document = np.searchsorted(self.shard.index[:, 0], opening)
            n_bytes[opens & valid] += self.shard.index[document, 1]
        arrays = (tokens, np.where(valid, targets, IGNORE), np.cumsum(opens, axis=1), np.where(valid, n_bytes, 0))
        groups = () if self.shard.groups is None else (self._groups(positions[:, :-1], self.shard.groups),)
        return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (*arrays, *groups)))

    def _groups(self, positions: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Of the documents at these places, that of the last one beyond the end."""
        document = np.searchsorted(self.shard.index[:, 0], positions, side="right") - 1
        return groups[np.minimum(document, len(groups) - 1)]
