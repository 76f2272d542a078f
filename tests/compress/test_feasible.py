"""What cannot be routed or written is refused before anything is measured, with what can be."""

from dataclasses import replace
from pathlib import Path

import pytest

from moestro.compress import LayerPlan, PlanError
from moestro.compress.applying import apply_plan
from moestro.compress.feasible import InfeasibleError, Limits, Output, Wanted, check_method, check_request, limits_of
from moestro.compress.source import RunSource
from moestro.formats import Checkpoint
from moestro.routers import GroupLimit
from tests.compress.folders import plan_for, saved
from tests.compress.models import mixture

PLAIN, GROUPS = Limits(2), Limits(4, n_group=4, topk_group=2, scored_by=2)


def test_a_ratio_becomes_a_number_of_experts():
    assert PLAIN.n_kept(8, 0.0) == 8 and PLAIN.n_kept(8, 0.25) == 6 and PLAIN.n_kept(60, 0.5) == 30
    assert PLAIN.n_kept(8, 0.75) == 2 and GROUPS.n_kept(16, 0.25) == 12 and GROUPS.n_kept(16, 0.5) == 8


@pytest.mark.parametrize(
    ("limits", "ratio", "said"),
    [
        (PLAIN, 0.95, r"ratio=0.95 leaves 1 of 16 experts, fewer than the 2 experts.*allowed up to 0.875"),
        (GROUPS, 0.3, r"removes 5 of 16 experts, but 4 routing groups.*allowed near it: 0.25, 0.5"),
        (GROUPS, 0.75, r"1 in a routing group that is scored by its best 2: allowed up to 0.5"),
        (
            Limits(6, 4, 2),
            0.5,
            r"fewer than the 6 experts that a token visits of its best 2 groups: allowed up to 0.25",
        ),
    ],
)
def test_ratios_that_leave_too_few_name_those_that_do_not(limits, ratio, said):
    with pytest.raises(InfeasibleError, match=said):
        limits.n_kept(16, ratio)


def test_routing_groups_of_unequal_sizes_keep_their_experts():
    class Unequal(RunSource):
        mixtures = {0: ("blocks.0.ffn", mixture(groups=GroupLimit(3, 2, 1, (1, 3, 2))))}  # type: ignore[assignment]

    limits = limits_of(Unequal(Path()))
    assert limits == Limits(2, 3, 2, 1, (1, 3, 2)) and limits.n_kept(6, 0.0) == 6
    with pytest.raises(InfeasibleError, match=r"unequal sizes \[1, 3, 2\] lose no experts .*allowed: 0"):
        limits.n_kept(6, 0.5)
    limits.check(LayerPlan(0, 6, tuple(range(6))))
    with pytest.raises(InfeasibleError, match=r"layer 0 keeps \[1, 2, 2\] experts: routing groups of unequal sizes"):
        limits.check(LayerPlan(0, 6, (0, 1, 2, 4, 5)))


@pytest.mark.parametrize(
    ("family", "limits"),
    [
        ("mixtral", Limits(2)),
        ("deepseek_v2", Limits(2, 4, 2, 1)),
        ("deepseek_v3", Limits(2, 4, 2, 2)),
        ("hunyuan_v1_moe", Limits(2)),
    ],
)
def test_limits_are_those_of_the_configuration(tmp_path, family, limits):
    saved(family, tmp_path)
    assert limits_of(Checkpoint(tmp_path)) == limits


def test_greedy_routing_has_no_groups(tmp_path):
    saved("deepseek_v2", tmp_path, topk_method="greedy")
    assert limits_of(Checkpoint(tmp_path)) == Limits(2)


