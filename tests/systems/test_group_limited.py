"""Experts of a few groups only, and gates of independent scores, against DeepSeek's equations."""

import pytest
import torch

from moestro.layers import MoELayer
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.routers import BiasedRouter, GroupLimit, LinearScore, ScoredRouter, SkippingTopK, TopK
from moestro.routers.gates import GATES
from tests.conftest import ROOT
from tests.reference import group_limited as reference
from tests.tolerances import FLOAT64

E, T = 12, 40
CASES = [
    (GroupLimit(4, 2, 1), [3] * 4),
    (GroupLimit(4, 2, 2), [3] * 4),
    (GroupLimit(3, 2, 2, (6, 1, 5)), [6, 1, 5]),
    (GroupLimit(12, 5, 2), [1] * 12),
]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def busy(dense: torch.Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in dense]


# gates that are never 0: those of entmax tie at 0 and are no softmax of anything (test_entmax.py)
POSITIVE = GATES.keys() - {"entmax15"}


@pytest.mark.parametrize(("limit", "sizes"), CASES)
@pytest.mark.parametrize("gate", sorted(POSITIVE))
def test_a_token_chooses_inside_its_best_groups(limit: GroupLimit, sizes: list[int], gate: str) -> None:
    logits = random(T, E)
    routing = TopK(4, renormalize=False, gate=gate, limit=limit)(logits)
    scores = GATES[gate].scores(logits)
    want = []
    for row in scores:
        inside = reference.allowed(row, sizes, limit.top_groups, limit.best)
        want.append(set(reference.choose(row, inside, 4)))
    assert busy(routing.dense()) == want
    # groups of one expert each limit nothing as long as there are k of them
    assert (want == busy(TopK(4, gate=gate)(logits).dense())) == (max(sizes) == 1)
    chosen = torch.zeros(T, E, dtype=torch.bool)
    chosen[routing.token, routing.expert] = True
    torch.testing.assert_close(routing.dense(), scores * chosen, **FLOAT64)


