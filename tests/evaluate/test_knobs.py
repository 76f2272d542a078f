"""Knobs turn what a trained model spends, and nothing else; a setting's figures are those of a model built with it."""

from collections.abc import Callable

import pytest
import torch

from moestro import FFNBank, LinearScore, MoELayer, ProductKeyRouter, ScoredRouter, SingletonBank, Soft, TopK, TopP
from moestro.evaluate import evaluate, knobs, quality_curve
from moestro.evaluate.knobs import allowed, ladder, setting, spending, turned
from moestro.layers import Layer
from moestro.model import Attention, Block, Transformer
from moestro.routers import BiasedRouter, Capacity, GroupedRouter, Router, Select
from moestro.routers.groups import GroupLimit
from tests.train.tiny import Counting, tiny_model


def scored(select: Select) -> Router:
    return ScoredRouter(LinearScore(8, 4, init_std=1.0), select)


def decoder(*routers: Router) -> Transformer:
    torch.manual_seed(0)
    layers: list[Layer] = [MoELayer(router, [FFNBank(8, [2, 4, 6, 8])]) for router in routers]
    return Transformer(11, 8, [Block(8, Attention(8, n_heads=2), layer) for layer in layers])


def held_out():
    return Counting().val_batches(4)


def test_every_router_shows_its_knob() -> None:
    torch.manual_seed(0)
    biased, chosen, likely = BiasedRouter(LinearScore(8, 4), 1), scored(TopK(2)), scored(TopP(0.5))
    model = decoder(biased, chosen, likely, scored(Soft()))
    assert knobs(model) == {"threshold": [likely.select], "top_k": [biased, chosen.select]}  # type: ignore[union-attr]
    assert (setting(model, "threshold"), setting(model, "top_k")) == (0.5, None)
    assert (allowed(model, "threshold"), allowed(model, "top_k")) == ((0.0, 1.0), (1, 4))
    assert knobs(tiny_model(kinds=("dense",))) == {}


def test_product_keys_go_up_to_one_side() -> None:
    peer = MoELayer(ProductKeyRouter(8, 16, heads=2, top_k=3, d_key=4, query_norm="rms"), [SingletonBank(8, 16)])
    model = Transformer(11, 8, [Block(8, Attention(8, n_heads=2), peer)])
    assert allowed(model, "top_k") == (1, 4) and ladder(model, "top_k") == [1, 2, 3, 4]
    with turned(model, "top_k", 4):
        assert spending(model, held_out())["experts"] == 8


@pytest.mark.parametrize(
    "router",
    [
        lambda: GroupedRouter(8, LinearScore(8, 4), [1, 1, 2], top_groups=2, top_k=1),
        lambda: ScoredRouter(LinearScore(8, 4), TopK(1, limit=GroupLimit(3, 2, sizes=(1, 1, 2)))),
        lambda: BiasedRouter(LinearScore(8, 4), 1, limit=GroupLimit(3, 2, sizes=(1, 1, 2))),
    ],
    ids=["grouped", "limited", "biased"],
)
def test_k_goes_up_to_what_the_smallest_groups_hold(router: Callable[[], Router]) -> None:
    model = decoder(router())
    assert allowed(model, "top_k") == (1, 2)
    with turned(model, "top_k", 2):
        assert spending(model, held_out())["experts"] == 2
    with pytest.raises(ValueError, match="top_k=3, allowed: whole numbers 1 to 2"), turned(model, "top_k", 3):
        pass


def test_a_wrapped_selection_has_its_knobs() -> None:
    chosen, likely = Capacity(TopK(1, limit=GroupLimit(4, 2)), 2.0), Capacity(TopP(0.5), 2.0)
    model = decoder(scored(chosen), scored(likely))
    assert allowed(model, "top_k") == (1, 2) and ladder(model, "top_k") == [1, 2]
    assert setting(model, "threshold") == 0.5
    with turned(model, "threshold", 0.0), turned(model, "top_k", 2):
        assert spending(model, held_out())["experts"] == 1.5


