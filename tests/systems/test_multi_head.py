"""Multi-head layers against the equations of Wu 2024 (arXiv:2404.15045), and the checks of their definition:

(a) one head: `test_one_head_is_linear_mixture_linear`
(b) identity experts: `test_experts_that_copy_leave_the_two_projections`
(c) one expert: `test_one_expert_is_block_diagonal`
(d) split and merge: `test_parts_are_slices_in_order`
(e) causality: `test_a_token_depends_on_no_other`
(f) load: `test_load_and_figures_count_parts_and_tokens`
(g) counts and parity: `test_flops_and_parameters_are_the_papers`, `test_parity_gives_the_papers_sizes`
(h) permuted heads: `test_heads_may_change_places`
(i) padding: `test_padding_carries_no_load`
(j) gradients: `test_the_layer_equals_the_equations` compares all, `test_the_first_projection_learns_twice` splits them
"""

import pytest
import torch

from moestro.evaluate import capacity_report, knobs, quality_curve, routing_report
from moestro.experts import CopyBank, FFNBank, SingletonBank
from moestro.experts.parity import Mixture, multi_head, parity
from moestro.layers import DenseFFN, Layer, MoELayer, MultiHeadLayer, StratifiedLayer
from moestro.model import Attention, Block, Transformer
from moestro.model.active import idle_parameters
from moestro.objectives import LoadBalance
from moestro.ops import backend
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.routers import BiasedRouter, LinearScore, ProductKeyRouter, ScoredRouter, TopK
from moestro.train import BiasBalance
from moestro.train.optim import build_optimizer
from moestro.train.settings import OptimSettings
from tests.conftest import ROOT
from tests.reference import multi_head as reference
from tests.tolerances import FLOAT64
from tests.train.tiny import Counting

D, E, WIDTH, K = 12, 5, 4, 2


def inner(d_model: int, top_k: int = K, renormalize: bool = True) -> MoELayer:
    router = ScoredRouter(LinearScore(d_model, E, init_std=1.0), TopK(top_k, renormalize))
    return MoELayer(router, [FFNBank(d_model, [WIDTH] * E)])


def layer(heads: int = 3, ffn=inner, **options) -> MultiHeadLayer:
    torch.manual_seed(4)
    made = MultiHeadLayer(D, heads, ffn, **options)
    if getattr(made.merge, "bias", None) is not None:
        torch.nn.init.normal_(made.merge.bias)
    return made.double()


def tokens(n: int = 17) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def projections(of: MultiHeadLayer) -> tuple:
    return (of.head.weight, of.head.bias), (of.merge.weight, of.merge.bias)


@pytest.mark.parametrize("name", backend.EVERYWHERE)
@pytest.mark.parametrize(("heads", "renormalize", "add_parts"), [(3, True, False), (4, False, True), (1, True, False)])
def test_the_layer_equals_the_equations(heads, renormalize, add_parts, name) -> None:
    made = layer(heads, lambda d_model: inner(d_model, renormalize=renormalize), add_parts=add_parts)
    x = tokens().requires_grad_()
    inputs = [x, *made.parameters()]
    with backend.force(name):
        y, _ = made(x)
        have = torch.autograd.grad(y.sin().sum(), inputs)
    bank, router = made.ffn.bank, made.ffn.router.score.weight
    halves = [block.chunk(2) for block in bank.w_in.matrices()]
    experts = [(gate, up, out) for (gate, up), out in zip(halves, bank.w_out.matrices(), strict=True)]

    def part(u: torch.Tensor) -> torch.Tensor:
        return reference.mixture(u, router, experts, K, renormalize)

    want_y = torch.stack([reference.multi_head(t, *projections(made), heads, part, add_parts) for t in x])
    want = torch.autograd.grad(want_y.sin().sum(), inputs)
    torch.testing.assert_close(y, want_y, **FLOAT64)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


def test_one_head_is_linear_mixture_linear() -> None:
    made, x = layer(1), tokens()
    torch.testing.assert_close(made(x)[0], made.merge(made.ffn(made.head(x))[0]), **FLOAT64)
    for projection in (made.head, made.merge):
        torch.nn.init.eye_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    torch.testing.assert_close(made(x)[0], made.ffn(x)[0], **FLOAT64)
    bare = layer(1, head=False, merge=False)
    assert torch.equal(bare(x)[0], bare.ffn(x)[0])


@pytest.mark.parametrize("heads", [1, 2, 3, 12])
def test_experts_that_copy_leave_the_two_projections(heads) -> None:
    def copies(d_model: int) -> MoELayer:
        return MoELayer(ScoredRouter(LinearScore(d_model, E, init_std=1.0), TopK(K)), [CopyBank(E)])

    made, x = layer(heads, copies), tokens()
    torch.testing.assert_close(made(x)[0], made.merge(made.head(x)), **FLOAT64)


