"""Every term of the generalization bound for a model's mixture layers, from its weights and what it does on text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float

from moestro.data import Batch
from moestro.evaluate.generalization import (
    expert_term,
    log_choices,
    rademacher,
    router_term,
    sparse_factor,
)
from moestro.evaluate.perplexity import evaluating
from moestro.evaluate.scoring import score
from moestro.experts import ExpertBank
from moestro.layers import MoELayer
from moestro.model import Transformer
from moestro.routers.family import SelectionFamily
from moestro.routing import SparseRouting, Trace

COUNTS = ("paper", "exact")
# What stands beside every number of a language model.
GENERAL = (
    "the theorem is about binary classification with a bounded loss: a language model's is clipped, or its 0/1 error",
    "tokens of a text are not independent samples: sequences are the cautious unit",
    "norms, inputs and sums of gates are those seen after training, not limits of a class fixed before it",
    "spectral norms stand where the theorem has Frobenius norms: a Lipschitz constant, not a complexity",
)
PARTS = "parts of a token depend on each other; the experts' term counts tokens"
STACKED = (
    "several routers: their selections multiply, though later ones see what earlier layers made",
    "several layers: the expert term is that of the layer where it is greatest",
)


class Observed:
    """What traces show of one layer: greatest norm of its inputs, greatest sum of a token's gates, experts a token and
    parts of a token."""

    def __init__(self) -> None:
        self.input_norm = self.mass = 0.0
        self.rows = self.routed = self.tokens = 0

    def add(self, trace: Trace) -> None:
        """Count one trace."""
        routing = trace.routing
        self.rows, self.routed = self.rows + routing.n_rows, self.routed + routing.n_tokens
        self.tokens += trace.n_tokens
        if routing.n_tokens:
            self.input_norm = max(self.input_norm, float(trace.x.double().norm(dim=-1).max()))
            self.mass = max(self.mass, float(_mass(routing).max()))


def _mass(routing: Any) -> torch.Tensor:
    """Sum of the absolute gates of every token."""
    if isinstance(routing, SparseRouting):
        zeros = routing.weight.new_zeros(routing.n_tokens)
        return zeros.index_add(0, routing.token, routing.weight.abs())
    return routing.dense().abs().sum(-1)


def generalization_report(
    model: Transformer,
    batches: Iterable[Batch],
    units: Mapping[str, int],
    *,
    delta: float = 0.05,
    lipschitz: float = 1.0,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Terms of the bound (`moestro.evaluate.generalization`), as JSON values.

    `units` are numbers of training samples by what is counted as one ({"tokens": ..., "sequences": ...}); where layers
    route `parts` of tokens these are a unit more, of the router's term alone. `layers`: by name, what the bound is made
    of, and under `heuristic` what of it no theorem covers; `bounds`: for every unit and count the terms and their
    total, for all layers together; no expert term and no total where experts of any layer have no norms. A layer whose
    selections depend on other tokens is listed, and the bounds are empty: they would say nothing.

    Raises: ValueError for impossible units or delta, or where the model has no mixture layers.
    """
    layers = model.moe_layers()
    if not layers:
        raise ValueError(f"{type(model).__name__} has no mixture layers: the bound is about what routers select")
    seen = {name: Observed() for name in layers}
    names = {id(layer): name for name, layer in layers.items()}
    with evaluating(model):
        for batch in batches:
            for trace in score(model, batch, precision)[0].traces:
                seen[names[id(trace.layer)]].add(trace)
    families = {name: layer.router.selection_family() for name, layer in layers.items()}
    entries = {name: _layer(layer, families[name], seen[name], units) for name, layer in layers.items()}
    counted = {**units, **_parts(seen.values(), units)}
    heuristic = [*GENERAL, *(STACKED if len(layers) > 1 else ()), *([PARTS] if "parts" in counted else ())]
    applicable = all(family.applicable for family in families.values())
    experts = {unit: _expert_terms(entries, units[unit if unit in units else "tokens"], lipschitz) for unit in counted}
    bounds = {
        unit: {count: _terms(list(families.values()), experts[unit], m, delta, count) for count in COUNTS}
        for unit, m in counted.items()
        if applicable
    }
    return {
        "delta": delta,
        "lipschitz": lipschitz,
        "units": counted,
        "layers": entries,
        "bounds": bounds,
        "heuristic": heuristic,
    }


