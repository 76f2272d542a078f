"""Losses of a trained model on given batches, and how far held-out text lies above text that it has seen."""

import math
from typing import Any

from bench.effects.study import Trained
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.model import Transformer

# Tokens of the seen and of the held-out text.
MEASURED = 16_384


def figures(model: Transformer, batches: Any) -> list[float]:
    """[mean nats a token, share of tokens that are not the most probable]."""
    nats = wrong = count = 0.0
    with evaluating(model):
        for batch in batches:
            output, losses = score(model, batch, "fp32")
            missed = (output.logits.argmax(-1) != batch.targets) & batch.keep
            nats, wrong = nats + float(losses.double().sum()), wrong + float(missed.sum())
            count += int(batch.keep.sum())
    return [nats / count, wrong / count]


def gap(trained: Trained) -> float:
    """Nats a token by which held-out text lies above the first batches of training, after training."""
    model, tokens = trained.model(), min(MEASURED, trained.final_tokens)
    size, seed = (trained.recipe.train.value(key) for key in ("batch_size", "seed"))
    steps = math.ceil(tokens / size / trained.dataset.seq_len)
    seen = [trained.dataset.train_batch(number, size, seed=seed) for number in range(steps)]
    return figures(model, trained.held_out(tokens))[0] - figures(model, seen)[0]
