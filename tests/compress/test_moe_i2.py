"""MoE-I2 as a whole, and the methods that remove experts by score or damage."""

from contextlib import ExitStack
from itertools import combinations

import pytest
import torch

from moestro.compress.applied import applied
from moestro.compress.calibration import Ask, calibrate
from moestro.compress.criteria import removed
from moestro.compress.masking import without
from moestro.compress.moe_i2 import Settings, counts_of, importance, moe_i2
from moestro.compress.plan import LayerPlan
from moestro.compress.pruning import (
    SCORED,
    Subject,
    by_damage,
    by_scores,
    groups_of,
    layer_by_layer,
    most_removed,
    searched,
    uniform,
    with_skipping,
)
from moestro.compress.search import Genetic
from moestro.evaluate import evaluate
from moestro.routers import BiasedRouter, GroupLimit, LinearScore, TopP
from tests.compress.models import D, E, decoder, text


def subject(layers="mmm", **asked) -> Subject:
    model = decoder(layers)
    return Subject(model, calibrate(model, text(3), Ask(**asked)))


def test_ratio_0_keeps_everything_and_searches_nothing(monkeypatch):
    given = subject()
    for name in ("evolve", "Choice.all"):
        monkeypatch.setattr(f"moestro.compress.search.{name}", lambda *_: pytest.fail("searched"))
    plans = moe_i2(given, text(3), Settings(ratio=0.0))
    assert all(plan.identical for plan in plans)
    batch = text(1)[0]
    with torch.no_grad():
        assert torch.equal(applied(given.model, plans)(batch.tokens).logits, given.model(batch.tokens).logits)


def test_importance_is_what_removing_each_expert_costs():
    given, batches = subject("mm"), text(3)
    layer, x = given.layers["blocks.1.ffn"], given.seen("blocks.1.ffn").inputs
    whole, losses = evaluate(given.model, batches)["loss"], []
    with torch.no_grad():
        y, errors = layer(x)[0], []
        for expert in range(E):
            with without(layer, [expert]):
                losses.append(max(0.0, evaluate(given.model, batches)["loss"] - whole))
                errors.append(float((layer(x)[0] - y).norm()))
    assert importance(given, batches, "recon")["blocks.1.ffn"] == pytest.approx(errors, rel=1e-6)
    assert importance(given, batches, "loss")["blocks.1.ffn"] == pytest.approx(losses, abs=1e-12)
    assert max(losses) > 0


def test_counts_sum_to_the_ratio_and_follow_importance():
    given = subject()
    missed = {name: [value] * E for name, value in zip(given.layers, (1.0, 2.0, 6.0), strict=True)}
    counts = counts_of(given, missed, Settings(ratio=0.5))
    assert sum(counts.values()) == 9 and list(counts.values()) == sorted(counts.values(), reverse=True)
    assert max(counts.values()) <= E - 2
    assert set(counts_of(given, missed, Settings(ratio=0.5, counts="uniform")).values()) == {3}


def test_the_whole_of_it_prunes_as_much_as_asked_and_ranks_hit_their_mean():
    given = subject()
    plans = moe_i2(given, text(3), Settings(ratio=0.3, fraction=0.7))
    assert sum(plan.n_experts - plan.n_kept for plan in plans) == round(0.3 * 18)
    mean = int(0.7 * D * 5 / (D + 5))
    for plan in plans:
        assert plan.ranks is not None and sum(plan.ranks) == mean * plan.n_kept
        assert list(plan.scores) == ["damage alone", "frequency", "gate-sum", "man", "reap"] and plan.entropy > 0
    assert moe_i2(given, text(3), Settings(ratio=0.3, fraction=0.7)) == plans


def test_block_choices_are_no_worse_than_the_layers_own():
    given, batches = subject(), text(3)
    refined = moe_i2(given, batches, Settings(ratio=0.3, counts="uniform"))
    alone = by_damage(given, uniform(given, 0.3))

    def error(plans):
        states = []
        for model in (given.model, applied(given.model, plans)):
            handle = model.blocks[-1].register_forward_hook(lambda _m, _a, output: states.append(output[0]))
            with torch.no_grad():
                for batch in batches:
                    model(batch.tokens, documents=batch.documents, keep=batch.keep)
            handle.remove()
        half = len(states) // 2
        return sum(float((a - b).square().sum()) for a, b in zip(states[:half], states[half:], strict=True))

    assert error(refined) <= error(alone) * (1 + 1e-9)


