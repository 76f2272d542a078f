"""Sizes and free keys are solved, not typed: budgets buy the asked ratio, arms cost what the reference costs."""

import math

import pytest

from moestro.compare.match import match, reference_size, sizes, solve
from moestro.compare.plan import load_comparison
from moestro.experts.widths import arithmetic
from moestro.recipe.build import build_model
from moestro.recipe.syntax import RecipeError
from tests.compare.comparisons import COMPARISON, write_comparison
from tests.conftest import ROOT

VOCABULARY = 257


@pytest.mark.parametrize(("target", "multiple", "best"), [(1000, 1, 100), (1004, 1, 100), (1006, 1, 101), (997, 8, 96)])
def test_the_nearest_multiple_is_found(target, multiple, best):
    assert solve(lambda value: 10.0 * value, target, multiple) == best


def test_costs_that_cannot_be_reached_are_seen():
    assert solve(lambda value: 100.0 + value, 50.0, 1) is None
    assert solve(lambda value: 10.0, 50.0, 1) is None


def test_sizes_buy_the_asked_tokens_a_parameter(tmp_path):
    plan = load_comparison(write_comparison(tmp_path), ("sizes.tokens_per_parameter=[0.5, 4]", "budgets=[5e9]"))
    found = sizes(plan, 5e9, VOCABULARY)
    assert [size.d_model for size in found] == sorted(size.d_model for size in found)
    for size, ratio in zip(found, (4, 0.5), strict=True):

        def distance(d_model, ratio=ratio):
            there = reference_size(plan, d_model, VOCABULARY)
            return abs(math.log(5e9 / there.token_flops / there.parameters / ratio))

        neighbours = [d_model for d_model in (size.d_model - 8, size.d_model + 8) if d_model]
        assert all(distance(size.d_model) < distance(d_model) for d_model in neighbours)


def test_memories_and_experts_behind_product_keys_cost_what_the_dense_model_costs():
    plan = load_comparison(ROOT / "recipes" / "compare" / "memories.yaml")
    found = sizes(plan, plan.budgets[0], 2048)
    assert len(found) == 2 and len(plan.arms) == 5
    for size in found:
        assert all(abs(match(plan, arm, size, 2048).error) < 0.02 for arm in plan.arms)


def test_ratios_that_fall_together_are_refused(tmp_path):
    plan = load_comparison(write_comparison(tmp_path), ("sizes.tokens_per_parameter=[1, 1.01]",))
    with pytest.raises(RecipeError, match="leads to d8 twice.*choose ratios further apart"):
        sizes(plan, 3e7, VOCABULARY)


def test_an_arm_costs_what_the_reference_costs(tmp_path):
    plan = load_comparison(write_comparison(tmp_path))
    size = reference_size(plan, 32, VOCABULARY)
    matched = match(plan, "moe", size, VOCABULARY)
    assert abs(matched.error) < 0.02
    model = build_model(plan.recipe("moe", matched.settings), VOCABULARY, device="meta")
    assert 3 * model.expected_token_flops(16) == matched.token_flops
    assert matched.settings["model.ffn.branches.0.widths.total"] % 4 == 0
    assert match(plan, "dense", size, VOCABULARY).error == 0


def test_a_key_that_cannot_reach_the_cost_is_refused(tmp_path):
    text = COMPARISON.replace("solve: model.ffn.branches.0.widths.total, multiple_of: 4", "solve: train.batch_size")
    plan = load_comparison(write_comparison(tmp_path, text))
    with pytest.raises(RecipeError, match=r"no value of train.batch_size gives .* FLOPs a token.*arms.moe.solve"):
        match(plan, "moe", reference_size(plan, 32, VOCABULARY), VOCABULARY)


def test_ways_of_routing_cost_what_top_2_costs():
    """The systems of routing side by side in one comparison; those that choose how many experts a token takes start
    where they start."""
    plan = load_comparison(ROOT / "recipes" / "compare" / "routing.yaml")
    assert {"moe", "hmoe", "dynmoe", "dynamic_routing", "xmoe", "moec", "stratified", "multi_head"} <= set(plan.arms)
    (size,) = sizes(plan, plan.budgets[0], 2048)
    errors = {arm: match(plan, arm, size, 2048).error for arm in plan.arms}
    free = {"dynamic_routing"}
    assert all(abs(error) < 0.01 for arm, error in errors.items() if arm not in free), errors


def test_narrowest_layers_may_leave_experts_without_units():
    """The search for a width begins at one multiple, which may be fewer units than there are experts."""
    assert arithmetic(8, 4, 4) == [0, 0, 0, 0, 0, 0, 0, 4]
    with pytest.raises(ValueError, match="n_experts=0, allowed: 1 to 65536"):
        arithmetic(0, 4)
