"""What recipes become: weights by seed, injected keywords, run folders that belong to one recipe."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.experts import SingletonBank
from moestro.ops.whole_files import DamagedFile
from moestro.recipe.build import build_data, build_model, build_training, first_difference, run_training
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError, dump_yaml
from moestro.train import CheckpointError, RunFolder, RunFolderError, TrainingStopped
from tests.conftest import ROOT

FOLDER = ROOT / "recipes"
SMALL = ["model.n_layers=2", "model.d_model=16", "model.attention.n_heads=2"]


def weights(*overrides: str) -> dict[str, torch.Tensor]:
    return build_model(load_recipe(FOLDER / "dense.yaml", [*SMALL, *overrides]), 50).state_dict()


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first = weights("train.seed=1")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    again, other = weights("train.seed=1"), weights("train.seed=2")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_layers_replace_the_ffn_of_their_block_only() -> None:
    model = build_model(load_recipe(FOLDER / "peer.yaml"), 300, "meta")
    assert list(model.moe_layers()) == ["blocks.2.ffn"]
    everywhere = build_model(load_recipe(FOLDER / "hmoe.yaml"), 300, "meta")
    assert list(everywhere.moe_layers()) == [f"blocks.{i}.ffn" for i in range(4)]
    assert len({id(layer.router) for layer in everywhere.moe_layers().values()}) == 4


def test_experts_are_told_how_their_router_weights_them() -> None:
    """The scale of v depends on heads and top_k, which the recipe gives once, to the router."""
    overrides = ["model.d_model=32", "model.layers.2.router.heads=2", "model.layers.2.router.top_k=16"]
    bank = build_model(load_recipe(FOLDER / "peer.yaml", overrides), 50).moe_layers()["blocks.2.ffn"].bank
    told = SingletonBank(32, 4096, heads=2, top_k=16)
    assert bank.down.std().item() == pytest.approx(told.down.std().item(), rel=0.02)
    assert bank.down.std().item() != pytest.approx(SingletonBank(32, 4096).down.std().item(), rel=0.1)


def test_the_model_can_be_tied_and_grouped() -> None:
    overrides = [*SMALL, "model.tie_embeddings=true", "model.attention.n_kv_heads=1", "model.norm_eps=1e-3"]
    model = build_model(load_recipe(FOLDER / "dense.yaml", overrides), 50)
    assert model.head.weight is model.embedding.weight
    assert model.blocks[0].attention.n_kv_heads == 1
    assert model.blocks[1].ffn_norm.eps == model.norm.eps == 1e-3


def test_a_leaking_router_is_allowed_only_by_name() -> None:
    overrides = ["model.ffn.router={kind: slots}", "model.allow_non_causal=true"]
    model = build_model(load_recipe(FOLDER / "hmoe.yaml", overrides), 50, "meta")
    assert not model.moe_layers()["blocks.0.ffn"].router.causal


def test_training_settings_come_from_train_and_optim() -> None:
    overrides = ["train.budget.flops=1e9", "train.seed=7", "optim.schedule={kind: wsd, decay: 0.3}", "optim.clip=null"]
    settings, objectives, rules = build_training(load_recipe(FOLDER / "hmoe.yaml", overrides))
    assert settings.budget.unit == "flops" and settings.budget.total == 1e9 and settings.seed == 7
    assert settings.optim.schedule.decay == 0.3 and settings.optim.clip is None and settings.optim.betas == (0.9, 0.95)
    ((name, weight, penalty),) = objectives
    assert (name, weight, penalty.normalize) == ("parameter_penalty", 0.01, "mean") and rules == []


@pytest.fixture
def quick(small_data: list[str]) -> list[str]:
    return [
        *small_data,
        *SMALL,
        "data.seq_len=16",
        "train.batch_size=4",
        "train.eval_tokens=64",
        "train.budget.steps=4",
    ]


def test_a_finished_run_is_not_run_again(tmp_path: Path, quick: list[str]) -> None:
    recipe = load_recipe(FOLDER / "hmoe.yaml", quick)
    first = run_training(recipe, tmp_path, show_preparation=False)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    assert run_training(recipe, tmp_path, show_preparation=False) == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


def test_a_folder_belongs_to_one_recipe(tmp_path: Path, quick: list[str]) -> None:
    run_training(load_recipe(FOLDER / "hmoe.yaml", quick), tmp_path, show_preparation=False)
    with pytest.raises(RecipeError) as error:
        run_training(load_recipe(FOLDER / "hmoe.yaml", [*quick, "optim.lr=1e-4"]), tmp_path, show_preparation=False)
    assert str(error.value) == (
        f"{tmp_path} holds a run of another recipe: optim.lr was 0.002, now 0.0001. Choose another folder (--out), or "
        f"continue that run: moestro train {tmp_path}/recipe.yaml --out {tmp_path}"
    )


def test_a_folder_is_not_claimed_before_the_data_is_there(tmp_path: Path, quick: list[str]) -> None:
    typo = load_recipe(FOLDER / "hmoe.yaml", [*quick, "data.source.paths=wrods.txt"])
    with pytest.raises(RecipeError, match=r"wrods\.txt: no such file .*\(command line: data\.source\.paths\)$"):
        run_training(typo, tmp_path / "run", show_preparation=False)
    assert not (tmp_path / "run").exists()
    assert run_training(load_recipe(FOLDER / "hmoe.yaml", quick), tmp_path / "run", show_preparation=False)["step"] == 4


def test_what_is_wrong_with_a_source_s_files_is_said_with_its_place(tmp_path: Path, quick: list[str]) -> None:
    (tmp_path / "d.jsonl").write_text('{"body": "x"}\n')
    held_out = f"data.val_source={{kind: jsonl, paths: {tmp_path}/d.jsonl}}"
    recipe = load_recipe(FOLDER / "hmoe.yaml", [*quick, held_out])
    with pytest.raises(RecipeError, match=r"no field 'text'; there are: body.*\(command line: data\.val_source\)$"):
        build_data(recipe).prepare(progress=False)


def test_another_recipe_is_refused_before_its_data_is_prepared(tmp_path: Path, quick: list[str]) -> None:
    run_training(load_recipe(FOLDER / "hmoe.yaml", quick), tmp_path, show_preparation=False)
    typo = load_recipe(FOLDER / "hmoe.yaml", [*quick, "data.source.paths=wrods.txt"])
    with pytest.raises(RecipeError, match=r"holds a run of another recipe: data\.source\.paths was "):
        run_training(typo, tmp_path, show_preparation=False)


def test_a_folder_in_use_is_not_claimed(tmp_path: Path, quick: list[str]) -> None:
    with RunFolder(tmp_path), pytest.raises(RunFolderError, match="is in use by process"):
        run_training(load_recipe(FOLDER / "hmoe.yaml", quick), tmp_path, show_preparation=False)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "checkpoints"}


def test_a_recipe_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, file = load_recipe(FOLDER / "hmoe.yaml"), tmp_path / "recipe.yaml"

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moestro.ops.whole_files.sync_file", killed)
    with pytest.raises(KeyboardInterrupt):
        recipe.write(file)
    assert not file.exists()


def test_what_decides_nothing_may_change_between_sessions(tmp_path: Path, quick: list[str]) -> None:
    display: Any = StopAfter(2)
    with pytest.raises(TrainingStopped):
        run_training(load_recipe(FOLDER / "hmoe.yaml", quick), tmp_path, progress=display, show_preparation=False)
    free = ["train.seed=0", "train.eval_every=1", "train.keep_last=9", "paper.title=Another title"]
    run_training(load_recipe(FOLDER / "hmoe.yaml", [*quick, *free]), tmp_path, show_preparation=False)
    there = load_recipe(tmp_path / "recipe.yaml")
    assert there.tree["train"]["eval_every"] == 1 and there.paper.title == "Another title"
    evaluated = [line["step"] for line in curve(tmp_path) if "eval" in line]
    assert evaluated == [3, 4]


def test_the_recipe_of_a_finished_run_stays(tmp_path: Path, quick: list[str]) -> None:
    run_training(load_recipe(FOLDER / "hmoe.yaml", quick), tmp_path, show_preparation=False)
    before = (tmp_path / "recipe.yaml").read_text()
    other = load_recipe(FOLDER / "hmoe.yaml", [*quick, "train.eval_every=1"])
    assert run_training(other, tmp_path, show_preparation=False)["step"] == 4
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_a_partial_recipe_in_a_run_folder_is_continued(tmp_path: Path, quick: list[str]) -> None:
    """As run folders had them before defaults were written out."""
    recipe, display = load_recipe(FOLDER / "hmoe.yaml", quick), StopAfter(2)
    with pytest.raises(TrainingStopped):
        run_training(recipe, tmp_path, progress=display, show_preparation=False)  # type: ignore[arg-type]
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe.tree))
    (tmp_path / "hashes.json").unlink()
    assert run_training(recipe, tmp_path, show_preparation=False)["step"] == 4


def test_first_difference_looks_everywhere() -> None:
    assert first_difference({"a": {"b": [1]}}, {"a": {"b": [1]}}) is None
    assert first_difference({"a": {"b": [1]}}, {"a": {"b": [2]}}) == ("a.b", [1], [2])
    assert first_difference({"a": 1}, {"a": 1.0}) == ("a", 1, 1.0)
    assert first_difference({"a": {1: 2}}, {"a": {}}) == ("a.1", 2, "not set")


class StopAfter:
    """A display that interrupts training after so many steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __enter__(self) -> "StopAfter":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def show(self, line: dict, share: float) -> None:
        if line["step"] == self.steps and "loss" in line:
            os.kill(os.getpid(), signal.SIGTERM)

    def message(self, text: str) -> None:
        return None


