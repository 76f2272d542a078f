"""Damage of every kind is found by whoever reads: what `bench.reliability.corruption` counts, on fewer files."""

import json
import random
import shutil

import pytest

from bench.reliability import corruption
from bench.reliability.corruption import EFFECTLESS, FOUND, UNCLEAR, UNSEEN, counted, outcome
from bench.reliability.readers import Read, finished_run
from moestro.ops.whole_files import DamagedFile, forget_hashes, record_hashes, recorded_hashes, require_intact
from moestro.recipe.build import run_training
from moestro.recipe.load import load_recipe
from moestro.train import RunFolderError
from moestro.train.folder import MetricsFile
from tests.conftest import ROOT


def test_hashes_know_what_was_written(tmp_path):
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    require_intact(tmp_path)
    record_hashes(tmp_path, ["a", "b"])
    assert recorded_hashes(tmp_path).keys() == {"a", "b"}
    require_intact(tmp_path)
    require_intact(tmp_path, "a", "what nobody wrote down")
    (tmp_path / "a").write_text("oNe")
    require_intact(tmp_path, "b")
    for names in ((), ("a",)):
        with pytest.raises(
            DamagedFile, match=r"a is damaged: it has sha256 \w{64}, hashes\.json beside it says \w{64}"
        ):
            require_intact(tmp_path, *names)
    (tmp_path / "a").unlink()
    with pytest.raises(DamagedFile, match=r"a is missing, hashes\.json beside it lists it"):
        require_intact(tmp_path)
    forget_hashes(tmp_path)
    require_intact(tmp_path)


@pytest.mark.parametrize("damage", [lambda text: text[:20], lambda text: text.replace("a", "b", 1), lambda text: "[]"])
def test_damaged_hashes_are_no_hashes(tmp_path, damage):
    (tmp_path / "a").write_text("one")
    record_hashes(tmp_path, ["a"])
    file = tmp_path / "hashes.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(DamagedFile, match=r"hashes\.json is damaged \(.*: restore it, or remove it"):
        require_intact(tmp_path, "a")


def test_metrics_before_the_checkpoint_are_verified(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1, "loss": 2.5})
    size, digest = file.sync(), file.sha256
    file.write({"step": 2, "loss": 2.25})
    file.close()
    again = MetricsFile(file.path, size, digest)
    again.write({"step": 2, "loss": 2.25})
    assert again.sha256 == file.sha256
    again.close()
    file.path.write_text(file.path.read_text().replace("2.5", "2.4", 1))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl is damaged: its first 25 bytes have sha256 .*says"):
        MetricsFile(file.path, size, digest)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two finished runs of a step."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{n} and {n * n}" for n in range(400)))
    words = [
        "model.n_layers=1",
        "model.d_model=8",
        "model.attention.n_heads=2",
        "model.ffn.width=8",
        "train.batch_size=2",
    ]
    words += [f"data.source={{kind: text, paths: {text}, split: blank-line}}", "data.tokenizer={kind: bytes}"]
    words += ["data.seq_len=16", "train.budget={steps: 1}", "train.eval_tokens=32", "train.tensorboard=false"]
    for name in ("one", "other"):
        recipe = load_recipe(ROOT / "recipes" / "dense.yaml", [*words, f"train.seed={len(name)}"])
        run_training(recipe, folder / name, show_preparation=False)
    return folder


def test_all_damage_to_a_run_is_found(run):
    read = Read("run", run / "one", run / "other", finished_run)
    assert {path.name for path in read.files} >= {"recipe.yaml", "done.json", "metrics.jsonl", "hashes.json"}
    figures = counted(read, 30, random.Random(1))
    assert [figure.what for figure in figures] == [
        "a bit changed: found", "cut short: found", "renamed: found", "of another folder: found"
    ]  # fmt: skip
    assert all(figure.holds for figure in figures) and figures[0].value >= 25
    # every case put back what it changed
    finished_run(run / "one")


def test_outcomes_are_told_apart(tmp_path):
    folder = tmp_path / "kind"
    folder.mkdir()
    (folder / "x.json").write_text('{"a": 1}')

    def opened(folder):
        value = json.loads((folder / "x.json").read_text())["a"]
        if value == 3:
            raise ValueError("no place named")
        if value == 4:
            raise ValueError(f"{folder / 'x.json'}: 4")
        return str(value)

    read = Read("kind", folder, folder, opened)
    contents = {b'{"a":1}': EFFECTLESS, b'{"a": 2}': UNSEEN, b'{"a": 3}': UNCLEAR, b'{"a": 4}': FOUND, b"{}": UNCLEAR}
    for content, expected in contents.items():
        assert outcome(read, next(iter(read.files)), content, "1")[0] == expected
    assert (folder / "x.json").read_text() == '{"a": 1}'
    shutil.rmtree(folder)


@pytest.mark.slow
def test_damage_to_every_kind_of_folder_is_found(tmp_path):
    corruption.main(["--bits", "12", "--json", str(tmp_path / "corruption.json")])
    figures = json.loads((tmp_path / "corruption.json").read_text())["figures"]
    assert {figure["case"] for figure in figures if figure["holds"]} >= {
        "checkpoint",
        "token shards",
        "exported folder",
    }
