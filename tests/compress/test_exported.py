"""Exports of our own runs made smaller: read as the run that they came from, and exported again."""

import json

import pytest
import torch

from moestro.cli import main
from moestro.compress import PlanError, read_plan
from moestro.compress.methods import Request
from moestro.compress.running import compressed, plan_for
from moestro.compress.source import RunSource, open_source
from moestro.export import open_model
from moestro.export.exported import ExportedFolder
from moestro.export.folder import Choices, export_run
from moestro.formats import FormatError
from moestro.upgrades import VersionError
from tests.compress.test_own import run  # noqa: F401
from tests.tolerances import FLOAT32


@pytest.fixture(params=["float32", "bfloat16"])
def exported(request, tmp_path, run):  # noqa: F811
    export_run(run, tmp_path / "src", Choices(dtype=request.param, shard_bytes=40_000, licence="mit"))
    return tmp_path / "src"


def test_an_export_loses_experts_as_its_run_does(tmp_path, run, exported):  # noqa: F811
    folder = compressed(Request(exported, "width", 0.5, per_layer=True), tmp_path / "dst")
    plan = read_plan(folder / "compression_plan.json")
    dtype = ExportedFolder(exported).dtype
    if dtype == torch.float32:
        assert plan.layers == plan_for(Request(run, "width", 0.5, per_layer=True), tmp_path / "p.json").layers
    small, source = open_model(folder).model, open_source(exported)
    assert small.dtype == dtype and isinstance(source, RunSource)
    whole = source.loaded()
    with torch.no_grad():
        for layer in plan.layers:
            bank = whole.blocks[layer.layer].ffn.bank
            for e, units in enumerate(layer.units):
                bank.w_out.matrices()[e].T[[u for u in range(bank.widths[e]) if u not in units]] = 0
        tokens = torch.arange(40)[None] + 60
        have, want = small(tokens).logits.float(), whole(tokens).logits
    if dtype == torch.float32:
        torch.testing.assert_close(have, want, **FLOAT32)
    else:
        # a router whose logits are close may choose another expert for a token in bfloat16
        assert torch.isclose(have, want, atol=0.05, rtol=0.05).all(-1).float().mean() > 0.9
    said = json.loads((folder / "export.json").read_text())
    assert said["licence"] == "mit" and said["step"] == ExportedFolder(exported).said["step"]
    assert (folder / "README.md").read_text().count("# dst") == 1
    assert compressed(Request(exported, "width", 0.5, per_layer=True), folder) == folder
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_an_export_of_a_newer_version_is_refused(exported):
    file = exported / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 99}))
    with pytest.raises(VersionError, match="written by a newer moestro"):
        ExportedFolder(exported)


def test_text_is_asked_for_and_figures_are_reported(tmp_path, exported, text_file, capsys):
    words = ["compress", str(exported), str(tmp_path / "dst"), "--method", "reap", "--ratio", "0.5", "--seq-len", "32"]
    assert main(words) == 1
    assert "looks at text: say which" in capsys.readouterr().err
    more = ["--calib", str(text_file), "--calib-tokens", "512", "--heal", "lora", "--heal-option", "steps=2"]
    assert main([*words, *more]) == 0
    report = json.loads((tmp_path / "dst" / "report.json").read_text())
    sides = [report[side]["parameters"] for side in ("before", "after")]
    assert sides[1]["experts"] < sides[0]["experts"] and sides[1]["active"] <= sides[0]["active"]
    assert report["after"]["disk_bytes"] < report["before"]["disk_bytes"] and report["healing"]["losses"]
    open_model(tmp_path / "dst")


def test_damaged_exports_are_refused(tmp_path, exported):
    config = exported / "config.json"
    (exported / "hashes.json").unlink()
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "construction": None}))
    with pytest.raises(FormatError, match="no construction"):
        open_source(exported).moe_layers  # noqa: B018
    config.write_text(json.dumps({**said, "recipe": None}))
    with pytest.raises(FormatError, match="no recipe"):
        compressed(Request(exported, "width", 0.5), tmp_path / "dst")
    config.write_text(json.dumps(said))
    with pytest.raises(PlanError, match="own format"):
        plan_for(Request(exported, "width", 0.5, semantics="zero"), tmp_path / "plan.json")
