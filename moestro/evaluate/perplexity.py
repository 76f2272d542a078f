"""Bits per byte and perplexity of held-out text."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moestro.data import Batch
from moestro.evaluate.scoring import exact_dtype, score
from moestro.parallel.gradients import forget_gathered
from moestro.parallel.ranks import Ranks
from moestro.parallel.share import own_share


def evaluate(
    model: nn.Module, batches: Iterable[Batch], *, precision: str = "fp32", ranks: Ranks | None = None
) -> dict[str, float]:
    """Figures of the model on all batches together; of several ranks each reads a share of every batch.

    `loss` is mean nats per target token, `perplexity` = exp(loss), `bpb` = nats / (ln 2 * bytes of the targets), and
    `tokens` and `bytes` what was counted. The mode of the model is put back afterwards.

    Raises: ValueError where there is nothing to evaluate.
    """
    device = next(model.parameters()).device
    ranks = ranks or Ranks.alone(device)
    total = torch.zeros((), dtype=exact_dtype(device), device=device)
    tokens = n_bytes = 0
    with evaluating(model):
        for batch in batches:
            _, losses = score(model, own_share(batch, ranks), precision)
            total += losses.sum(dtype=total.dtype)
            tokens += int(batch.keep.sum())
            n_bytes += int(batch.n_bytes.sum())
    total = ranks.summed(total)
    forget_gathered(model, ranks)
    if not tokens or not n_bytes:
        raise ValueError(f"nothing to evaluate: the batches hold {tokens} target tokens, {n_bytes} bytes")
    loss = float(total) / tokens
    return {
        "loss": loss,
        "bpb": loss * tokens / n_bytes / math.log(2),
        "perplexity": perplexity(loss),
        "tokens": tokens,
        "bytes": n_bytes,
    }


def perplexity(loss: float) -> float:
    """exp(loss); the largest float where that overflows."""
    return math.exp(min(loss, 709.0))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without gradients and in evaluation mode; afterwards every submodule is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
