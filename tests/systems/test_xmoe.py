"""XMoE against its reference, and the exact checks of its specification:

(a) one or all experts: test_thresholds_at_their_ends. (b) the shortest prefix: test_the_smallest_set_that_reaches.
(c) the rule of dynamic routing: test_ties_tell_the_two_rules_apart. (d) parameters: test_finer_experts_cost_the_router.
(e) identical experts: test_identical_experts_are_one. (f) splitting a dense network: test_split.py.
(g) capacity: test_an_expert_keeps_its_best_claims. (h) room for all: test_a_capacity_of_all_tokens_drops_nothing.
(i) no position bias: test_shuffling_the_batch_permutes_the_output. (j) the loss: test_first_choices_cost_one_when_even.
"""

import pytest
import torch

from moestro.evaluate import routing_report
from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Transformer
from moestro.objectives import FirstChoiceBalance
from moestro.ops import backend
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.routers import Capacity, LinearScore, ScoredRouter, Soft, TopK, TopP
from moestro.routing import SparseRouting
from moestro.routing.capacity import limited, row_usage, rows_allowed
from tests.conftest import ROOT
from tests.reference import xmoe as reference
from tests.tolerances import FLOAT64
from tests.train.tiny import VOCABULARY, WIDTH, Counting

D, E, W, T = 6, 10, 3, 40
RECIPES = ROOT / "recipes"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(threshold: float = 0.8, factor: float | None = 2.0, minimum: int = 1) -> MoELayer:
    torch.manual_seed(3)
    select = TopP(threshold, renormalize=False)
    bounded = select if factor is None else Capacity(select, factor, minimum)
    router = ScoredRouter(LinearScore(D, E, init_std=1.0), bounded)
    return MoELayer(router, [FFNBank(D, [W] * E, activation="gelu", glu=False)]).double()


def parts(of: MoELayer) -> tuple[torch.Tensor, FFNBank]:
    assert isinstance(of.router, ScoredRouter) and isinstance(of.bank, FFNBank)
    return of.router.score.weight, of.bank


def matrices(bank: FFNBank) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(bank.w_in.matrices(), bank.w_out.matrices(), strict=True))


def pairs(routing: SparseRouting) -> set[tuple[int, int]]:
    return set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))


def routed(logits: torch.Tensor, threshold: float) -> SparseRouting:
    return TopP(threshold, renormalize=False)(logits)


@pytest.mark.parametrize("name", backend.EVERYWHERE)
@pytest.mark.parametrize("factor", [0.5, 2.0, None])
def test_layer_equals_the_reference(factor: float | None, name: str) -> None:
    moe, x = layer(factor=factor), random(T, D).requires_grad_()
    router, bank = parts(moe)
    c = T if factor is None else reference.capacity(T, E, factor, 1)
    with backend.force(name):
        y, (trace,) = moe(x)
        leaves = [x, *moe.parameters()]
        have = torch.autograd.grad(y.square().sum(), leaves)
    want_y = reference.layer(x, router, matrices(bank), 0.8, c)
    want = torch.autograd.grad(want_y.square().sum(), leaves)
    torch.testing.assert_close(y, want_y, **FLOAT64)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)
    assert pairs(trace.routing) == set(reference.kept(reference.probabilities(x, router), 0.8, c))


def test_thresholds_at_their_ends() -> None:
    x = random(T, D)
    for threshold, each in ((0.0, 1), (1.0, E)):
        moe = layer(threshold, factor=None)
        y, (trace,) = moe(x)
        assert (trace.experts_per_token() == each).all()
    router, bank = parts(moe)
    soft = MoELayer(ScoredRouter(moe.router.score, Soft()), [bank])
    torch.testing.assert_close(y, soft(x)[0], **FLOAT64)
    assert pairs(routed(x @ router.T, 0.0)) == {(t, int(e)) for t, e in enumerate((x @ router.T).argmax(-1))}


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9, 0.99])
def test_the_smallest_set_that_reaches(threshold: float) -> None:
    logits = 2 * random(200, E)
    probs = logits.softmax(-1)
    routing = routed(logits, threshold)
    for t in range(200):
        members = routing.expert[routing.token == t].tolist()
        masses = sorted((float(probs[t, e]) for e in members), reverse=True)
        assert sum(masses[:-1]) < threshold and sum(masses) >= threshold - 1e-12
        assert members == reference.wanted(probs[t], threshold)


def test_ties_tell_the_two_rules_apart() -> None:
    logits = random(200, E)
    for threshold in (0.3, 0.9):
        dynamic = TopP(threshold, renormalize=False, strict=True)(logits)
        assert pairs(dynamic) == pairs(routed(logits, threshold))
    even = torch.zeros(5, 4, dtype=torch.float64)
    assert (routed(even, 0.5).per_token(1.0) == 2).all()
    assert (TopP(0.5, renormalize=False, strict=True)(even).per_token(1.0) == 3).all()