def test_one_expert_is_block_diagonal() -> None:
    made, x = layer(3, lambda d_model: DenseFFN(d_model, WIDTH)), tokens()
    want = torch.cat([made.ffn(part)[0] for part in made.head(x).split(D // 3, dim=-1)], dim=-1)
    y, traces = made(x)
    torch.testing.assert_close(y, made.merge(want), **FLOAT64)
    assert traces == ()


def test_parts_are_slices_in_order() -> None:
    seen = []

    class Seen(Layer):
        def forward(self, x, keep=None):
            seen.append(x)
            return x, ()

    made, x = layer(4, lambda d_model: Seen()), tokens(6).view(2, 3, D)
    y, _ = made(x)
    assert torch.equal(seen[0][1, 2, 3], made.head(x)[1, 2, 9:12])
    torch.testing.assert_close(y, made.merge(made.head(x)), **FLOAT64)


def test_a_token_depends_on_no_other() -> None:
    made, x = layer(), tokens(20)
    torch.testing.assert_close(made(x[:7])[0], made(x)[0][:7], **FLOAT64)
    model = Transformer(11, D, [Block(D, Attention(D, n_heads=1), layer())]).double()
    text = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(text[:, :5]).logits, model(text).logits[:, :5], **FLOAT64)


def test_load_and_figures_count_parts_and_tokens() -> None:
    made, x = layer(3), tokens(40)
    _, (trace,) = made(x)
    assert trace.routing.load().sum() == 40 * 3 * K and trace.n_tokens == 40
    assert trace.experts_per_token().tolist() == [3 * K] * 40
    assert trace.active_width().tolist() == [3 * K * WIDTH] * 40
    rows = list(zip((trace.routing.token // 3).tolist(), trace.routing.expert.tolist(), strict=True))
    different = [len({e for t, e in rows if t == token}) for token in range(40)]
    assert trace.different_experts().tolist() == different and K < sum(different) / 40 <= min(E, 3 * K)
    expert = 3 * (D // 3) * WIDTH
    assert float(idle_parameters([trace])) == pytest.approx((E - sum(different) / 40) * expert)


def test_flops_and_parameters_are_the_papers() -> None:
    """4 d^2 + 2 m d w k a token for every number of heads, beside the router's 2 E d."""
    for heads in (1, 2, 3, 4, 6):
        made = layer(heads)
        want = 4 * D * D + 2 * 3 * D * WIDTH * K + 2 * E * D
        assert made.expected_token_flops() == want
        _, (trace,) = made(tokens(10))
        assert made.untraced_flops(10).useful + float(trace.layer.flops(trace.routing).useful) == 10 * want
        count = sum(p.numel() for p in made.parameters())
        assert count == 2 * (D * D + D) + E * 3 * D * WIDTH // heads + E * D // heads
    for values, want in (({"head": False}, 2), ({"bias": False}, 4)):
        assert layer(**values).untraced_flops(1).useful == want * D * D
    nested = layer(3, lambda d_model: DenseFFN(d_model, WIDTH))
    assert nested.untraced_flops(2).useful == 2 * (4 * D * D + 2 * 3 * D * WIDTH) == 2 * nested.expected_token_flops()


def test_parity_gives_the_papers_sizes() -> None:
    """Huang 2024: 40 experts of 768 and 96 of 512 beside 8 of 2048, top-1; and w = 3 d, E' = 4 E - 1 in its example."""
    base = Mixture(d_model=768, width=2048, n_experts=8, top_k=1)
    two = parity(base, heads=2, top_k=2, experts_multiple_of=8)
    assert (two.width, two.n_experts, two.flops_error) == (768, 40, 0.0)
    assert round(two.exact_experts, 1) == 41.3 and round(1 + two.parameter_error, 3) == 0.969
    three = parity(base, heads=3, top_k=3, experts_multiple_of=8)
    assert (three.width, three.n_experts, three.flops_error) == (512, 96, 0.0)
    assert round(three.exact_experts) == 93 and round(1 + three.parameter_error, 3) == 1.031
    plain = parity(Mixture(d_model=96, width=4 * 96, n_experts=8, top_k=1, glu=False), heads=3, top_k=1)
    assert (plain.width, plain.n_experts, plain.flops_error, plain.parameter_error) == (3 * 96, 4 * 8 - 1, 0.0, 0.0)
    rounded = parity(base, heads=2, top_k=2, width_multiple_of=100)
    assert rounded.width == 800 and rounded.flops_error > 0 and rounded.exact_width == 768
    assert multi_head(256, 3, 3, 2048, 8, experts_multiple_of=8) == [512] * 96


@pytest.mark.parametrize(
    ("of", "heads", "message"),
    [
        (Mixture(12, 4, 8, 1), 2, "width=4, top_k=1: two projections of d_model=12 alone cost as much"),
        (Mixture(12, 96, 8, 1), 5, "heads=5, top_k=1, allowed: a divisor of d_model=12, at least 1"),
    ],
)
def test_impossible_parity_is_refused(of, heads, message) -> None:
    with pytest.raises(ValueError, match=message):
        parity(of, heads, 1)


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="of_width=-1, allowed: at least 1"):
        multi_head(256, 3, 3, -1, 8)


def test_the_paper_recipes_match_their_baseline() -> None:
    for name, experts in (("multi-head-2", 40), ("multi-head-3", 96)):
        model = build_model(load_recipe(ROOT / "recipes" / "paper" / f"{name}.yaml"), 32_000, "meta")
        moe = next(iter(model.moe_layers().values()))
        assert moe.bank.n_experts == experts and len(model.moe_layers()) == 6


def test_heads_may_change_places() -> None:
    made, x = layer(3), tokens()
    before, _ = made(x)
    order = torch.tensor([2, 0, 1])
    rows = torch.arange(D).view(3, -1)[order].flatten()
    made.head.weight.data, made.head.bias.data = made.head.weight.data[rows], made.head.bias.data[rows]
    made.merge.weight.data = made.merge.weight.data[:, rows]
    torch.testing.assert_close(made(x)[0], before, **FLOAT64)


def test_padding_carries_no_load() -> None:
    made, x = layer(), tokens(12).view(3, 4, D)
    keep = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.6
    y, (trace,) = made(x, keep)
    alone, (other,) = made(x[keep])
    assert not y[~keep].any() and trace.n_tokens == int(keep.sum())
    torch.testing.assert_close(y[keep], alone, **FLOAT64)
    assert torch.equal(trace.routing.load(), other.routing.load())
    torch.testing.assert_close(LoadBalance()(trace), LoadBalance()(other), **FLOAT64)
    torch.testing.assert_close(trace.experts_per_token(), other.experts_per_token())


def test_the_first_projection_learns_twice() -> None:
    """Through what experts compute, and through what they are weighted with."""
    made = layer()
    parts = made.head(tokens()).unflatten(-1, (3, -1)).flatten(0, 1)
    gates = made.ffn.router(parts).weight
    (through_gates,) = torch.autograd.grad(gates.square().sum(), made.head.weight, retain_graph=True)
    (through_experts,) = torch.autograd.grad(
        made.ffn.bank(parts, made.ffn.router(parts.detach())).sum(), made.head.weight
    )
    assert through_gates.abs().sum() > 0 and through_experts.abs().sum() > 0


def test_strata_inside_heads() -> None:
    def strata(d_model: int) -> StratifiedLayer:
        def gate(n_experts: int) -> ScoredRouter:
            return ScoredRouter(LinearScore(d_model, n_experts, init_std=1.0), TopK(2))

        return StratifiedLayer(d_model, [2, 3], gate, [FFNBank(d_model, [WIDTH] * E)])

    torch.manual_seed(0)
    model = Transformer(11, D, [Block(D, Attention(D, n_heads=1), layer(3, strata).float())])
    batches = list(Counting().val_batches(4))
    traces = model(batches[0].tokens).traces
    assert [trace.n_tokens for trace in traces] == [24, 24]
    assert traces[0].routing.n_tokens == 72 > traces[1].routing.n_tokens > 0
    used = sum(trace.experts_per_token() for trace in traces)
    assert int(used.sum()) == sum(trace.routing.n_rows for trace in traces)
    assert 0 <= float(idle_parameters(traces)) < E * 3 * 4 * WIDTH
    (figures,) = capacity_report(model, batches).values()
    assert 1 < figures["mean"] < 2
    assert set(routing_report(model, batches)) == {f"blocks.0.ffn.ffn.passes.{i}" for i in range(2)}


def test_rules_knobs_and_row_optimizers_reach_inside() -> None:
    def balanced(d_model: int) -> MoELayer:
        return MoELayer(BiasedRouter(LinearScore(d_model, E, init_std=1.0), top_k=2), [FFNBank(d_model, [WIDTH] * E)])

    model = Transformer(11, D, [Block(D, Attention(D, n_heads=1), layer(3, balanced).float())])
    batches = list(Counting().val_batches(4))
    rule = BiasBalance(0.1)
    for trace in model(batches[0].tokens).traces:
        rule.observe(trace)
    rule.apply(1)
    assert model.moe_layers()["blocks.0.ffn.ffn"].router.bias.any()
    assert set(knobs(model)) == {"top_k"}
    curve = quality_curve(model, lambda: batches, "top_k", [1, 2])
    assert [point["experts"] for point in curve["points"]] == [3, 6]
    report = routing_report(model, batches)["blocks.0.ffn.ffn"]
    assert report["routed"] == 3 * report["tokens"] and 2 < report["different_experts"] <= 5

    def rows(d_model: int) -> MoELayer:
        router = ProductKeyRouter(d_model, 16, heads=2, top_k=3, d_key=4, query_norm="rms")
        return MoELayer(router, [SingletonBank(d_model, 16, sparse_gradients=True)])

    sparse = layer(3, rows).float()
    assert len(build_optimizer(sparse, OptimSettings()).parts) == 2


def test_moving_experts_changes_nothing() -> None:
    made, x = layer(), tokens()
    before, _ = made(x)
    made.reindex(torch.tensor([3, 1, 4, 0, 2]))
    torch.testing.assert_close(made(x)[0], before, **FLOAT64)


@pytest.mark.parametrize("heads", [0, 5])
def test_heads_must_divide_the_model(heads) -> None:
    with pytest.raises(ValueError, match=f"heads={heads}, allowed: a divisor of d_model=12"):
        MultiHeadLayer(D, heads, inner)
