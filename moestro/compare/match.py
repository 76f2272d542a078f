"""Sizes at equal compute: from a budget to model sizes, and from a size to each arm's free key."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from moestro.compare.plan import Comparison
from moestro.model.active import total_parameters
from moestro.recipe.build import build_model
from moestro.recipe.load import Recipe
from moestro.recipe.syntax import RecipeError

# Widest model and largest value of a solved key that are tried.
LARGEST = 1 << 22


@dataclass(frozen=True)
class Size:
    """One model size: the reference's width, its training FLOPs for a token, and its parameters."""

    d_model: int
    token_flops: float
    parameters: int

    @property
    def name(self) -> str:
        return f"d{self.d_model}"


@dataclass(frozen=True)
class Match:
    """An arm at a size: the keys to set, and how far its expected FLOPs for a token lie from the reference's (0.01 is
    1 % more)."""

    settings: dict[str, int]
    token_flops: float
    error: float


def training_flops(recipe: Recipe, vocab_size: int) -> float:
    """Those of a token of the recipe's model (`Transformer.expected_training_flops`)."""
    return build_model(recipe, vocab_size, device="meta").expected_training_flops(recipe.data.value("seq_len"))


def sizes(plan: Comparison, budget: float, vocab_size: int) -> list[Size]:
    """For each ratio of the plan the width at which `budget` buys nearest to so many tokens a parameter: the smallest
    width where even that gets fewer.

    Raises: RecipeError where two ratios lead to the same width.
    """
    found: list[Size] = []
    tried: list[tuple[float, Size]] = []
    ratios = plan.sizes.tokens_per_parameter
    for step in count(1):
        size = reference_size(plan, step * plan.sizes.d_model_multiple_of, vocab_size)
        ratio = budget / size.token_flops / size.parameters
        tried.append((ratio, size))
        if ratio < min(ratios) or size.d_model > LARGEST:
            break
    for ratio in ratios:
        _, nearest = min(tried, key=lambda pair: abs(math.log(pair[0] / ratio)))
        if nearest in found:
            raise RecipeError(
                f"tokens_per_parameter={list(ratios)} leads to {nearest.name} twice at a budget of {budget:.3g} FLOPs; "
                f"choose ratios further apart, a smaller d_model_multiple_of or a larger budget ({plan.path}: sizes)"
            )
        found.append(nearest)
    return sorted(found, key=lambda size: size.d_model)


def reference_size(plan: Comparison, d_model: int, vocab_size: int) -> Size:
    """The reference arm at one width."""
    with plan.blamed(plan.reference):
        recipe = plan.recipe(plan.reference, plan.width_settings(plan.reference, d_model))
        parameters = total_parameters(build_model(recipe, vocab_size, device="meta"))
        return Size(d_model, training_flops(recipe, vocab_size), parameters)


def match(plan: Comparison, arm: str, size: Size, vocab_size: int) -> Match:
    """The arm at this size, its free key solved so that a token costs what it costs the reference.

    Raises: RecipeError where the key does not move the FLOPs, or cannot reach them.
    """
    settings: dict[str, Any] = plan.width_settings(arm, size.d_model)
    key, multiple = plan.arms[arm].solve, plan.arms[arm].multiple_of

    def cost(changes: dict[str, int]) -> float:
        with plan.blamed(f"{arm}.solve" if changes else arm):
            return training_flops(plan.recipe(arm, {**settings, **changes}), vocab_size)

    if key is None:
        flops = cost({})
        return Match(settings, flops, flops / size.token_flops - 1)

    value = solve(lambda value: cost({key: value}), size.token_flops, multiple)
    if value is None:
        raise RecipeError(
            f"no value of {key} gives {size.token_flops:.4g} training FLOPs a token: at {multiple} it is "
            f"{cost({key: multiple}):.4g} ({plan.path}: arms.{arm}.solve)"
        )
    flops = cost({key: value})
    return Match({**settings, key: value}, flops, flops / size.token_flops - 1)


def solve(cost: Callable[[int], float], target: float, multiple: int) -> int | None:
    """The multiple of `multiple` whose cost is nearest to `target`, for a cost that grows with it; None where even the
    smallest costs more than a quarter too much, or no multiple reaches the target."""
    low, high = 1, 1
    if cost(multiple) > 1.25 * target:
        return None
    while cost(high * multiple) < target:
        low, high = high, high * 2
        if high > LARGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle * multiple) < target else (low, middle)
    return min((low * multiple, high * multiple), key=lambda value: abs(cost(value) - target))
