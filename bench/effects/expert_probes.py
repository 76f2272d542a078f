"""Probes of what experts have become: how alike, how pure, how well they serve others, what a run forgot."""

from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

from bench.effects.study import Trained
from moestro.data import Batch, load_tokenizer
from moestro.evaluate import evaluate, expert_probe, expert_purity
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.experts import HyperExpert
from moestro.experts.ffn import FFNExperts
from moestro.layers import scaled_experts
from moestro.model import Transformer
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


def own(trained: Trained) -> float:
    """Nats a token when every expert serves alone the tokens that prefer it, mean over layers."""
    tokens = min(TOKENS, trained.final_tokens)
    found = expert_probe(trained.model(), lambda: trained.held_out(tokens))
    return fmean(layer["own"] for layer in found.values())


def without(trained: Trained) -> dict[str, float]:
    """Rise of the loss, nats, when one expert counts for nothing: on the tokens that give it their greatest weight
    (`own`) and on the others (`others`), means over tokens and experts of all layers."""
    model, batches = trained.model(), list(trained.held_out(min(TOKENS, trained.final_tokens)))
    with evaluating(model):
        losses, first = _losses(model, batches)
        sums = torch.zeros(2, 2, dtype=torch.float64)
        for name, layer in model.moe_layers().items():
            for expert in range(layer.router.n_experts):
                with scaled_experts(layer, {expert: 0.0}):
                    rise = _losses(model, batches)[0] - losses
                mine = first[name] == expert
                sums += torch.stack([torch.stack([rise[m].sum(), m.sum().double()]) for m in (mine, ~mine)])
    (mine, n), (rest, m) = sums.tolist()
    return {"own": mine / n, "others": rest / m}


def _losses(model: Transformer, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Nats of every target, and the expert of greatest weight of its token in every layer."""
    losses, first = [], {name: [] for name in model.moe_layers()}
    for batch in batches:
        output, nats = score(model, batch, "fp32")
        losses.append(nats[batch.keep].double())
        for name, trace in zip(first, output.traces, strict=True):
            first[name].append(trace.routing.first_choice())
    return torch.cat(losses), {name: torch.cat(found) for name, found in first.items()}


def selection(trained: Trained) -> float:
    """Correlation, over pairs of experts, of how alike their embeddings are (cosine) with how often a token chooses
    both, mean over layers of hyper-experts."""
    model, found = trained.model(), []
    both: dict[str, torch.Tensor] = {}
    with evaluating(model):
        for batch in trained.held_out():
            for name, trace in zip(model.moe_layers(), score(model, batch, "fp32")[0].traces, strict=True):
                chosen = (trace.routing.dense() > 0).double()
                both[name] = both.get(name, 0) + chosen.T @ chosen
    for name, layer in model.moe_layers().items():
        (hyper,) = (branch for branch in layer.branches if isinstance(branch, HyperExpert))
        unit = F.normalize(hyper.experts.detach().double(), dim=-1)
        pair = torch.ones_like(both[name], dtype=torch.bool).triu(1)
        found.append(float(torch.corrcoef(torch.stack([(unit @ unit.T)[pair], both[name][pair]]))[0, 1]))
    return fmean(found)


def old_text(trained: Trained) -> dict[str, Any] | None:
    """Bits per byte on the held-out text of the run that this one started from, before and after; None for
    others, and where experts serve kinds of text, of which the old one is none."""
    section = trained.recipe.adapt
    plan = section and section.build()
    if plan is None or (plan.mixtures is not None and plan.mixtures.groups != (None,)):
        return None
    start = plan.start
    recipe = load_recipe(start / "recipe.yaml")
    data = build_data(recipe)
    data.tokenizer = load_tokenizer(start / "tokenizer")
    dataset = data.prepare(progress=False)
    batch = recipe.train.value("batch_size")
    found = {}
    for when, step in (("before", 0), ("after", None)):
        found[when] = evaluate(trained.model(step), dataset.val_batches(batch, trained.final_tokens))["bpb"]
    return found
