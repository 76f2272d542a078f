"""Recipes that do not fit into memory are refused before anything is read, with what to change."""

from pathlib import Path

import pytest

from moestro.cli import main
from moestro.ops import machine_memory
from moestro.recipe.memory import OVERRIDE
from tests.recipes.test_recipes import FOLDER


def refusal(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(["train", str(FOLDER / words[0]), *words[1:]]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "needs", "helps"),
    [
        (("dense.yaml", "model.d_model=65536"), "parameters", "model.d_model"),
        (("hmoe.yaml", "model.ffn.branches.0.widths.total=400000000", "train.batch_size=1", "data.seq_len=8"),
         "optimizer", "widths"),
        (("dense.yaml", "train.batch_size=10000000"), "logits", "data.seq_len"),
        (("dense.yaml", "train.batch_size=1000000", "model.n_layers=64"), "activations", "recompute"),
        (("peer_million.yaml", "model.layers.2.branches.0.n_experts=1000000000000",
          "model.layers.2.router.top_k=4"), "tables", "train.table_folder"),
    ],
)  # fmt: skip
def test_what_cannot_fit_is_refused_before_it_starts(
    words: tuple[str, ...], needs: str, helps: str, tmp_path: Path, capsys: pytest.CaptureFixture, cache: Path
) -> None:
    out = tmp_path / "run"
    # text that is not there: it was not looked at
    error = refusal(
        capsys, *words, "data.tokenizer={kind: bytes}", "data.source={kind: text, paths: no}", "--out", str(out)
    )
    assert error.startswith("moestro: error: training needs about ") and error.count("\n") == 1
    assert f"{needs} " in error and helps in error and OVERRIDE in error and "GB free" in error
    assert not out.exists()


def test_the_refusal_can_be_overridden_and_what_fits_begins(
    tmp_path: Path, small_data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tiny = ["model.n_layers=1", "model.d_model=16", "model.attention.n_heads=2", "data.seq_len=16"]
    words = [*tiny, *small_data, "train.batch_size=4", "train.budget.steps=2", "train.eval_tokens=64"]
    out = str(tmp_path / "run")
    monkeypatch.setattr("moestro.recipe.memory.free_memory", lambda device: 1000)
    assert "cpu has 0.0 GB free" in refusal(capsys, "dense.yaml", *words, "--out", out)
    overridden = ["train", str(FOLDER / "dense.yaml"), *words, "--out", out, "train.check_memory=false"]
    assert main(overridden) == 0
    monkeypatch.undo()
    # what is said about memory is no part of what is learned: the same run
    assert main(overridden[:-1]) == 0


def test_free_memory_heeds_the_limits_of_every_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    monkeypatch.setattr(machine_memory, "MEMORY_INFO", written("meminfo", "MemFree: 1 kB\nMemAvailable:    2000 kB\n"))
    monkeypatch.setattr(machine_memory, "OWN_GROUP", written("cgroup", "0::/jobs/one\n"))
    monkeypatch.setattr(machine_memory, "GROUPS", tmp_path / "groups")
    assert machine_memory.free_machine_memory() == 2_048_000
    written("groups/jobs/one/memory.max", "max\n")
    written("groups/jobs/one/memory.current", "10\n")
    assert machine_memory.free_machine_memory() == 2_048_000
    written("groups/jobs/memory.max", "1000000\n")
    written("groups/jobs/memory.current", "400000\n")
    assert machine_memory.free_machine_memory() == 600_000
    written("groups/jobs/memory.stat", "anon 5\ninactive_file 100000\n")
    assert machine_memory.free_machine_memory() == 700_000
    written("groups/memory.max", "500\n")
    written("groups/memory.current", "900\n")
    assert machine_memory.free_machine_memory() == 0
    # the first version of control groups, where the second one is mounted beside it or not at all
    written("cgroup", "4:memory:/jobs/two\n0::/\n")
    written("groups/memory.max", "max\n")
    written("groups/memory/jobs/two/memory.limit_in_bytes", "900000\n")
    written("groups/memory/jobs/two/memory.usage_in_bytes", "500000\n")
    written("groups/memory/jobs/two/memory.stat", "inactive_file 1\ntotal_inactive_file 20000\n")
    assert machine_memory.free_machine_memory() == 420_000
    written("groups/memory/memory.limit_in_bytes", "9223372036854771712\n")
    written("groups/memory/memory.usage_in_bytes", "800000\n")
    assert machine_memory.free_machine_memory() == 420_000
    monkeypatch.setattr(machine_memory, "MEMORY_INFO", tmp_path / "nowhere")
    assert machine_memory.free_machine_memory() is None


def test_more_layers_than_can_be_made_are_refused(capsys: pytest.CaptureFixture) -> None:
    error = refusal(capsys, "dense.yaml", "model.n_layers=1000000000")
    assert "n_layers=1000000000, allowed: at most 10000 (command line: model.n_layers)" in error