def test_layer_by_layer_each_set_is_the_best_on_what_the_layers_before_leave():
    """Every set of every layer, its output written out on the inputs of the pruned model."""
    given, batches = subject("mmm"), text(3)
    counts = dict.fromkeys(given.layers, 2)
    plans = layer_by_layer(given, batches, counts)
    assert plans[0].keep == by_damage(given, counts)[0].keep
    gone: dict[str, tuple[int, ...]] = {}
    for plan, (name, layer) in zip(plans, given.layers.items(), strict=True):
        inputs = []
        with ExitStack() as stack, torch.no_grad():
            for before, experts in gone.items():
                stack.enter_context(without(given.layers[before], experts))
            for batch in batches:
                traces = given.model(batch.tokens, documents=batch.documents, keep=batch.keep).traces
                inputs += [trace.x for trace in traces if trace.layer is layer]
            x = torch.cat(inputs)
            whole, errors = layer(x)[0], {}
            for subset in combinations(range(E), 2):
                with without(layer, subset):
                    errors[subset] = float((layer(x)[0] - whole).norm())
        best = min(errors, key=errors.__getitem__)
        assert removed(plan.keep, E) == best
        gone[name] = best
    assert all(bool(layer.router.available.all()) for layer in given.layers.values())


def test_a_planted_dead_expert_goes_first_whatever_the_method():
    given = subject("m")
    layer = given.layers["blocks.0.ffn"]
    with torch.no_grad():
        layer.bank.w_out.weight[layer.bank.w_out.rows_of(4)] = 0
        layer.router.score.weight[4] *= 0.02
    given = Subject(given.model, calibrate(given.model, text(3), Ask()))
    one = uniform(given, 1 / 6)
    for plans in (
        by_scores(given, "reap", one),
        by_scores(given, "man", one),
        by_damage(given, one),
        moe_i2(given, text(3), Settings(ratio=1 / 6)),
    ):
        assert plans[0].keep == (0, 1, 2, 3, 5)


@pytest.mark.parametrize("criterion", SCORED)
def test_scores_keep_the_highest(criterion):
    given = subject("mm")
    plans = by_scores(given, criterion, uniform(given, 0.5))
    assert [plan.n_kept for plan in plans] == [3, 3]
    if criterion != "random":
        scores = plans[1].scores[criterion]
        assert min(scores[e] for e in plans[1].keep) >= max(scores[e] for e in range(E) if e not in plans[1].keep)
    assert by_scores(given, criterion, uniform(given, 0.5)) == plans


def test_the_genetic_search_finds_what_enumeration_finds_in_a_model():
    given = subject("mm")
    counts = uniform(given, 0.5)
    exact = searched(given, counts, 3)
    genetic = searched(given, counts, 3, enumerable=0, genetic=Genetic(12, 12))
    assert all(genetic[name].subsets[0] == exact[name].subsets[0] for name in exact)
    with pytest.raises(ValueError, match="20 subsets of 3 of 6"):
        searched(given, counts, enumerable=10)


def test_routing_groups_stay_equal():
    given = subject("m")
    layer = given.layers["blocks.0.ffn"]
    layer.router = BiasedRouter(LinearScore(D, E), 2, limit=GroupLimit(3, 2)).double()
    assert groups_of(layer) == 3 and most_removed(layer) == 4
    given = Subject(given.model, calibrate(given.model, text(3), Ask()))
    for plans in (by_scores(given, "reap", {"blocks.0.ffn": 3}), by_damage(given, {"blocks.0.ffn": 3})):
        assert [sum(e // 2 == group for e in plans[0].keep) for group in range(3)] == [1, 1, 1]
    assert uniform(given, 0.25) == {"blocks.0.ffn": 0}
    with pytest.raises(ValueError, match="counts='uniform'"):
        moe_i2(given, text(3), Settings(ratio=0.5))


def test_skipping_takes_the_median_of_the_planned_layer():
    given = subject("m")
    (plan,) = with_skipping(given, [LayerPlan(0, E, (0, 2, 3, 5))])
    layer, x = given.layers["blocks.0.ffn"], given.seen("blocks.0.ffn").inputs
    with without(layer, [1, 4]):
        first, second = layer.router(x).dense().detach().topk(2).values.double().unbind(1)
    assert plan.skip_below == pytest.approx(float((second / first).quantile(0.5)), rel=1e-6)
    gates = applied(given.model, [plan]).moe_layers()["blocks.0.ffn"].router(x).dense()
    assert 0.4 <= float(((gates > 0).sum(1) == 1).double().mean()) <= 0.6
    layer.router.select = TopP(0.6)
    with pytest.raises(ValueError, match="as many experts"):
        with_skipping(given, [LayerPlan(0, E, (0, 2, 3, 5))])


def test_impossible_settings_are_refused():
    given = subject("m")
    with pytest.raises(ValueError, match="criterion='reep'"):
        by_scores(given, "reep", {})
    with pytest.raises(ValueError, match="5 of 6 experts, allowed: 4"):
        uniform(given, 0.8)
    with pytest.raises(ValueError, match="ratio 0 to below 1"):
        Settings(ratio=1.0)
    with pytest.raises(ValueError, match="fraction=2"):
        Settings(fraction=2)
    unsampled = Subject(given.model, calibrate(given.model, text(), Ask(sample=0)))
    with pytest.raises(ValueError, match="no tokens were sampled"):
        by_damage(unsampled, {"blocks.0.ffn": 1})
