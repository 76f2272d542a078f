"""A small decoder with mixtures, and text for it, for tests of compression."""

import torch

from moestro.data import Batch
from moestro.experts import FFNBank
from moestro.layers import DenseFFN, MoELayer
from moestro.model import Block, Transformer
from moestro.model.attention import Attention
from moestro.routers import GroupLimit, LinearScore, ScoredRouter, TopK
from moestro.routers.groups import EVERYWHERE

D, E, VOCAB = 8, 6, 17


def mixture(width=5, k=2, groups: GroupLimit = EVERYWHERE) -> MoELayer:
    return MoELayer(ScoredRouter(LinearScore(D, E, init_std=1.0), TopK(k, limit=groups)), [FFNBank(D, [width] * E)])


def decoder(layers: str = "mmmm", seed: int = 0) -> Transformer:
    """In float64; m is a mixture of 6 experts, d a dense layer."""
    torch.manual_seed(seed)
    made = [mixture() if kind == "m" else DenseFFN(D, 12) for kind in layers]
    blocks = [Block(D, Attention(D, n_heads=2), layer) for layer in made]
    return Transformer(VOCAB, D, blocks).double().eval()


def text(n: int = 3, rows: int = 2, length: int = 9, seed: int = 0) -> list[Batch]:
    """Batches of random tokens in one document a row, the last token of each row padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(n):
        tokens = torch.randint(VOCAB, (rows, length + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[:, -1] = -100
        zeros = torch.zeros_like(targets)
        batches.append(Batch(tokens[:, :-1], targets, zeros, zeros + 1))
    return batches