def test_finer_experts_cost_the_router() -> None:
    """Eight times as many experts, each an eighth as wide: the same experts' parameters, d (E - E0) more for W."""

    def parameters(count: int, width: int) -> tuple[int, int]:
        bank = FFNBank(D, [width] * count, glu=False)
        return sum(p.numel() for p in bank.parameters()), LinearScore(D, count).weight.numel()

    (coarse, few), (fine, many) = parameters(4, 16), parameters(32, 2)
    assert coarse == fine and many - few == D * (32 - 4)


def test_identical_experts_are_one() -> None:
    moe, x = layer(threshold=1.0, factor=None), random(T, D)
    _, bank = parts(moe)
    with torch.no_grad():
        for weight in (bank.w_in.weight, bank.w_out.weight):
            weight.copy_(weight[:W].repeat(E, 1))
    up, down = matrices(bank)[0]
    torch.testing.assert_close(moe(x)[0], torch.stack([reference.expert(t, up, down) for t in x]), **FLOAT64)


@pytest.mark.parametrize(("factor", "minimum"), [(0.5, 1), (1.0, 1), (3.0, 1), (0.1, 4)])
def test_an_expert_keeps_its_best_claims(factor: float, minimum: int) -> None:
    """No expert above its capacity; every kept claim goes before every dropped one; CF * T in all at most."""
    logits = random(T, E, seed=1)
    every = routed(logits, 0.9)
    c = rows_allowed(T, E, factor, minimum)
    assert c == reference.capacity(T, E, factor, minimum)
    some = limited(every, c)
    order = {
        (t, e): (rank, -float(p[e]))
        for t, p in enumerate(logits.softmax(-1))
        for rank, e in enumerate(reference.wanted(p, 0.9))
    }
    assert set(order) == pairs(every) > pairs(some)
    for e in range(E):
        kept = [order[pair] for pair in pairs(some) if pair[1] == e]
        dropped = [order[pair] for pair in pairs(every) - pairs(some) if pair[1] == e]
        assert len(kept) == min(c, len(kept) + len(dropped))
        assert not dropped or max(kept) <= min(dropped)
    assert some.n_rows <= max(factor * T + E, minimum * E)
    torch.testing.assert_close(some.weight, logits.softmax(-1)[some.token, some.expert], **FLOAT64)


def test_other_priorities() -> None:
    logits = random(T, E, seed=1)
    every = routed(logits, 0.9)
    by_gate, by_position = (limited(every, 5, priority) for priority in ("gate", "position"))
    for e in range(E):
        tokens = every.token[every.expert == e]
        assert sorted(by_position.token[by_position.expert == e].tolist()) == sorted(tokens.tolist())[:5]
        best = every.weight[every.expert == e].sort(descending=True).values[:5]
        torch.testing.assert_close(by_gate.weight[by_gate.expert == e].sort(descending=True).values, best)
    assert pairs(by_gate) != pairs(limited(every, 5)) != pairs(by_position)


def test_rows_in_any_order_are_limited_alike() -> None:
    every = routed(random(T, E, seed=1), 0.9)
    assert pairs(limited(every.grouped(), 5)) == pairs(limited(every, 5))


def test_a_capacity_of_all_tokens_drops_nothing() -> None:
    x = random(T, D)
    torch.testing.assert_close(layer(factor=float(E))(x)[0], layer(factor=None)(x)[0], **FLOAT64)


def test_shuffling_the_batch_permutes_the_output() -> None:
    moe, x, order = layer(factor=0.5), random(T, D), torch.randperm(T, generator=torch.Generator().manual_seed(1))
    (y, (trace,)), (shuffled, _) = moe(x), moe(x[order])
    torch.testing.assert_close(shuffled, y[order], **FLOAT64)
    assert trace.routing.n_rows < trace.routing.wanted.n_rows


def test_first_choices_cost_one_when_even() -> None:
    moe, x = layer(factor=0.5), random(T, D).requires_grad_()
    _, (trace,) = moe(x)
    value = FirstChoiceBalance()(trace)
    want = reference.first_choice_balance(reference.probabilities(x, parts(moe)[0]))
    torch.testing.assert_close(value, want, **FLOAT64)
    for a, b in zip(
        torch.autograd.grad(value, [x, parts(moe)[0]]), torch.autograd.grad(want, [x, parts(moe)[0]]), strict=True
    ):
        torch.testing.assert_close(a, b, **FLOAT64)
    even = 5 * torch.eye(E, dtype=torch.float64)
    assert float(FirstChoiceBalance()(type(trace)(moe, x, routed(even, 0.99)))) == pytest.approx(1.0, abs=1e-12)


