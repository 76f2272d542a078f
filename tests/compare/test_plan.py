"""Comparisons are read strictly: what is wrong, what is allowed, and where."""

import pytest

from moestro.compare.plan import load_comparison
from moestro.recipe.syntax import RecipeError
from tests.compare.comparisons import COMPARISON, write_comparison


def test_every_arm_gets_its_recipe_the_common_keys_and_its_own(tmp_path):
    text = COMPARISON.replace("moe.yaml,", "moe.yaml, set: {optim.lr: 0.5},") + "common: {train.batch_size: 4}\n"
    plan = load_comparison(write_comparison(tmp_path, text))
    assert plan.recipe("moe").tree["optim"]["lr"] == 0.5
    assert plan.recipe("dense").tree["optim"]["lr"] == 2e-3
    assert plan.recipe("dense").tree["train"]["batch_size"] == plan.recipe("moe").tree["train"]["batch_size"] == 4
    assert plan.recipe("dense", {"train.seed": 3}).tree["train"]["seed"] == 3


def test_keys_proportional_to_the_width_are_rounded(tmp_path):
    plan = load_comparison(write_comparison(tmp_path))
    assert plan.width_settings("dense", 24) == {
        "model.d_model": 24,
        "model.attention.n_heads": 3,
        "model.ffn.width": 64,
    }
    assert plan.width_settings("moe", 24) == {"model.d_model": 24, "model.attention.n_heads": 3}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reference: dense", "reference: dnse", r"reference='dnse', allowed: dense, moe \(.*tiny.yaml: reference\)"),
        ("budgets:", "budget:", "unknown key 'budget'; did you mean 'budgets'"),
        ("seeds: [0]", "seeds: []", r"seeds=\[\], allowed: at least one, none twice"),
        ("seeds: [0]", "seeds: [1, 1]", r"seeds=\[1, 1\], allowed: at least one, none twice"),
        ("seeds: [0]", "seeds: [-1]", r"seeds=\[-1\], allowed: at least one, none twice, none below 0"),
        ("[3e7]", "[0]", "allowed: FLOPs above 0"),
        ("[3e7]", "[]", "allowed: FLOPs above 0, at least one number"),
        ("[3e7]", "[3.001e7, 3.002e7]", "none twice in its first three digits, which name its runs"),
        ("evaluations: 2", "final_tokens: 0", "final_tokens=0, allowed: at least 1"),
        ("[3e7]", "lots", "expected a list; got 'lots'"),
        ("[0.04]", "[-1]", r"got \[-1.0\], allowed: numbers above 0"),
        ("evaluations: 2", "evaluations: 0", "evaluations=0, allowed: at least 1"),
        ("[2.5, 8]", "2.5", r"got 2.5, allowed: \[share of d_model, whole number to round to\]"),
        ("[2.5, 8]", "[1e999, 8]", r"got \[inf, 8\], allowed: \[share of d_model, whole number to round to\]"),
        ("recipe: moe.yaml", "recipe: mo.yaml", r"mo.yaml"),
        ("solve: model.ffn", "slove: model.ffn", r"unknown key 'slove'; did you mean 'solve'.*arms.moe"),
        ("{recipe: dense.yaml,", "{recipe: dense.yaml, solve: model.d_model,", "gives the sizes and solves nothing"),
        ("recipe: moe.yaml,", "recipe: moe.yaml, set: {data.seq_len: 8},", "data differs from that of the reference"),
        ("recipe: moe.yaml,", "recipe: moe.yaml, set: {model.widht: 8},", "unknown key 'widht'"),
    ],
)
def test_mistakes_are_refused(tmp_path, old, new, message):
    assert old in COMPARISON
    with pytest.raises(RecipeError, match=message):
        load_comparison(write_comparison(tmp_path, COMPARISON.replace(old, new, 1)))


def test_a_nested_setting_changes_one_key_and_keeps_its_neighbours(tmp_path):
    plan = load_comparison(write_comparison(tmp_path), ("common.optim.lr=0.25", "common.train.batch_size=4"))
    for arm in ("dense", "moe"):
        tree = plan.recipe(arm).tree
        assert tree["optim"]["lr"] == 0.25
        assert tree["optim"]["schedule"]["kind"] == "constant"
        assert tree["train"]["batch_size"] == 4
        assert tree["train"]["budget"] == {"steps": 3}


def test_a_part_among_the_settings_replaces_the_part(tmp_path):
    text = COMPARISON + "common: {optim: {schedule: {kind: wsd}}}\n"
    plan = load_comparison(write_comparison(tmp_path, text))
    assert plan.recipe("dense").tree["optim"]["schedule"] == {"kind": "wsd"}
    assert plan.recipe("dense").tree["optim"]["lr"] == 2e-3


def test_the_command_line_overrides_the_file(tmp_path):
    assert load_comparison(write_comparison(tmp_path), ("seeds=[4, 5]",)).seeds == (4, 5)