def _parts(seen: Iterable[Observed], units: Mapping[str, int]) -> dict[str, int]:
    """The parts of tokens as a unit, where layers route several of each."""
    most = max((each.routed / max(1, each.tokens) for each in seen), default=1.0)
    return {"parts": round(units["tokens"] * most)} if most > 1 and "tokens" in units else {}


def _layer(layer: MoELayer, family: SelectionFamily, seen: Observed, units: Mapping[str, int]) -> dict[str, Any]:
    products, remarks = _norm_products(layer)
    mean_k = seen.rows / max(1, seen.routed)
    return {
        "n_experts": family.n_experts,
        "pool": family.pool,
        "most": family.most,
        "mean_k": mean_k,
        "dimension": family.dimension,
        "patterns": {
            **{count: log_choices(family.n_experts, family.most, family.fixed, count) for count in COUNTS},
            "mean k": sparse_factor(family.n_experts, mean_k, 1) ** 2 if 0 < mean_k <= family.n_experts else None,
            "pool": log_choices(family.pool, family.most, family.fixed),
        },
        "sparse_factor": {unit: sparse_factor(family.n_experts, family.most, m) for unit, m in units.items()},
        "mixture_mass": seen.mass,
        "input_norm": seen.input_norm,
        "norm_product": products,
        "parts_per_token": seen.routed / max(1, seen.tokens),
        "applicable": family.applicable,
        "heuristic": list(dict.fromkeys([*family.heuristic, *remarks])),
    }


def _norm_products(layer: MoELayer) -> tuple[dict[str, float] | None, list[str]]:
    """Product over an expert's matrices, of the worst expert, summed over banks, whose outputs add up: the complexity
    of a sum is at most the sum of complexities. None where a bank has no norms. With it, remarks."""
    products, remarks, known = {"frobenius": 0.0, "spectral": 0.0}, [], True
    for branch in layer.branches:
        norms = branch.norms() if isinstance(branch, ExpertBank) else None
        if norms is not None:
            remarks += [*norms.heuristic, "experts have vector outputs: the complexity is that of a scalar network"]
            products = {kind: sum_ + _worst(getattr(norms, kind)) for kind, sum_ in products.items()}
        elif isinstance(branch, ExpertBank):
            known = False
            remarks.append(f"{type(branch).__name__} has no norms: no expert term")
        else:
            remarks.append(f"{type(branch).__name__} is left out of the expert term")
    return products if known else None, remarks


def _worst(norms: Float[torch.Tensor, "e l"]) -> float:
    return float(norms.double().prod(-1).max())


def _terms(
    families: Sequence[SelectionFamily],
    experts: Mapping[str, float | None],
    m: int,
    delta: float,
    count: Any,
) -> dict[str, float | None]:
    """The terms for m samples: the router's, and what of it is there without any choice of experts (d_N ln(2m) and
    delta); the experts' by Frobenius norms, and by spectral ones (a Lipschitz constant, which no theorem lets stand
    there); the total."""
    router = router_term(families, m, delta, count)
    frobenius = experts["frobenius"]
    return {
        "router": router,
        "router_without_patterns": router_term([_no_choice(family) for family in families], m, delta, "exact"),
        "experts": frobenius,
        "experts_spectral": experts["spectral"],
        "total": None if frobenius is None else router + frobenius,
    }


def _no_choice(family: SelectionFamily) -> SelectionFamily:
    """One expert in place of all: ln N is 0 in the exact count; what is left is d_N ln(2m)."""
    return SelectionFamily(1, 1, 1, True, family.dimension)


def _expert_terms(layers: Mapping[str, Mapping[str, Any]], m: int, lipschitz: float) -> dict[str, float | None]:
    """The greatest of the layers' 4 C R_m by either norm, R_m times the greatest sum of a token's gates where that is
    above 1; None where a layer's is not known."""

    def term(layer: Mapping[str, Any], kind: str) -> float:
        # two matrices, of which the product is that of the worst expert
        complexity = rademacher([layer["norm_product"][kind], 1.0], layer["input_norm"], m)
        return expert_term(complexity * max(1.0, layer["mixture_mass"]), lipschitz)

    known = all(layer["norm_product"] is not None for layer in layers.values())
    kinds = ("frobenius", "spectral")
    return {kind: max(term(layer, kind) for layer in layers.values()) if known else None for kind in kinds}