def test_the_gate_of_deepseek_v3() -> None:
    """Values and gradients, with a bias that changes groups and experts."""
    torch.manual_seed(0)
    limit = GroupLimit(4, 2, 2)
    router = BiasedRouter(
        LinearScore(6, E, init_std=1.0), 4, "sigmoid", renormalize=True, scale=2.5, limit=limit
    ).double()
    router.bias.copy_(0.3 * random(E))
    x = random(T, 6).requires_grad_()
    logits = x @ router.score.weight.T
    want = torch.stack([reference.v3_gates(row, router.bias, 4, [3] * 4, 2, 2.5) for row in logits])
    have = router(x).dense()
    torch.testing.assert_close(have, want, **FLOAT64)
    torch.testing.assert_close(have.sum(-1), torch.full((T,), 2.5, dtype=torch.float64), **FLOAT64)
    leaves, slope = [x, router.score.weight], torch.arange(float(E), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((have * slope).sum(), leaves),
        torch.autograd.grad((want * slope).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **FLOAT64)
    router.bias.zero_()
    assert busy(router(x).dense()) != busy(want)


def test_all_groups_are_no_limit() -> None:
    logits = random(T, E)
    for limit in (GroupLimit(), GroupLimit(4, 4, 2), GroupLimit(2, 2, 1, (2, 10))):
        assert torch.equal(TopK(4, limit=limit)(logits).dense(), TopK(4)(logits).dense())


def test_ties_go_to_the_lower_group() -> None:
    assert busy(TopK(4, limit=GroupLimit(4, 2))(torch.zeros(3, E)).dense()) == [{0, 1, 2, 3}] * 3


@pytest.mark.parametrize("gate", sorted(GATES))
def test_gates_have_a_slope_however_far_logits_are(gate: str) -> None:
    logits = torch.tensor([[150.0, 30.0, -30.0, -150.0]]).requires_grad_()
    for value in (TopK(2, gate=gate, renormalize=False)(logits).dense(), GATES[gate].shown(logits)):
        (slope,) = torch.autograd.grad(value.sum(), logits)
        assert value.isfinite().all() and slope.isfinite().all()


@pytest.mark.parametrize("gate", sorted(POSITIVE - {"interpolate"}))
def test_shown_logits_are_those_of_the_normalised_scores(gate: str) -> None:
    logits = random(T, E)
    scores = GATES[gate].scores(logits)
    shown = TopK(2, gate=gate)(logits).logits
    torch.testing.assert_close(shown.softmax(-1), scores / scores.sum(-1, keepdim=True), **FLOAT64)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (GroupLimit(4, 5), r"top_groups=5, best=1, allowed: 1 to 4 groups, best at least 1"),
        (GroupLimit(4, 2, 0), r"top_groups=2, best=0"),
        (GroupLimit(5, 2), r"n_groups=5 of sizes \[2, 2, 2, 2, 2\] do not make 12 experts"),
        (GroupLimit(3, 2, 1, (6, 6)), r"n_groups=3 of sizes \[6, 6\] do not make 12 experts"),
        (GroupLimit(3, 2, 1, (6, 1, 5)), r"top_k=7, but 2 groups of sizes \[6, 1, 5\] may hold fewer experts"),
    ],
)
def test_impossible_groups_are_refused(limit: GroupLimit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoredRouter(LinearScore(4, E), TopK(7, limit=limit))
    with pytest.raises(ValueError, match=message):
        BiasedRouter(LinearScore(4, E), 7, limit=limit)


def test_recipes_limit_groups(tmp_path) -> None:
    tiny = ROOT / "recipes" / "moe.yaml"
    router = (
        "{kind: scored, score: {kind: linear}, select: {kind: top_k, top_k: 2, limit: {n_groups: 4, top_groups: 2}}}"
    )
    recipe = load_recipe(tiny, [f"model.ffn.router={router}"])
    (layer, *_) = build_model(recipe, 16, "meta").moe_layers().values()
    assert isinstance(layer, MoELayer) and layer.router.select.limit == GroupLimit(4, 2)  # type: ignore[union-attr]
    recipe.write(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    select = again.tree["model"]["ffn"]["router"]["select"]
    assert again == recipe and select["limit"] == {"n_groups": 4, "top_groups": 2, "best": 1, "sizes": []}
    default = load_recipe(tiny).resolved["model"]["ffn"]["router"]["select"]["limit"]
    assert default == {"n_groups": 1, "top_groups": 1, "best": 1, "sizes": []}


@pytest.mark.parametrize(("name", "layers", "experts"), [("deepseek_v3", 3, 16), ("paper/deepseek-v3", 58, 256)])
def test_deepseek_recipes(name: str, layers: int, experts: int) -> None:
    model = build_model(load_recipe(ROOT / "recipes" / f"{name}.yaml"), 16, "meta")
    mixtures = model.moe_layers()
    assert len(mixtures) == layers
    for layer in mixtures.values():
        router = layer.router
        assert isinstance(router, BiasedRouter) and router.n_experts == experts
        assert (router.gate, router.renormalize, router.scale, router.limit.best) == ("sigmoid", True, 2.5, 2)
        # half of the groups are open to a token
        assert router.limit.n_groups == 2 * router.limit.top_groups
    stored = sum(p.numel() for layer in mixtures.values() for p in layer.bank.parameters())
    width = layer.bank.widths[0]  # type: ignore[union-attr]
    assert stored == layers * experts * 3 * model.d_model * width
    if experts == 256:
        assert round(stored / 1e9) == 654


@pytest.mark.parametrize("select", [TopK(2, gate="sigmoid"), SkippingTopK(2, 0.5, gate="sigmoid", renormalize=False)])
def test_gates_that_round_to_zero_stay_so(select: TopK) -> None:
    """A sigmoid of -200 is 0 as a float: no shares of it can be taken."""
    logits = torch.full((3, E), -200.0, requires_grad=True)
    weight = select(logits).weight
    weight.sum().backward()
    assert not weight.any() and torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


def test_a_biased_router_whose_gates_round_to_zero_gives_zeros() -> None:
    router = BiasedRouter(LinearScore(4, E), 2, renormalize=True)
    torch.nn.init.constant_(router.score.weight, -100.0)
    assert not router(torch.ones(3, 4)).weight.any()
