"""Experts that become one: groups, weights, errors, and what a model loses by it."""

from dataclasses import replace

import pytest
import torch

from moestro.compress.applied import applied
from moestro.compress.calibration import Ask, calibrate
from moestro.compress.choosing import chosen_by_measuring, measured
from moestro.compress.feed_forward import FeedForward
from moestro.compress.merging import (
    HC_SMOE,
    SIMILARITIES,
    Settings,
    learned,
    merge_error,
    merge_plans,
    similarity,
    warnings,
)
from moestro.compress.observed import expert_output
from moestro.compress.partition import agglomerate
from moestro.compress.plan import Group, LayerPlan, PlanError, rows_of
from moestro.compress.pruning import Subject
from moestro.compress.similarity import output_distance
from moestro.evaluate import evaluate
from moestro.routers import BiasedRouter
from moestro.routers.groups import GroupLimit
from tests.compress.models import E, decoder, text


def subject(layers="mm", seed=0) -> Subject:
    model = decoder(layers, seed)
    return Subject(model, calibrate(model, text(8), Ask(everywhere=True)))


def planted(noise=0.02) -> Subject:
    """Expert 3 + e is expert e once more, nearly, its hidden units in another order, with a router row of its own."""
    model = decoder("mm")
    for number, layer in enumerate(model.moe_layers().values()):
        bank = FeedForward.of(layer)
        units = [bank.units(e) for e in range(3)]
        draw = torch.Generator().manual_seed(number)
        copies = [u + noise * torch.randn(u.shape, generator=draw, dtype=u.dtype) for u in units]
        copies = [u[torch.randperm(len(u), generator=draw)] for u in copies]
        layer.branches[0] = bank.bank_of([*units, *copies])
    return Subject(model, calibrate(model, text(8), Ask(everywhere=True)))


def logits(model):
    with torch.no_grad():
        return torch.cat([model(batch.tokens, documents=batch.documents).logits for batch in text(8)])


@pytest.mark.parametrize("kind", SIMILARITIES)
def test_planted_copies_are_grouped_by_every_similarity(kind):
    plans = merge_plans(planted(), Settings(ratio=0.5, similarity=kind))
    assert [sorted(g.members for g in plan.groups) for plan in plans] == [[(0, 3), (1, 4), (2, 5)]] * 2


@pytest.mark.parametrize("merge", ["uniform", "frequency", "learned"])
def test_copies_merge_nearly_without_loss_where_units_are_aligned(merge):
    given = planted(0.01)
    settings = Settings(ratio=0.5, merge=merge)
    before = logits(given.model)
    loss = [
        float((logits(applied(given.model, merge_plans(given, s), "remap")) - before).norm() / before.norm())
        for s in (settings, replace(settings, align=False))
    ]
    assert loss[0] < 0.05 and loss[1] > 2 * loss[0]


def test_exact_copies_merge_without_loss():
    given = planted(0.0)
    plans = merge_plans(given, Settings(ratio=0.5))
    torch.testing.assert_close(logits(applied(given.model, plans, "remap")), logits(given.model), rtol=1e-6, atol=1e-8)


def test_nothing_merged_is_nothing_changed():
    given = subject()
    assert all(plan.identical for plan in merge_plans(given, Settings(ratio=0.0)))


def test_frequency_weights_are_shares_of_rows_and_the_most_met_member_is_kept():
    given = subject("m")
    (plan,) = merge_plans(given, Settings(ratio=0.5))
    rows = given.seen("blocks.0.ffn").rows.tolist()
    for kept, group in zip(plan.keep, plan.groups, strict=True):
        total = sum(rows[member] for member in group.members)
        assert group.weights == pytest.approx([rows[member] / total for member in group.members])
        assert rows[kept] == max(rows[member] for member in group.members)
    assert sorted(member for group in plan.groups for member in group.members) == list(range(E))