def test_ladders_hold_the_present_setting() -> None:
    assert 0.45 in ladder(decoder(scored(TopP(0.45))), "threshold")
    assert ladder(decoder(scored(TopP(0.5)), scored(TopP(0.25))), "threshold") == [i / 10 for i in range(11)]
    assert ladder(decoder(scored(TopK(1))), "top_k") == [1, 2, 3, 4]


@pytest.mark.parametrize(("knob", "build"), [("threshold", TopP), ("top_k", TopK)])
def test_a_turned_model_is_the_one_built_so(knob, build) -> None:
    value = {"threshold": 0.8, "top_k": 3}[knob]
    model = decoder(scored(build(value)))
    built = spending(model, held_out())
    other = decoder(scored(build(1)))
    other.load_state_dict(model.state_dict())
    with turned(other, knob, value):
        assert spending(other, held_out()) == built
        assert evaluate(other, held_out()) == evaluate(model, held_out())
    assert setting(other, knob) == 1
    assert spending(other, held_out()) != built


def test_a_knob_turns_back_after_an_error() -> None:
    model = decoder(scored(TopK(2)), scored(TopK(1)))
    with pytest.raises(RuntimeError, match="stop"), turned(model, "top_k", 4):
        raise RuntimeError("stop")
    assert [part.top_k for part in knobs(model)["top_k"]] == [2, 1]


def test_spending_counts_what_was_used() -> None:
    model = decoder(scored(TopP(0.6)))
    figures = spending(model, held_out())
    traces = [trace for batch in held_out() for trace in model(batch.tokens).traces]
    tokens = sum(trace.routing.n_tokens for trace in traces)
    assert figures["experts"] == pytest.approx(sum(trace.routing.n_rows for trace in traces) / tokens)
    width = sum(float(trace.active_width().sum()) for trace in traces) / tokens
    assert figures["active_width"] == pytest.approx(width)
    fixed = sum(p.numel() for p in model.parameters()) - 3 * 8 * 20
    assert figures["params_active"] == pytest.approx(fixed + 3 * 8 * width)
    assert figures["bpb"] == pytest.approx(evaluate(model, held_out())["bpb"], rel=1e-6)
    flops = sum(float(model.flops(*b.tokens.shape, model(b.tokens).traces).useful) for b in held_out())  # type: ignore[call-arg]
    assert figures["flops"] == pytest.approx(flops / tokens)


def test_curves_cost_more_as_the_knob_opens() -> None:
    model = decoder(scored(TopP(0.4)))
    curve = quality_curve(model, held_out, "threshold")
    assert curve["now"] == 0.4 and [point["value"] for point in curve["points"]] == [i / 10 for i in range(11)]
    widths = [point["active_width"] for point in curve["points"]]
    assert widths == sorted(widths) and widths[0] < widths[-1] == 20
    assert curve["points"][0]["experts"] == 1 and curve["points"][-1]["experts"] == 4
    assert quality_curve(model, held_out, "threshold", [0.4])["points"] == [curve["points"][4]]


def test_impossible_settings_are_refused() -> None:
    model = decoder(scored(TopK(2)))
    with (
        pytest.raises(ValueError, match="knob 'threshold': no layer has it; allowed: top_k"),
        turned(model, "threshold", 0.5),
    ):
        pass
    with pytest.raises(ValueError, match="top_k=5, allowed: whole numbers 1 to 4"), turned(model, "top_k", 5):
        pass
    with pytest.raises(ValueError, match="top_k=1.5, allowed: whole numbers 1 to 4"), turned(model, "top_k", 1.5):
        pass
    other = decoder(scored(TopP(0.5)))
    with pytest.raises(ValueError, match=r"threshold=1.5, allowed: 0.0 to 1.0"), turned(other, "threshold", 1.5):
        pass
    with pytest.raises(ValueError, match="nothing to evaluate: the batches hold 0 target tokens, 0 bytes"):
        spending(other, [])
    with pytest.raises(ValueError, match="knob 'top_k': no layer has it; allowed: none"):
        allowed(tiny_model(kinds=("dense",)), "top_k")