def test_evaluation_drops_nothing_unless_asked() -> None:
    x = random(T, D)
    moe = layer(factor=0.5).eval()
    assert moe.router.causal and moe(x)[1][0].routing.wanted is None
    torch.testing.assert_close(moe(x)[0], layer(factor=None)(x)[0], **FLOAT64)
    asked = ScoredRouter(LinearScore(D, E), Capacity(TopP(0.8), 8.0, eval_factor=0.5)).eval()
    assert not asked.causal
    assert asked(x.float()).load().max() <= rows_allowed(T, E, 0.5)


def test_rows_are_counted_as_wanted_useful_and_of_fixed_shape() -> None:
    moe, x = layer(factor=0.5), random(T, D)
    _, (trace,) = moe(x)
    c = rows_allowed(T, E, 0.5)
    probs = reference.probabilities(x, parts(moe)[0])
    kept = reference.kept(probs, 0.8, c)
    usage = row_usage(trace.routing, c)
    assert usage.wanted == sum(len(reference.wanted(p, 0.8)) for p in probs)
    assert (usage.useful, usage.fixed_shape) == (len(kept), c * E)
    assert usage.starved == 1 - len({t for t, _ in kept}) / T > 0
    assert usage.unfilled == sum(sum(e == i for _, e in kept) < c for i in range(E)) / E
    assert moe.flops(trace.routing).item().useful == 2 * T * D * E + usage.useful * 4 * D * W
    dropless = layer(factor=None)(x)[1][0].routing
    assert row_usage(dropless, T).wanted == dropless.n_rows and row_usage(dropless, T).starved == 0


def test_reports_show_rows_wanted_and_useful_and_flops_of_both_kinds() -> None:
    torch.manual_seed(0)
    select = Capacity(TopP(0.9), 1.0, eval_factor=1.0)
    moe = MoELayer(ScoredRouter(LinearScore(WIDTH, 6, init_std=1.0), select), [FFNBank(WIDTH, [3] * 6)])
    block = Block(WIDTH, Attention(WIDTH, n_heads=2), moe)
    model = Transformer(VOCABULARY, WIDTH, [block], allow_non_causal=True)
    (figures,) = routing_report(model, Counting().val_batches(4)).values()
    assert figures["rows"]["useful"] == sum(figures["load"]) < figures["rows"]["wanted"]
    useful = figures["rows"]["useful"] * 6 * WIDTH * 3 + figures["tokens"] * 2 * WIDTH * 6
    assert figures["flops"] == {"useful": useful, "computed": useful}
    select.eval_factor = None
    (figures,) = routing_report(model, Counting().val_batches(4)).values()
    assert figures["rows"]["useful"] == figures["rows"]["wanted"]


def test_values_are_checked() -> None:
    routing = routed(random(T, E), 0.5)
    with pytest.raises(ValueError, match="capacity=-1, allowed: at least 0"):
        limited(routing, -1)
    with pytest.raises(ValueError, match="priority='random', allowed: rank, gate, position"):
        limited(routing, 1, "random")
    with pytest.raises(ValueError, match="factor=0, eval_factor=None, allowed: above 0"):
        Capacity(TopK(1), 0)
    with pytest.raises(ValueError, match="minimum=-1, allowed: at least 0"):
        Capacity(TopK(1), 1, minimum=-1)
    with pytest.raises(ValueError, match="priority='x', allowed: rank, gate, position"):
        Capacity(TopK(1), 1, priority="x")
    with pytest.raises(ValueError, match="capacity limits rows of tokens; Soft has none to drop"):
        Capacity(Soft(), 1)(random(T, E))
    with pytest.raises(ValueError, match="top_k=3 > 2 experts"):
        ScoredRouter(LinearScore(D, 2), Capacity(TopK(3), 1))


def test_no_tokens_and_no_room() -> None:
    moe = layer(factor=0.5)
    y, (trace,) = moe(torch.zeros(0, D, dtype=torch.float64))
    assert y.shape == (0, D) and trace.routing.n_rows == 0
    assert limited(routed(random(T, E), 0.5), 0).n_rows == 0


@pytest.mark.parametrize(("name", "blocks", "experts", "width"), [("xmoe", 4, 32, 64), ("paper/xmoe", 6, 64, 384)])
def test_recipes(name: str, blocks: int, experts: int, width: int) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    model = build_model(recipe, 50_257, "meta")
    assert len(model.moe_layers()) == blocks
    for moe in model.moe_layers().values():
        select = moe.router.select  # type: ignore[union-attr]
        assert isinstance(select, Capacity) and isinstance(select.select, TopP)
        assert (select.factor, select.minimum, select.select.threshold) == (8, 4, 0.9)
        assert not select.select.renormalize and moe.bank.widths == (width,) * experts  # type: ignore[union-attr]
        # capacity keeps the mean at 8 experts, as wide together as the dense layer
        assert moe.router.rows_per_token() * width == 8 * width
    (name_, weight, objective) = build_training(recipe)[1][0]
    assert (name_, weight, objective) == ("first_choice_balance", 0.01, FirstChoiceBalance())