def test_pruning_by_groups_keeps_one_member_as_it_is():
    given = subject("m")
    (plan,) = merge_plans(given, Settings(ratio=0.5, merge="prune"))
    layer = applied(given.model, [plan], "remap").moe_layers()["blocks.0.ffn"]
    for place, kept in enumerate(plan.keep):
        assert torch.equal(FeedForward.of(layer).units(place), FeedForward.of(given.layers["blocks.0.ffn"]).units(kept))


def test_learned_weights_err_no_more_than_equal_ones():
    better = 0
    for seed in range(4):
        given = subject("m", seed)
        layer, x = given.layers["blocks.0.ffn"], given.seen("blocks.0.ffn").inputs
        weights = learned(layer, (0, 2, 5), 2, x, align=True)
        assert sum(weights) == pytest.approx(1) and min(weights) > 0
        errors = [merge_error(layer, Group((0, 2, 5), w, True), 2, x) for w in (weights, (1 / 3,) * 3)]
        assert errors[0] <= errors[1] + 1e-12
        better += errors[0] < 0.999 * errors[1]
    assert better >= 2


def test_merge_error_is_that_of_the_equation():
    given = subject("m")
    layer, x = given.layers["blocks.0.ffn"], given.seen("blocks.0.ffn").inputs
    group = Group((1, 4), (0.25, 0.75))
    bank = FeedForward.of(layer)
    single = bank.bank_of([0.25 * bank.units(1) + 0.75 * bank.units(4)])
    with torch.no_grad():
        gates = layer.router(x).dense()
        target = gates[:, 1:2] * expert_output(layer, 1, x) + gates[:, 4:5] * expert_output(layer, 4, x)
        mine = single.run(x, torch.tensor([0, len(x)])) * gates[:, [1, 4]].sum(1, keepdim=True)
    expected = float((target - mine).norm() / target.norm())
    assert merge_error(layer, group, 1, x) == pytest.approx(expected, rel=1e-6)


def test_groups_that_err_too_much_are_refused():
    with pytest.raises(ValueError, match="errs by"):
        merge_plans(subject(), Settings(ratio=0.5, bound=0.05))
    assert merge_plans(planted(0.001), Settings(ratio=0.5, bound=0.05))


def test_plans_say_how_alike_experts_are_and_by_how_much_groups_err():
    given = subject("m")
    (plan,) = merge_plans(given, Settings(ratio=0.5))
    layer, x = given.layers["blocks.0.ffn"], given.seen("blocks.0.ffn").inputs
    alike = similarity(given, "blocks.0.ffn", "cka-outputs")
    others = [float(alike[e, [o for o in range(E) if o != e]].mean()) for e in range(E)]
    assert plan.scores["similarity"] == pytest.approx(others)
    for kept, group in zip(plan.keep, plan.groups, strict=True):
        expected = merge_error(layer, group, kept, x) if len(group.members) > 1 else 0.0
        assert [plan.scores["merge error"][member] for member in group.members] == [expected] * len(group.members)


@pytest.mark.parametrize("kind", ["cka-outputs", "mean-outputs"])
def test_a_router_that_ranks_groups_loses_equally_many_of_each(kind):
    # 3 groups of 2 consecutive experts, of which a token looks in 2
    given = planted()
    for layer in given.layers.values():
        layer.router.select.limit = GroupLimit(3, 2)
    with pytest.raises(ValueError, match="2 of 6 experts, allowed: equally many of 3 routing groups"):
        merge_plans(given, Settings(ratio=1 / 3, similarity=kind))
    with pytest.raises(ValueError, match="must lose equally many"):
        merge_plans(given, Settings(ratio=0.5, everywhere=True))
    # copies lie in other groups, and are not joined
    for plan in merge_plans(given, Settings(ratio=0.5, similarity=kind)):
        assert [group.members for group in sorted(plan.groups, key=lambda g: g.members)] == [(0, 1), (2, 3), (4, 5)]


