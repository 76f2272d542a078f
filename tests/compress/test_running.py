"""Requests as a whole: finished ones measure nothing, refused ones leave nothing, the source is never written to."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.compress import PlanError, running
from moestro.compress.feasible import Output
from moestro.compress.methods import Request
from moestro.compress.report import reported, write_report
from moestro.compress.running import compressed
from moestro.formats import Checkpoint
from moestro.ops.whole_files import require_intact
from tests.compress.folders import saved
from tests.data.tokenizer_files import metaspace


@pytest.fixture
def request_(tmp_path):
    saved("mixtral", tmp_path / "src", vocab_size=400)
    return Request(tmp_path / "src", "width", 0.5)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_request_is_planned_once(request_, tmp_path, monkeypatch):
    folder = compressed(request_, tmp_path / "dst")
    before = content(folder)
    monkeypatch.setattr(running, "plan_for", lambda *_: pytest.fail("planned again"))
    assert compressed(request_, tmp_path / "dst") == folder and content(folder) == before
    with pytest.raises(PlanError, match="dst exists and was made otherwise"):
        compressed(replace(request_, ratio=0.25), tmp_path / "dst")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(PlanError, match="no finished compression"):
        compressed(request_, tmp_path / "dst")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="file exists and was made otherwise"):
        compressed(request_, tmp_path / "file")


def test_a_finished_one_that_was_not_recorded_yet_is(request_, tmp_path, monkeypatch):
    """Killed between the folder's own name and the note of the request."""
    whole = running.write_json
    notes = lambda path, value: None if path.name == running.REQUESTED else whole(path, value)  # noqa: E731
    monkeypatch.setattr(running, "write_json", notes)
    monkeypatch.setattr(running.shutil, "rmtree", lambda *_, **__: None)
    folder = compressed(request_, tmp_path / "dst")
    monkeypatch.undo()
    assert compressed(request_, tmp_path / "dst") == folder
    assert (folder / running.REQUESTED).is_file() and not (tmp_path / ".writing-dst.plan").exists()


def test_a_compressed_folder_is_compressed_again(request_, tmp_path):
    """What the first says of itself is not said of the second, whose hashes hold once its report is written."""
    folder = request_.source
    for name in ("once", "twice", "thrice"):
        folder = compressed(replace(request_, source=folder), tmp_path / name)
        write_report(reported(request_.source, folder, None), folder)
        (folder / "healing.json").write_text("{}")
        require_intact(folder)
        assert Checkpoint(folder).width(0) == {"once": 12, "twice": 6, "thrice": 3}[name]
    assert "healing" not in reported(folder, compressed(replace(request_, source=folder), tmp_path / "last"), None)


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_the_source_is_not_written_to(request_, inside):
    before = content(request_.source)
    with pytest.raises(PlanError, match="never changed"):
        compressed(request_, request_.source / inside)
    assert content(request_.source) == before
    assert [path.name for path in request_.source.parent.iterdir()] == ["src"]


def test_the_folder_is_that_to_which_a_name_leads(request_, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "dst")
    assert compressed(request_, tmp_path / "link") == tmp_path / "disk" / "dst"
    monkeypatch.chdir(tmp_path / "disk")
    for name, said in ((".", "disk exists and was made otherwise"), ("/", "/ is the root of the file system")):
        with pytest.raises(PlanError, match=said):
            compressed(request_, Path(name))
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["dst"]


@pytest.mark.parametrize("change", [{"method": "reap"}, {"method": "router-norm"}, {"options": {"a": 1}}])
def test_a_refused_request_leaves_nothing(request_, tmp_path, change):
    with pytest.raises(PlanError):
        compressed(replace(request_, **change), tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_plan_with_tensors_beside_it_is_reported_and_finished(request_, tmp_path, monkeypatch):
    metaspace(request_.source)
    (tmp_path / "text.txt").write_text("Experts of different widths share a layer. " * 30)
    asked = {"fraction": 0.5, "whiten": True}
    more = {"text": str(tmp_path / "text.txt"), "tokens": 256, "seq_len": 16, "options": asked}
    request = replace(request_, method="svd", ratio=0.0, output=Output(densify=True), **more)
    with pytest.warns(UserWarning, match="fewer than 100 tokens"):
        folder = compressed(request, tmp_path / "dst")
    assert reported(request.source, folder, None)["method"] == "svd"
    monkeypatch.setattr(running, "plan_for", lambda *_: pytest.fail("planned again"))
    assert compressed(request, tmp_path / "dst") == folder


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--plan", "p.json", "--ratio", "0"], "--plan .* --ratio"),
        (["--plan", "p.json", "--option", "force=true"], "--plan .* --option"),
        (["--plan", "p.json", "--semantics", "zero"], "--plan .* --semantics"),
        (["--method", "width", "--ratio", "0.5", "--tasks", "piqa"], "--tasks needs --eval"),
        (["--translate", "--method", "width"], "--translate .* --method=width"),
        (["--translate", "--heal", "lora"], "--translate .* --heal=lora"),
        (["--method", "width", "--ratio", "0.5", "--plan-only", "--eval", "stdlib"], "--plan-only .* --eval"),
    ],
)
def test_options_that_would_be_ignored_are_refused(tmp_path, capsys, given, said):
    assert main(["compress", str(tmp_path), str(tmp_path / "dst.json"), *given]) == 2
    assert re.search(said, capsys.readouterr().err)
