"""Experts of groups of text, from a recipe's sources to the tokens that they serve."""

import json
from pathlib import Path

import pytest
import torch

from moestro.data import Batch
from moestro.evaluate.scoring import score, told
from moestro.experts import FFNBank, SharedExpert
from moestro.layers import LowRankMixtures, MoELayer, adapt
from moestro.layers.adapted import TokenFacts
from moestro.recipe.build import build_data, build_model, run_training
from moestro.recipe.evaluation import evaluate_run, opened_run
from moestro.recipe.load import load_recipe
from moestro.routers import LinearScore, ScoredRouter, TopK
from moestro.train import newest_checkpoint
from moestro.train.checkpoint import read_tensors
from tests.conftest import ROOT
from tests.systems.test_smola import TARGETS, sharp, slots, stirred
from tests.tolerances import FLOAT64
from tests.train.tiny import tiny_model

SMALL = ["model.d_model=16", "model.n_layers=2", "model.attention.n_heads=2", "model.ffn.width=24", "data.seq_len=32"]
BRIEF = ["train.batch_size=2", "train.budget.steps=3", "train.eval_tokens=96", "optim.lr=0.01", "train.save_every=1"]


def text(path: Path, words: str) -> Path:
    path.write_text("".join(json.dumps({"text": f"{words} {i}. " * 3, "kind": words[:1]}) + "\n" for i in range(90)))
    return path


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A recipe's keys: two files, each a group, and experts for each beside those of all."""
    folder = tmp_path_factory.mktemp("kinds")
    files = [text(folder / "a.jsonl", "a cow says moo"), text(folder / "b.jsonl", "bridges of iron")]
    sources = ", ".join(f"{{kind: jsonl, paths: {file}}}" for file in files)
    data = [f"data.source={{kind: grouped, sources: [{sources}]}}", "data.tokenizer={kind: bytes}"]
    groups = ["adapt.mixtures={kind: low_rank, n_experts: 2, rank: 2, groups: [null, 0, 1]}", "train.tensorboard=false"]
    return [*data, *SMALL, *BRIEF, *groups]


def trained(said: list[str], run: Path, *more: str) -> dict[str, torch.Tensor]:
    run_training(load_recipe(ROOT / "recipes" / "smola.yaml", [*said, *more]), run, show_preparation=False)
    return read_tensors(newest_checkpoint(run), "model")


def test_a_recipe_s_sources_are_groups_of_experts(said: list[str], tmp_path: Path) -> None:
    """Both kinds learn; computed again in the backward pass, and in micro-batches of one kind, they learn the same."""
    plain = trained(said, tmp_path / "plain")
    for mixture in range(3):
        assert all(value.any() for name, value in plain.items() if f"mixtures.{mixture}.bank.up" in name)
    for number, more in enumerate((["train.recompute=true"], ["train.accumulate=2"])):
        again = trained(said, tmp_path / f"again-{number}", *more)
        for name, value in plain.items():
            torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)
    assert evaluate_run(opened_run(tmp_path / "plain"), 96)["loss"] > 0


def test_experts_of_a_group_learn_from_its_tokens_alone(said: list[str]) -> None:
    recipe = load_recipe(ROOT / "recipes" / "smola.yaml", said)
    dataset = build_data(recipe).prepare(progress=False)
    model = build_model(recipe, dataset.vocab_size)
    batch = dataset.train_batch(0, 4, seed=0)
    for group in (0, 1):
        model.zero_grad()
        alone = Batch(batch.tokens, batch.targets, batch.documents, batch.n_bytes, torch.full_like(batch.tokens, group))
        score(model, alone, "fp32")[1].sum().backward()
        for name, parameter in model.named_parameters():
            if name.endswith("bank.up"):
                wanted = not name.endswith(f"mixtures.{2 - group}.bank.up")
                assert (parameter.grad is not None and bool(parameter.grad.any())) == wanted, name


def test_text_without_groups_is_refused(said: list[str], tmp_path: Path) -> None:
    plain = [key for key in said if not key.startswith("data.source")]
    file = text(tmp_path / "c.jsonl", "no kind")
    with pytest.raises(ValueError, match=r"experts of group 0 were not told the groups of tokens"):
        trained([*plain, f"data.source={{kind: jsonl, paths: {file}}}"], tmp_path / "run")
    grouped = f"data.source={{kind: jsonl, paths: {file}, group_field: kind, groups: [a, n]}}"
    assert trained([*plain, grouped], tmp_path / "field")


def test_padding_around_shared_experts_changes_nothing() -> None:
    """A mixture of experts hands on the tokens alone that count; groups follow them."""
    torch.manual_seed(0)
    shared = SharedExpert(6, 5)
    layer = MoELayer(ScoredRouter(LinearScore(6, 2), TopK(1)), [FFNBank(6, [3, 3]), shared]).double()
    adapters = adapt(layer, "w_in|w_out", LowRankMixtures(2, 2, sharp, groups=[None, 1]))
    stirred(layer)
    layer.double()
    x, groups = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0]])
    keep = torch.tensor([[True] * 5, [True, True, False, False, False]])
    with adapters.given(groups, keep):
        have = layer(x, keep)[0]
    for row, length in ((0, 5), (1, 2)):
        with adapters.given(groups[row : row + 1, :length]):
            want = layer(x[row : row + 1, :length])[0]
        torch.testing.assert_close(have[row : row + 1, :length], want, **FLOAT64)
    mixed = MoELayer(ScoredRouter(LinearScore(6, 2), TopK(1)), [FFNBank(6, [3, 3]), SharedExpert(6, 5)])
    slotted = adapt(mixed, "w_in", LowRankMixtures(2, 2, slots), allow_non_causal=True)
    with slotted.given(keep=keep), pytest.raises(ValueError, match="slots would mix them"):
        mixed(x.float(), keep)


def test_models_without_adapters_are_told_nothing() -> None:
    model = tiny_model(kinds=("dense",))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(tokens, tokens, tokens, tokens, tokens)
    assert score(model, batch, "fp32")[1].shape == (1, 4)
    adapters = adapt(model, TARGETS, LowRankMixtures(2, 2))
    with told(model, batch):
        assert adapters.told.groups is not None and adapters.told.keep is None
    assert adapters.told == TokenFacts()