def test_hc_smoe_links_mean_outputs_and_weighs_by_frequency():
    given = subject("m")
    (plan,) = merge_plans(given, replace(HC_SMOE, ratio=0.5))
    layer = given.layers["blocks.0.ffn"]
    with torch.no_grad():
        batches = text(8)
        x = torch.cat([given.model(b.tokens, documents=b.documents, keep=b.keep).traces[0].x for b in batches])
        means = torch.stack([expert_output(layer, e, x).mean(0) for e in range(E)])
    expected = agglomerate([output_distance(means)], 3)[0]
    assert sorted(group.members for group in plan.groups) == expected
    assert not any(group.align for group in plan.groups)


def test_one_budget_for_all_layers_gives_unequal_counts():
    given = planted(0.01)
    layer = given.layers["blocks.1.ffn"]
    draw = torch.Generator().manual_seed(9)
    own = [torch.randn(5, 24, generator=draw, dtype=torch.float64) for _ in range(E)]
    layer.branches[0] = FeedForward.of(layer).bank_of(own)
    given = Subject(given.model, calibrate(given.model, text(8), Ask(everywhere=True)))
    plans = merge_plans(given, Settings(ratio=0.25, everywhere=True))
    assert [plan.n_kept for plan in plans] == [3, 6]


def test_unlike_experts_are_warned_of():
    given = subject()
    plans = merge_plans(given, Settings(similarity="cosine-outputs"))
    assert len(warnings(plans, "cosine-outputs")) == 2
    assert "layer 0: mean similarity of experts" in warnings(plans, "cosine-outputs")[0]
    alike = [replace(plan, scores={"similarity": [0.9] * E}) for plan in plans]
    assert warnings(alike, "cka-outputs") == warnings(plans, "mean-outputs") == []
    assert similarity(given, "blocks.0.ffn", "mean-outputs").max() <= 0


def test_plans_to_choose_from_are_measured_with_the_router_rows_that_are_written():
    given = subject()
    plans = merge_plans(given, Settings(ratio=0.5))
    assert rows_of(plans) == "mean" and rows_of(merge_plans(given, Settings(ratio=0.0))) == "kept"
    written = evaluate(applied(given.model, plans, "slice", "mean"), text(4))["loss"]
    assert measured(given.model, {"merge": plans}, text(4), "slice") == {"merge": written}
    assert evaluate(applied(given.model, plans, "slice", "kept"), text(4))["loss"] != written


def test_a_loss_that_is_no_number_chooses_nothing():
    model = decoder("m")
    (mixture,) = model.moe_layers().values()
    with torch.no_grad():
        mixture.bank.w_out.weight[-1] = torch.nan
    whole, smaller = ([LayerPlan(0, E, tuple(range(kept)))] for kept in (E, E - 1))
    with pytest.raises(PlanError, match="losses to choose by: frequency: nan, allowed: finite"):
        chosen_by_measuring(model, {"frequency": lambda: whole, "reap": lambda: smaller}, text(4))


def test_biases_of_merged_experts_are_means_as_their_rows_are():
    model = decoder("m")
    (layer,) = model.moe_layers().values()
    layer.router = BiasedRouter(layer.router.score, 2)
    layer.router.bias.copy_(torch.arange(E) / 10)
    row, bias = layer.router.score.weight.detach().clone(), layer.router.bias.clone()
    groups = (Group((0, 4), (0.25, 0.75)), *(Group((e,), (1.0,)) for e in (1, 2, 3, 5)))
    plan = LayerPlan(0, E, (0, 1, 2, 3, 5), groups)
    (smaller,) = applied(model, [plan], "slice", "mean").moe_layers().values()
    for have, old in ((smaller.router.score.weight, row), (smaller.router.bias, bias)):
        torch.testing.assert_close(have[0], 0.25 * old[0] + 0.75 * old[4])
        assert torch.equal(have[1:], old[[1, 2, 3, 5]])


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="similarity one of cka-outputs"):
        Settings(similarity="cka")
    bare = subject("m")
    bare = Subject(bare.model, calibrate(bare.model, text(), Ask(sample=0)))
    with pytest.raises(ValueError, match="no tokens were sampled"):
        merge_plans(bare, Settings())
    with pytest.raises(AttributeError, match="'outputs' was not collected"):
        merge_plans(bare, HC_SMOE)
