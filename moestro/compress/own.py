"""A plan applied to a run of our own: smaller banks, and the recipe that says so, in a run folder like any other."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from moestro.compress.applied import apply_to
from moestro.compress.applying import outside
from moestro.compress.feasible import limits_of
from moestro.compress.fingerprint import fingerprint, require_source
from moestro.compress.plan import Plan, PlanError
from moestro.compress.plan_file import plan_text
from moestro.compress.source import RunSource, bank_node
from moestro.layers.moe import MoELayer
from moestro.recipe.build import build_model
from moestro.recipe.load import Recipe, check_recipe
from moestro.recipe.resolve import Origin

PLAN = "compression_plan.json"


def apply_to_run(source: RunSource, plan: Plan, destination: Path) -> Path:
    """The run in `source` with its layers as the plan says, as a finished run in `destination` (of an export: an
    export): its recipe lists the widths of every layer, its checkpoint has the step of the source's. The model is in
    memory; low-rank factors are multiplied out. Applied again, nothing happens.

    Raises: PlanError where the plan is for another run, or a layer cannot be said in a recipe.
    """
    destination = outside(source.path, destination)
    require_source(plan, fingerprint(source), source.path)
    _check(plan, source)
    text = plan_text(plan)
    if destination.exists():
        said = destination / PLAN
        if said.is_file() and said.read_text(encoding="utf-8") == text:
            return destination
        raise PlanError(f"{destination} exists and is no finished compression by this plan: choose another folder")
    model = source.loaded()
    layers = {number: model.get_submodule(name) for number, (name, _) in source.mixtures.items()}
    for layer in plan.layers:
        if not layer.identical:
            apply_to(layers[layer.layer], layer, plan.semantics, plan.merged_rows)  # type: ignore[arg-type]
    recipe = _recipe(source, layers, plan)
    _require_same_shapes(recipe, model, source.tokenizer.vocab_size)
    return source.write(model, recipe, {PLAN: text}, destination)


def _check(plan: Plan, source: RunSource) -> None:
    if [layer.layer for layer in plan.layers] != list(source.moe_layers):
        found = [layer.layer for layer in plan.layers]
        raise PlanError(f"the plan has layers {found}, {source.path} has experts in {list(source.moe_layers)} (layers)")
    if plan.semantics != "slice" or plan.quantise or plan.tensors or any(x.skip_below is not None for x in plan.layers):
        raise PlanError(
            "a run's plan may drop, merge, narrow and thin experts; allowed: semantics 'slice', nothing else"
        )
    limits = limits_of(source)
    for layer in plan.layers:
        if layer.n_experts != source.n_experts(layer.layer):
            raise PlanError(f"layer {layer.layer} has {source.n_experts(layer.layer)} experts, not {layer.n_experts}")
        limits.check(layer)


def _recipe(source: RunSource, layers: dict[int, Any], plan: Plan) -> Recipe:
    """The source's recipe with the changed layers written out."""
    tree = copy.deepcopy(source.recipe.resolved)
    model = tree["model"]
    for layer in plan.layers:
        if layer.identical:
            continue
        node = copy.deepcopy(source.layer_node(layer.layer))
        moe: MoELayer = layers[layer.layer]
        for branch in node["branches"]:
            if "n_experts" in branch:
                branch["n_experts"] = moe.router.n_experts
        bank_node(node, moe)["widths"] = [int(width) for width in moe.bank.row_widths().tolist()]  # type: ignore
        if moe.cluster is not None:
            node["clusters"] = moe.cluster.tolist()
        model["layers"][layer.layer] = node
    return check_recipe(Recipe(tree, Origin(source.config_file, tree)))


def _require_same_shapes(recipe: Recipe, model: nn.Module, vocab: int) -> None:
    """Raises: PlanError where the recipe describes another model than the one in memory."""
    described = {name: tuple(t.shape) for name, t in build_model(recipe, vocab, "meta").state_dict().items()}
    there = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    if described != there:
        name = next(iter(described.items() ^ there.items()))[0]
        raise PlanError(f"{name}: a recipe cannot describe what the plan makes of this layer")
