"""MoHGE: groups, then experts inside them; a penalty on wide groups, balance inside each."""

import pytest
import torch

from moestro import FFNBank, LinearScore, MoELayer
from moestro.objectives import GroupPenalty, IntraGroupBalance
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.routers import GroupedRouter
from moestro.routing import SparseRouting, Trace
from tests.conftest import ROOT
from tests.reference import mohge as reference
from tests.tolerances import FLOAT64

D, WIDTHS, GROUPS = 5, [2, 2, 2, 4, 4, 7, 7], [[0, 1, 2], [3, 4], [5, 6]]
close = torch.testing.assert_close


def router(top_groups: int = 2, top_k: int = 3, **options) -> GroupedRouter:
    torch.manual_seed(2)
    score = LinearScore(D, 7, init_std=1.0)
    return GroupedRouter(D, score, [3, 2, 2], top_groups, top_k, init_std=1.0, **options).double()


def layer(**options) -> MoELayer:
    return MoELayer(router(**options), [FFNBank(D, WIDTHS)]).double()


def tokens(n: int = 29) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize(("top_groups", "top_k"), [(1, 1), (1, 2), (2, 3), (3, 7)])
def test_routing_equals_the_definition(top_groups: int, top_k: int) -> None:
    two_level, x = router(top_groups, top_k), tokens()
    routing = two_level(x)
    weights = [two_level.group_score.weight, two_level.score.weight]
    want = torch.stack([reference.gates(row, *weights, GROUPS, top_groups, top_k) for row in x])
    close(routing.dense(), want, **FLOAT64)
    assert routing.fixed == top_k
    probabilities = torch.stack([torch.stack(reference.probabilities(row, *weights, GROUPS)[1]) for row in x])
    close(routing.logits.softmax(-1), probabilities, **FLOAT64)
    leaves, scale = [x, *weights], torch.linspace(-1, 1, 7, dtype=torch.float64)
    have = torch.autograd.grad((routing.dense() * scale).sum(), leaves)
    for a, b in zip(have, torch.autograd.grad((want * scale).sum(), leaves), strict=True):
        close(a, b, **FLOAT64)


def test_one_group_of_all_experts_is_top_k() -> None:
    torch.manual_seed(0)
    score = LinearScore(D, 7, init_std=1.0)
    plain = GroupedRouter(D, score, [7], 1, 2).double()(tokens()).dense()
    top = tokens() @ score.weight.T
    best = top.sort(-1, descending=True).indices[:, :2]
    close(plain, torch.zeros_like(plain).scatter(1, best, top.gather(1, best).softmax(-1)), **FLOAT64)


def test_raw_gates_are_the_probabilities() -> None:
    routing = router(renormalize=False)(tokens())
    probabilities = routing.logits.softmax(-1)
    used = routing.dense() != 0
    close(routing.dense()[used], probabilities[used], **FLOAT64)


def used(routing: SparseRouting) -> list[list[int]]:
    return [routing.expert[routing.token == t].tolist() for t in range(routing.n_tokens)]


@pytest.mark.parametrize("name", ["group_penalty", "intra_group_balance"])
def test_losses_equal_the_definition(name: str) -> None:
    moe, x = layer(top_groups=1, top_k=2), tokens()
    _, (trace,) = moe(x)
    have = {"group_penalty": GroupPenalty(), "intra_group_balance": IntraGroupBalance()}[name](trace)
    probabilities = trace.routing.logits.softmax(-1)
    want = getattr(reference, name)(probabilities, used(trace.routing), WIDTHS)
    close(have, want, **FLOAT64)
    leaves = list(moe.router.parameters())
    wanted = torch.autograd.grad(want, leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad(have, leaves), wanted, strict=True):
        close(a, b, **FLOAT64)


def evenly(experts: list[list[int]]) -> Trace:
    """Every token as sure of each expert, and given these."""
    index = torch.tensor(experts)
    weight = torch.full(index.shape, 1 / index.shape[1], dtype=torch.float64)
    logits = torch.zeros(len(experts), 7, dtype=torch.float64)
    routing = SparseRouting.from_topk(index, weight, 7, logits)
    return Trace(layer(), torch.zeros(len(experts), D), routing)


def test_values_of_even_and_uneven_routing() -> None:
    every = [[e] for e in range(7)]
    assert float(IntraGroupBalance()(evenly(every))) == pytest.approx(1.0)
    narrow, wide = evenly([[0], [1], [2]]), evenly([[5], [6]])
    assert float(IntraGroupBalance()(narrow)) == pytest.approx(1 / 3)  # groups without rows add nothing
    assert float(GroupPenalty()(narrow)) < float(GroupPenalty()(evenly(every))) < float(GroupPenalty()(wide))


def test_the_penalty_moves_tokens_to_the_narrow_group() -> None:
    """Trained on nothing else, for a router from which every group starts equally likely."""
    moe, x = layer(top_groups=1, top_k=2), tokens(64).detach()
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    before = moe(x)[1][0].active_width().mean()
    for _ in range(60):
        optimizer.zero_grad()
        GroupPenalty()(moe(x)[1][0]).backward()
        optimizer.step()
    assert float(moe(x)[1][0].active_width().mean()) < 0.8 * float(before)


def test_experts_take_their_group_with_them() -> None:
    two_level, x = router(), tokens()
    before = two_level(x).dense()
    index = torch.tensor([6, 3, 0, 1, 5, 2, 4])
    two_level.reindex(index)
    assert two_level.group.tolist() == [2, 1, 0, 0, 2, 0, 1]
    close(two_level(x).dense(), before[:, index], **FLOAT64)
    two_level.reindex(torch.tensor([0, 1, 2, 3, 4, 5, 6, -1]))
    assert two_level.group.tolist() == [2, 1, 0, 0, 2, 0, 1, 1]
    with pytest.raises(ValueError, match=r"leaves group 2 without experts"):
        two_level.reindex(torch.tensor([1, 2, 3, 5, 6]))


@pytest.mark.parametrize(
    ("groups", "top_groups", "top_k", "message"),
    [
        ([3, 2], 1, 1, r"groups=\[3, 2\], allowed: sizes above 0 that sum to 7 experts"),
        ([7, 0], 1, 1, r"groups=\[7, 0\], allowed: sizes above 0"),
        ([3, 2, 2], 4, 1, r"top_groups=4, allowed: 1 to 3, the number of groups"),
        ([3, 2, 2], 1, 3, r"top_k=3, allowed: 1 to 2, the experts of the 1 smallest groups"),
    ],
)
def test_impossible_groups_are_refused(groups: list[int], top_groups: int, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedRouter(D, LinearScore(D, 7), groups, top_groups, top_k)


def test_the_recipe_is_mohge() -> None:
    recipe = load_recipe(ROOT / "recipes" / "mohge.yaml")
    for moe in build_model(recipe, 64).moe_layers().values():
        assert isinstance(moe.router, GroupedRouter)
        widths = moe.expert_widths().tolist()  # type: ignore[union-attr]
        for group in moe.router.members().tolist():
            assert len({width for width, inside in zip(widths, group, strict=True) if inside}) == 1
    assert [name for name, *_ in build_training(recipe)[1]] == ["group_penalty", "intra_group_balance"]
