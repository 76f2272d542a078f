"""Probes of what experts have become: how alike, how pure, how well they serve others, what a run forgot."""

from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from bench.effects.study import Trained
from moestro.data import load_tokenizer
from moestro.evaluate import evaluate, expert_probe, expert_purity
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.experts.ffn import FFNExperts
from moestro.recipe.build import build_data
from moestro.recipe.load import load_recipe

# Tokens on which every expert is run, and held-out tokens for probes of every expert.
COMPARED, TOKENS = 256, 4096


def alike(trained: Trained) -> float | None:
    """Mean cosine of what two experts of a layer return for one token, over layers of feed-forward experts; None where
    there are none."""
    model, found = trained.model(), []
    batch = next(iter(trained.held_out(COMPARED)))
    with evaluating(model):
        for trace in score(model, batch, "fp32")[0].traces:
            if isinstance(trace.layer.bank, FFNExperts):
                found.append(mean_cosine(outputs(trace.layer.bank, trace.x[:COMPARED])))
    return fmean(found) if found else None


def outputs(bank: FFNExperts, x: torch.Tensor) -> torch.Tensor:
    """[e, t, d], every expert on every token."""
    offsets = torch.arange(bank.n_experts + 1) * len(x)
    return bank.run(x.repeat(bank.n_experts, 1), offsets).unflatten(0, (bank.n_experts, len(x)))


def mean_cosine(rows: torch.Tensor) -> float:
    """Of every two experts' outputs for the same token."""
    unit = F.normalize(rows.detach().double(), dim=-1).transpose(0, 1)
    n = unit.shape[1]
    return float(((unit @ unit.mT).sum((1, 2)) - n).mean() / (n * (n - 1)))


def purity(trained: Trained) -> dict[str, float] | None:
    """Of all mixture layers, the mean of `mean_purity` and `active` as `expert_purity` says them, with those of the
    untrained model; None without mixtures."""
    if not trained.model(0).moe_layers():
        return None
    found: dict[str, float] = {}
    for when, step in (("start", 0), ("end", None)):
        layers = expert_purity(trained.model(step), trained.held_out(min(TOKENS, trained.final_tokens))).values()
        for name in ("mean_purity", "active"):
            found[f"{name}_{when}"] = fmean(layer[name] for layer in layers)
    return found


def foreign(trained: Trained) -> float | None:
    """Nats a token when experts serve others' tokens alone, mean over layers; None but for feed-forward experts."""
    layers = trained.model(0).moe_layers().values()
    if not layers or not all(isinstance(layer.bank, FFNExperts) for layer in layers):
        return None
    tokens = min(TOKENS, trained.final_tokens)
    found = expert_probe(trained.model(), lambda: trained.held_out(tokens))
    return fmean(layer["foreign"] for layer in found.values())


def old_text(trained: Trained) -> dict[str, Any] | None:
    """Bits per byte on the held-out text of the run that this one started from, before and after; None for others."""
    section = trained.recipe.adapt
    if section is None:
        return None
    start = section.build().start
    recipe = load_recipe(start / "recipe.yaml")
    data = build_data(recipe)
    data.tokenizer = load_tokenizer(start / "tokenizer")
    dataset = data.prepare(progress=False)
    batch = recipe.train.value("batch_size")
    found = {}
    for when, step in (("before", 0), ("after", None)):
        found[when] = evaluate(trained.model(step), dataset.val_batches(batch, trained.final_tokens))["bpb"]
    return found
