"""Experts that choose tokens, and tokens that skip a layer, against the equations."""

import pytest
import torch

from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import ExpertChoice, LinearScore, ScoredRouter
from tests.conftest import ROOT
from tests.reference import choices as reference
from tests.tolerances import FLOAT64

D, E, T = 6, 8, 30
RECIPES = ROOT / "recipes"


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("factor", [0.1, 1.0, 2.0, 2.3, 8.0])
def test_every_expert_takes_its_best_tokens(factor: float) -> None:
    logits = random(T, E).requires_grad_()
    routing = ExpertChoice(factor)(logits)
    want = reference.expert_choice(reference.softmax(logits), factor)
    torch.testing.assert_close(routing.dense(), want, **FLOAT64)
    slope = torch.arange(float(E), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((dense * slope).sum(), logits)[0] for dense in (routing.dense(), want))
    torch.testing.assert_close(mine, theirs, **FLOAT64)
    assert len(set(routing.load().tolist())) == 1
    assert len(set(routing.per_token(1.0).tolist())) > 1 or factor == E


def test_choosing_all_tokens_is_the_dense_mixture() -> None:
    logits = random(T, E)
    torch.testing.assert_close(ExpertChoice(E)(logits).dense(), logits.softmax(-1), **FLOAT64)


def test_later_tokens_change_earlier_ones() -> None:
    """Why a decoder refuses it."""
    logits = random(T, E)
    first = ExpertChoice(1.0)(logits).dense()[:5]
    logits[5:] += 3 * random(T - 5, E)
    assert not ExpertChoice.causal and not torch.equal(ExpertChoice(1.0)(logits).dense()[:5], first)


def test_ties_go_to_the_earlier_token() -> None:
    assert sorted(ExpertChoice(1.0)(torch.zeros(16, 8)).token.tolist()) == sorted([0, 1] * 8)


def test_no_tokens() -> None:
    assert ExpertChoice(1.0)(torch.zeros(0, E)).n_rows == 0


def test_impossible_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="factor=0, allowed: above 0"):
        ExpertChoice(0)
    with pytest.raises(ValueError, match=r"factor=9.0, allowed: at most 8, the number of experts"):
        ScoredRouter(LinearScore(D, E), ExpertChoice(9.0))
    with pytest.raises(ValueError, match="gate='softmax' of one expert is the constant 1; use gate: sigmoid"):
        ScoredRouter(LinearScore(D, 1), ExpertChoice(0.5))


@pytest.mark.parametrize(
    ("name", "blocks", "experts", "factor"),
    [
        ("expert_choice", 4, 8, 2),
        ("paper/expert-choice", 6, 64, 2),
    ],
)
def test_recipes_must_ask_for_what_sees_the_future(name: str, blocks: int, experts: int, factor: float) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    layers = build_model(recipe, 16, "meta").moe_layers()
    assert len(layers) == blocks
    for layer in layers.values():
        select = layer.router.select  # type: ignore[union-attr]
        assert isinstance(select, ExpertChoice) and select.factor == factor and layer.router.n_experts == experts
    refused = load_recipe(RECIPES / f"{name}.yaml", ["model.allow_non_causal=false"])
    with pytest.raises(RecipeError, match="looks at other tokens"):
        build_model(refused, 16, "meta")
