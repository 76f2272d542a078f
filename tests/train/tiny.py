"""A model and a data set that train in milliseconds."""

from collections.abc import Iterator

import torch

from moestro import DenseFFN, FFNBank, LinearScore, MoELayer, ProductKeyRouter, ScoredRouter, SingletonBank, TopK
from moestro.data import Batch
from moestro.model import Attention, Block, Transformer
from moestro.train import Budget, OptimSettings, TrainSettings

VOCABULARY, WIDTH, SEQUENCE = 11, 8, 6


def tiny_model(seed: int = 0, tie_embeddings: bool = False, kinds: tuple[str, ...] = ("moe", "peer")) -> Transformer:
    """One block for each of `kinds`."""
    torch.manual_seed(seed)
    layers = {"dense": dense, "moe": moe, "peer": peer, "rows": rows}
    blocks = [Block(WIDTH, Attention(WIDTH, n_heads=2), layers[kind]()) for kind in kinds]
    return Transformer(VOCABULARY, WIDTH, blocks, tie_embeddings=tie_embeddings)


def dense() -> DenseFFN:
    return DenseFFN(WIDTH, 12)


def moe() -> MoELayer:
    return MoELayer(ScoredRouter(LinearScore(WIDTH, 3), TopK(2)), [FFNBank(WIDTH, [2, 4, 6])])


def peer() -> MoELayer:
    router = ProductKeyRouter(WIDTH, 16, heads=2, top_k=3, d_key=4, query_norm="batch")
    return MoELayer(router, [SingletonBank(WIDTH, 16)])


def rows(sparse_gradients: bool = True) -> MoELayer:
    """More experts than a step of 4 sequences can meet."""
    router = ProductKeyRouter(WIDTH, 256, heads=2, top_k=3, d_key=4, query_norm="rms")
    return MoELayer(router, [SingletonBank(WIDTH, 256, sparse_gradients=sparse_gradients)])


class Counting:
    """Sequences that count upwards from a random start, in steps of 1 or 2; a pure function of its arguments."""

    fingerprint = "counting"

    def __init__(self, n_val: int = 3) -> None:
        self.n_val = n_val

    def train_batch(self, step: int, batch_size: int, seed: int) -> Batch:
        return self._batch(batch_size, torch.Generator().manual_seed(1000 * seed + step))

    def val_batches(self, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        for number in range(self.n_val):
            yield self._batch(batch_size, torch.Generator().manual_seed(10**6 + number))

    def _batch(self, rows: int, generator: torch.Generator) -> Batch:
        start = torch.randint(VOCABULARY, (rows, 1), generator=generator)
        stride = torch.randint(1, 3, (rows, 1), generator=generator)
        text = (start + stride * torch.arange(SEQUENCE + 1)) % VOCABULARY
        tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        return Batch(tokens, targets, torch.zeros_like(tokens), torch.full_like(tokens, 2))


def tiny_settings(steps: int = 12, **changes: object) -> TrainSettings:
    plain = {"budget": Budget(steps=steps), "optim": OptimSettings(lr=0.01), "batch_size": 4, "eval_every": 4}
    return TrainSettings(**{**plain, "save_every": 5, "tensorboard": False, **changes})  # type: ignore[arg-type]
