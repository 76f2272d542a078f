"""Probe of how many hidden units of the chosen experts do next to nothing."""

from typing import Any

import torch
from torch import Tensor

from bench.effects.study import Trained
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.experts import FFNBank
from moestro.ops.activations import activation
from moestro.routing import Trace

# A unit below this share of the root mean square of its layer's units is near zero; of so many tokens, spread over the
# held-out text, the first batch is looked at.
NEAR, TOKENS = 0.1, 4096


def near_zero(trained: Trained) -> float | None:
    """Share of the hidden units of chosen experts that are near zero, mean over layers; None where there is no layer
    whose bank has matrices of its own for each expert. In evaluation."""
    model = trained.model()
    shares: list[float] = []
    with evaluating(model):
        batch = next(iter(trained.held_out(min(TOKENS, trained.final_tokens))))
        for trace in score(model, batch, "fp32")[0].traces:
            if isinstance(trace.layer.banks()[0], FFNBank):
                units = hidden_units(trace)
                shares.append(float((units.abs() < NEAR * units.square().mean().sqrt()).double().mean()))
    return sum(shares) / len(shares) if shares else None


def hidden_units(trace: Trace) -> Tensor:
    """Every hidden unit of every row, after the activation and its gate, one after another."""
    bank: Any = trace.layer.banks()[0]
    routing = trace.routing.grouped()
    act = activation(bank.activation).forward
    hidden = bank.w_in(routing.gather(trace.x).split(routing.offsets.diff().tolist()))
    halves = zip(hidden, bank.widths, strict=True)
    return torch.cat([(act(h[:, :w]) * h[:, w:] if bank.glu else act(h)).flatten() for h, w in halves])