@pytest.mark.parametrize(
    ("family", "keep", "said"),
    [
        ("mixtral", (3,), "layer 0 keeps 1 of 8 experts, fewer than the 2"),
        ("deepseek_v3", (0, 1, 2, 4, 5, 8, 9, 12, 13), r"keeps \[3, 2, 2, 2\] experts of its 4 routing groups"),
        (
            "deepseek_v3",
            (0, 1, 2, 3, 4, 5, 8, 9, 10, 12, 13, 14),
            r"keeps \[4, 2, 3, 3\] experts of its 4 routing groups",
        ),
        ("deepseek_v3", (0, 4, 8, 12), "1 in a routing group that is scored by its best 2"),
    ],
)
def test_plans_that_break_routing_are_refused(tmp_path, family, keep, said):
    saved(family, tmp_path / "src")
    with pytest.raises(InfeasibleError, match=said):
        apply_plan(tmp_path / "src", plan_for(tmp_path / "src", keep), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_what_stock_folders_cannot_say_is_refused_with_the_alternatives(tmp_path):
    saved("mixtral", tmp_path / "src")
    checkpoint = Checkpoint(tmp_path / "src")
    every = r"'slice' with the same number.*--uniform.*format 'padded' is none for mixtral.*format 'custom'"
    for semantics, per_layer in (("remap", False), ("zero", False), ("slice", True)):
        with pytest.raises(InfeasibleError, match=every):
            check_request(checkpoint, "stock", semantics, per_layer)
        check_request(checkpoint, "custom", semantics, per_layer)
    units = (None, tuple(range(10)), *[None] * 4)
    for plan, what in (
        (plan_for(tmp_path / "src", {0: (0, 1, 2), 1: (0, 1)}), "a number of experts of its own"),
        (plan_for(tmp_path / "src", range(6), units=units), "experts of different widths"),
        (plan_for(tmp_path / "src", range(8), skip_below=0.1), "skipping by gates"),
    ):
        with pytest.raises(InfeasibleError, match=f"a stock folder cannot say {what}.*{every}"):
            apply_plan(tmp_path / "src", plan, tmp_path / "dst")


def test_plans_for_other_layers_experts_and_matrices_are_refused(tmp_path):
    saved("mixtral", tmp_path / "src")
    for keywords, said in (
        ({"units": ((24,), *[None] * 5)}, "unit 24 of an expert of width 24"),
        ({"ranks": (25, *[None] * 5)}, "rank 25 of 24 x 32 matrices"),
    ):
        with pytest.raises(PlanError, match=said):
            apply_plan(
                tmp_path / "src", plan_for(tmp_path / "src", range(6), **keywords), tmp_path / "d", Output("custom")
            )
    plan = plan_for(tmp_path / "src", range(6))
    saved("mixtral", tmp_path / "deep", num_hidden_layers=3)
    deep = plan_for(tmp_path / "deep", range(6))
    broken = type(plan)(plan.method, plan.ratio, plan.source, deep.layers)
    with pytest.raises(PlanError, match=r"the plan has layers \[0, 1, 2\], .* has experts in layers \[0, 1\]"):
        apply_plan(tmp_path / "src", broken, tmp_path / "dst")


@pytest.mark.parametrize(
    ("family", "output", "per_layer", "wanted", "said"),
    [
        (
            "mixtral",
            Output(),
            False,
            Wanted(factors=True),
            "a stock folder cannot say low-rank factors.*format 'custom'",
        ),
        (
            "mixtral",
            Output(),
            False,
            Wanted(skips=True),
            "a stock folder cannot say skipping by gates.*format 'custom'",
        ),
        ("gpt_oss", Output("custom"), False, Wanted(factors=True), "in one tensor, which holds no factors"),
        ("mixtral", Output("custom"), False, Wanted(factors=True, quantises=True), "factors and dead experts are not"),
        ("deepseek_v3", Output("padded"), True, Wanted(quantises=True), "factors and dead experts are not stored"),
    ],
)
def test_what_a_method_will_do_is_refused_before_anything_is_measured(
    tmp_path, family, output, per_layer, wanted, said
):
    saved(family, tmp_path)
    with pytest.raises(PlanError, match=said):
        check_method(Checkpoint(tmp_path), output, per_layer, wanted)
    check_method(Checkpoint(tmp_path), Output("custom", densify=True), False, replace(wanted, factors=False))


def test_quantised_experts_are_neither_merged_nor_factored(tmp_path):
    saved("mixtral", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.config["quantization_config"] = {}
    for wanted in (Wanted(merges=True), Wanted(factors=True)):
        with pytest.raises(PlanError, match="are quantised; they can be dropped, not merged or factored"):
            check_method(checkpoint, Output(densify=True), False, wanted)
    check_method(checkpoint, Output(), False, Wanted())
