"""Runs on several ranks are refused where the fullest rank has too little memory."""

from pathlib import Path

import pytest
import torch

from moestro.parallel import Ranks
from moestro.plan import require_ranks_fit
from moestro.recipe.load import load_recipe
from moestro.recipe.memory import OVERRIDE
from moestro.recipe.syntax import RecipeError

HMOE = Path(__file__).resolve().parents[2] / "recipes" / "paper" / "hmoe-0.4b.yaml"


class Two(Ranks):
    """One of two ranks; the other has `other` bytes free."""

    other = float("inf")

    def least(self, own: float) -> float:
        return min(own, self.other)


def required(monkeypatch: pytest.MonkeyPatch, free: float | None, *changes: str) -> None:
    monkeypatch.setattr("moestro.plan.fit.free_memory", lambda device: free)
    recipe = load_recipe(HMOE, ["train.batch_size=8", "train.accumulate=1", "data.tokenizer={kind: bytes}", *changes])
    require_ranks_fit(recipe, 256, Two(torch.device("cpu"), 1, 2))


def test_what_is_too_large_for_a_rank_is_told_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"a rank needs about .* GB \(.*parameters and optimizer") as refused:
        required(monkeypatch, 1e9)
    assert "cpu (the fullest of 2 ranks) has 1.0 GB free" in str(refused.value) and OVERRIDE in str(refused.value)
    required(monkeypatch, 1e12)
    required(monkeypatch, 1e9, "train.check_memory=false")


@pytest.mark.parametrize("own", [1e12, None])
def test_all_ranks_refuse_what_one_cannot_hold(own: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    required(monkeypatch, own)
    monkeypatch.setattr(Two, "other", 1e9)
    with pytest.raises(RecipeError, match="fullest of 2 ranks. has 1.0 GB free"):
        required(monkeypatch, own)


def test_ranks_of_one_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(RecipeError) as refused:
        required(monkeypatch, 2e9)
    assert "has 1.0 GB free" in str(refused.value)


def test_what_cannot_be_spread_is_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    required(monkeypatch, 1e9, "train.batch_size=9")
