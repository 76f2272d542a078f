"""Probes of how a trained model uses its experts: along training, and token by token."""

from typing import Any

import numpy as np
import torch

from bench.effects.study import Trained
from moestro.evaluate import capacity_report, routing_report
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.model import Transformer

# Held-out tokens on which each saved state is measured.
HISTORY_TOKENS = 16_384


def routing_history(trained: Trained) -> list[dict[str, Any]]:
    """Of the untrained model and of every saved state: {"step", "layers": [{"widths", "load", "experts", "different",
    "width"}]}.

    `load` is the fraction of tokens that use each expert; `experts`, `different` ones and `width` are means over
    tokens. Each pass of a stratified layer is a layer.
    """
    steps = [0, *trained.checkpoints()]
    return [{"step": step, "layers": usage(trained, step)} for step in steps]


def usage(trained: Trained, step: int) -> list[dict[str, Any]]:
    """Every mixture layer of one saved state."""
    tokens = min(HISTORY_TOKENS, trained.final_tokens)
    report = routing_report(trained.model(step), trained.held_out(tokens))
    return [
        {
            "widths": layer["widths"],
            "load": [rows / layer["tokens"] for rows in layer["load"]],
            "experts": layer["experts_per_token"]["mean"],
            "different": layer["different_experts"],
            "width": layer["active_width"]["mean"],
        }
        for layer in report.values()
    ]


def final_routing(trained: Trained) -> list[dict[str, float]]:
    """Of the trained model, every mixture layer on the text of the final loss: {"unevenness", "usage" (shares as in
    PEER's Table 2), "tokens", "experts" and "width" (means over tokens), "mean_width" of the layer's experts}."""
    model = trained.model()
    report, layers = routing_report(model, trained.held_out()), model.moe_layers()
    return [
        {
            **{key: figures[key] for key in ("unevenness", "usage", "tokens")},
            "experts": figures["experts_per_token"]["mean"],
            "width": figures["active_width"]["mean"],
            "mean_width": float(torch.as_tensor(layers[name].expert_widths(), dtype=torch.float64).mean()),
        }
        for name, figures in report.items()
    ]


def depth(trained: Trained) -> list[dict[str, Any]]:
    """Requested capacity of every stratified layer after training, as `moestro.evaluate.capacity_report` says it."""
    return list(capacity_report(trained.model(), trained.held_out()).values())


def difficulty(trained: Trained) -> dict[str, dict[str, float | None]]:
    """How active width (mean over layers) goes with a token's loss, on held-out text.

    `predicting` pairs a loss with the width spent where the token is predicted, `reading` with the width spent on the
    token itself. Of each: the correlation, and the mean width of the hardest quarter of tokens over that of the
    easiest.
    """
    predicting: list[tuple[torch.Tensor, torch.Tensor]] = []
    reading: list[tuple[torch.Tensor, torch.Tensor]] = []
    model = trained.model()
    with evaluating(model):
        for batch in trained.held_out():
            width, loss = widths_and_losses(model, batch)
            predicting.append((width[batch.keep], loss[batch.keep]))
            kept = batch.keep[:, 1:]
            reading.append((width[:, 1:][kept], loss[:, :-1][kept]))
    return {"predicting": relation(predicting), "reading": relation(reading)}


def widths_and_losses(model: Transformer, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean active width over layers, and -log p of the target, of every position; zeros where there is no target."""
    output, loss = score(model, batch, "fp32")
    width = torch.zeros_like(loss)
    active = torch.stack([trace.active_width() for trace in output.traces])
    width[batch.keep] = active.mean(0).to(width.dtype)
    return width, loss


def relation(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float | None]:
    """Correlation of width and loss (None where all widths are equal), and the hardest quarter's mean width over the
    easiest's."""
    width, loss = (np.concatenate([np.asarray(part[i], dtype=np.float64) for part in parts]) for i in (0, 1))
    order = loss.argsort(kind="stable")
    quarter = len(order) // 4
    hard, easy = width[order[-quarter:]].mean(), width[order[:quarter]].mean()
    correlation = float(np.corrcoef(width, loss)[0, 1]) if np.ptp(width) > 0 else None
    return {"correlation": correlation, "hard_over_easy": float(hard / easy)}