def curve(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def test_a_stopped_run_continues_to_the_same_end(tmp_path: Path, quick: list[str]) -> None:
    recipe = load_recipe(FOLDER / "hmoe.yaml", quick)
    run_training(recipe, tmp_path / "whole", show_preparation=False)
    display: Any = StopAfter(2)
    with pytest.raises(TrainingStopped, match="stopped by SIGTERM, saved .*step-00000002"):
        run_training(recipe, tmp_path / "stopped", progress=display, show_preparation=False)
    run_training(recipe, tmp_path / "stopped", show_preparation=False)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")


def test_a_recipe_edited_in_its_run_folder_is_caught(tmp_path: Path, quick: list[str]) -> None:
    display: Any = StopAfter(2)
    with pytest.raises(TrainingStopped):
        run_training(load_recipe(FOLDER / "hmoe.yaml", quick), tmp_path, progress=display, show_preparation=False)
    file = tmp_path / "recipe.yaml"
    file.write_text(file.read_text().replace("lr: 0.002", "lr: 0.003"))
    with pytest.raises(
        DamagedFile, match=r"recipe\.yaml is damaged: it has sha256 .*where the change is meant, remove"
    ):
        load_recipe(file)
    (tmp_path / "hashes.json").unlink()
    with pytest.raises(CheckpointError, match="was written with other settings: optim.lr was 0.002, now 0.003"):
        run_training(load_recipe(file), tmp_path, show_preparation=False)
