"""MoE++: gating residuals, the muted zero expert and the weighted balance loss, against the paper's equations."""

from itertools import pairwise

import pytest
import torch

from moestro.experts import ConstantBank, CopyBank, FFNBank, MixedBank
from moestro.layers import MoELayer
from moestro.model import Attention, Block, Cache, Transformer
from moestro.objectives import LoadBalance, WeightedBalance
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.routers import LinearScore, MutedTopK, RemappedRouter, ResidualRouter, ScoredRouter, TopK
from tests.conftest import ROOT
from tests.reference import zero_compute as reference
from tests.tolerances import FLOAT64

D, WIDTHS, ZERO = 6, [3, 1, 0], 2
N = 6
close = torch.testing.assert_close


def layer(seed: int = 0) -> MoELayer:
    """Experts 0 and 1 feed-forward, 2 zero (muted), 3 copy, 4 and 5 constant."""
    torch.manual_seed(seed)
    router = ResidualRouter(LinearScore(D, N, init_std=1.0), MutedTopK(2, [ZERO]), residual_std=0.5)
    return MoELayer(router, [MixedBank([FFNBank(D, WIDTHS), CopyBank(), ConstantBank(D, 2)])]).double()


def tokens(n: int = 17) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(n), requires_grad=True)


def by_the_equations(of: MoELayer, x: torch.Tensor, before: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, logits) token by token."""
    ffn, _, constant = of.bank.banks  # type: ignore[misc, union-attr]
    rows, logits = [], []
    for t, token in enumerate(x):
        mixing = of.router.residual
        logit = reference.residual_logits(of.router.score.weight, token, mixing, None if before is None else before[t])
        gates = reference.muted_gates(logit, 2, [ZERO])
        outputs = []
        for e in range(2):
            gate, up = ffn.w_in.matrices()[e].chunk(2)
            outputs.append(reference.swiglu(token, gate, up, ffn.w_out.matrices()[e]))
        outputs += [reference.zero(token), reference.copy(token)]
        outputs += [reference.constant(token, constant.weight[i], constant.vector[i]) for i in range(2)]
        rows.append(sum(weight * output for weight, output in zip(gates, outputs, strict=True)))
        logits.append(logit)
    return torch.stack(rows), torch.stack(logits)


def test_two_layers_equal_the_equations() -> None:
    """Outputs and every gradient; those of the first layer's router come through the second one's choice, too."""
    first, second, x = layer(0), layer(1), tokens()
    y, before = first(x)
    z, (trace,) = second(y, earlier=before)
    want_y, want_before = by_the_equations(first, x, None)
    want_z, want_logits = by_the_equations(second, want_y, want_before)
    close(z, want_z, **FLOAT64)
    close(trace.routing.logits, want_logits, **FLOAT64)
    leaves = {"x": x, **dict(first.named_parameters()), **{f"2.{k}": v for k, v in second.named_parameters()}}
    leaves.pop("router.residual")  # the first layer has nothing to follow
    have = torch.autograd.grad(z.square().sum(), list(leaves.values()))
    want = torch.autograd.grad(want_z.square().sum(), list(leaves.values()))
    for name, a, b in zip(leaves, have, want, strict=True):
        close(a, b, **FLOAT64, msg=lambda m, name=name: f"{name}: {m}")
        assert a.any(), name


def test_what_follows_are_logits_whatever_the_gates() -> None:
    first, second = (ResidualRouter(LinearScore(D, N), TopK(2, gate="sigmoid")).double() for _ in range(2))
    x, y = tokens(), tokens()
    want = second.score(y) + first.score(x) @ second.residual.T
    close(second(y, first(x)).raw_logits(), want, **FLOAT64)


def model(recompute: bool = False) -> Transformer:
    torch.manual_seed(3)
    decoder = Transformer(11, D, [Block(D, Attention(D, n_heads=1), layer(seed)) for seed in range(3)]).double()
    decoder.recompute = recompute
    return decoder


TOKENS = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))


def test_every_block_follows_the_one_before() -> None:
    traces = model()(TOKENS).traces
    assert len(traces) == 3
    for before, here in pairwise(traces):
        router = here.layer.router  # type: ignore[attr-defined]
        close(here.routing.logits, router.score(here.x) + before.routing.logits @ router.residual.T, **FLOAT64)


def test_recomputation_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        decoder = model(recompute)
        decoder(TOKENS).logits.square().sum().backward()
        found.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(found[1][name], gradient, **FLOAT64)


def test_padding_and_a_cache_change_no_choice() -> None:
    decoder = model().eval()
    whole = decoder(TOKENS)
    keep = torch.ones_like(TOKENS, dtype=torch.bool)
    keep[1, 4:] = False
    padded = decoder(TOKENS, keep=keep)
    close(padded.logits[0], whole.logits[0], **FLOAT64)
    close(padded.logits[1, :4], whole.logits[1, :4], **FLOAT64)
    cache = Cache()
    parts = [decoder(TOKENS[:, i : i + 1], cache=cache).logits for i in range(TOKENS.shape[1])]
    close(torch.cat(parts, 1), whole.logits, **FLOAT64)


def test_layers_that_do_not_fit_are_refused() -> None:
    x, narrow = tokens(), MoELayer(ScoredRouter(LinearScore(D, 3), TopK(2)), [FFNBank(D, WIDTHS)]).double()
    _, before = narrow(x)
    with pytest.raises(ValueError, match=r"needs logits \[17, 6\] of the layer before, got \[17, 3\]"):
        layer()(x, earlier=before)
    with pytest.raises(ValueError, match="residual_std=-1"):
        ResidualRouter(LinearScore(D, N), TopK(1), residual_std=-1)


def test_experts_that_were_not_available_have_no_say() -> None:
    first, second, x = layer(0), layer(1), tokens()
    first.router.set_available(torch.arange(N) != 1)  # type: ignore[operator]
    _, before = first(x)
    logits = before[0].routing.logits
    assert (logits[:, 1] == -torch.inf).all()
    router = second.router
    assert isinstance(router, ResidualRouter)
    here = router(x, before[0].routing).logits
    heard = torch.arange(N) != 1
    close(here, router.score(x) + logits[:, heard] @ router.residual[:, heard].T, **FLOAT64)


def test_reindexing_moves_rows_of_the_residual() -> None:
    router = layer().router
    assert isinstance(router, ResidualRouter) and isinstance(router.select, MutedTopK)
    old = router.residual.detach().clone()
    router.reindex(torch.tensor([1, 0, 2, 3, 5, -1]))
    new = router.residual.detach()
    assert router.select.muted == (2,)
    router.reindex(torch.tensor([2, 1, 0, 3, 4, 5]))
    assert router.select.muted == (0,)
    assert torch.equal(new[:5], old[[1, 0, 2, 3, 5]]) and not torch.isin(new[5], old).any()


def test_a_token_that_chose_only_muted_experts_gets_nothing() -> None:
    routing = MutedTopK(1, [1])(torch.tensor([[0.0, 5.0, 1.0], [3.0, 0.0, 0.0]], dtype=torch.float64))
    close(routing.dense(), torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64))
    assert routing.load().tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match=r"muted=\[3\], allowed: experts 0 to 2"):
        MutedTopK(1, [3])(torch.zeros(2, 3))


@pytest.mark.parametrize("tau", [0.75, 0.1, 1.0])
def test_weighted_balance_equals_the_equation(tau: float) -> None:
    of, x = layer(), tokens()
    _, (trace,) = of(x)
    chosen = [row.nonzero().flatten().tolist() for row in torch.stack([*_used(trace.routing)])]
    have = WeightedBalance(tau)(trace)
    probabilities = trace.routing.logits.softmax(-1)
    want = N * reference.weighted_balance(probabilities, chosen, [*WIDTHS, 0, 0, 0], tau)
    close(have, want, **FLOAT64)
    (gradient,) = torch.autograd.grad(have, [of.router.score.weight], retain_graph=True)  # type: ignore[list-item]
    (wanted,) = torch.autograd.grad(want, [of.router.score.weight])  # type: ignore[list-item]
    close(gradient, wanted, **FLOAT64)
    if tau == 1.0:
        close(have, LoadBalance()(trace), **FLOAT64)


def _used(routing) -> torch.Tensor:
    """Which experts each token chose, muted ones included."""
    used = torch.zeros(routing.n_tokens, routing.n_experts)
    used[routing.token, routing.expert] = 1
    return used


def test_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="zero_compute=0, allowed: above 0"):
        WeightedBalance(0)


def test_the_recipe_is_moe_plus_plus() -> None:
    recipe = load_recipe(ROOT / "recipes" / "moe_plus_plus.yaml")
    decoder = build_model(recipe, 64, "meta")
    assert len(decoder.moe_layers()) == 4
    for moe in decoder.moe_layers().values():
        widths = moe.expert_widths().tolist()  # type: ignore[union-attr]
        assert isinstance(moe.router, ResidualRouter) and isinstance(moe.router.select, MutedTopK)
        assert [widths[expert] for expert in moe.router.select.muted] == [0] and widths.count(0) == 4
    assert build_training(recipe)[1] == [("weighted_balance", 0.01, WeightedBalance(0.75))]


def test_a_router_whose_experts_became_others_still_follows_the_layer_before() -> None:
    inner, x = ResidualRouter(LinearScore(6, 4), TopK(2), residual_std=1.0), torch.randn(10, 6)
    earlier = ScoredRouter(LinearScore(6, 4), TopK(2))(x)
    remapped = RemappedRouter(inner, [2, 0, 1, 3])
    assert remapped.follows
    torch.testing.assert_close(remapped(x, earlier).dense()[:, [2, 0, 1, 3]], inner(x, earlier).dense())
    assert not torch.equal(inner(x, earlier).dense(), inner(x).dense())
