"""Healing on the command line: what it changes, what it leaves, how it goes on after a kill, what a report says."""

import json

import pytest
import torch

from moestro.cli import main
from moestro.compress import PlanError, healed, healing_steps, measuring, report
from moestro.compress.feasible import Output
from moestro.compress.healed import Heal
from moestro.compress.healing import Healing
from moestro.compress.methods import Request
from moestro.compress.running import compressed, wanted_by
from moestro.data import ByteTokenizer
from moestro.formats import Checkpoint
from moestro.ops.whole_files import require_intact
from tests.compress.folders import loaded, saved
from tests.compress.test_own import run  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 100 tokens")
FEW = Healing(steps=3, lr=0.01, rank=2)


@pytest.fixture
def source(tmp_path, text_file):
    torch.manual_seed(0)
    saved("mixtral", tmp_path / "src", vocab_size=300, shards=True)
    ByteTokenizer().save(tmp_path / "src")

    def made(method="reap", ratio=0.25, **more):
        return Request(tmp_path / "src", method, ratio, text=str(text_file), tokens=512, seq_len=32, **more)

    return made


def heal(request, destination, method="lora", settings=FEW):
    how = Heal(method, request.text, settings, request.seq_len)
    return healed.healed(request.source, lambda at: compressed(request, at), destination, how, wanted_by(request))


def differing(before, after):
    old, new = Checkpoint(before), Checkpoint(after)
    assert set(old.names()) == set(new.names())
    return {name for name in old.names() if not torch.equal(old.read(name), new.read(name))}


@pytest.mark.parametrize("method", ["lora", "router-kd"])
def test_a_healed_folder_differs_where_healing_learns(tmp_path, source, method):
    request = source()
    compressed(request, tmp_path / "bare")
    folder = heal(request, tmp_path / "dst", method)
    changed = differing(tmp_path / "bare", folder)
    every = set(Checkpoint(folder).names())
    routers = {name for name in every if ".gate." in name}
    learned = {name for name in every if ".experts." in name or "_proj" in name}
    assert changed == (learned if method == "lora" else routers)
    loaded(folder)
    # hashes are those of the healed tensors
    require_intact(folder)
    said = json.loads((folder / "healing.json").read_text())
    assert len(said["losses"]) == 3 and said["losses"][-1] < said["losses"][0]
    assert (folder / "compression_plan.json").read_bytes() == (tmp_path / "bare/compression_plan.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
    # finished, it does nothing; asked otherwise, it refuses
    assert heal(request, folder, method) == folder
    with pytest.raises(PlanError, match="no finished healing of this compression"):
        heal(request, folder, method, Healing(steps=4))
    with pytest.raises(PlanError, match="made otherwise"):
        compressed(request, folder)


def test_factors_of_a_custom_folder_are_healed(tmp_path, source):
    request = source("svd", 0.0, output=Output("custom"), options={"fraction": 0.5})
    compressed(request, tmp_path / "bare")
    folder = heal(request, tmp_path / "dst")
    changed = differing(tmp_path / "bare", folder)
    assert any(name.endswith("gate_a") for name in changed) and not any(".gate." in name for name in changed)
    loaded(folder, trust=True)


@pytest.mark.parametrize("where", ["healing", "writing"])
def test_killed_and_started_again_it_ends_with_the_same_bytes(tmp_path, source, monkeypatch, where):
    request, steps = source(), healing_steps._step
    whole = heal(request, tmp_path / "whole")
    done = []

    def dying(*arguments):
        done.append(1)
        if len(done) == 3:
            raise KeyboardInterrupt
        return steps(*arguments)

    with monkeypatch.context() as patch:
        if where == "healing":
            patch.setattr(healing_steps, "EVERY", 0.0)
            patch.setattr(healing_steps, "_step", dying)
        else:
            patch.setattr(healed, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            heal(request, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
    counted = []
    monkeypatch.setattr(healing_steps, "_step", lambda *a: counted.append(1) or steps(*a))
    folder = heal(request, tmp_path / "dst")
    assert len(counted) == (1 if where == "healing" else 0)
    for path in whole.rglob("*"):
        assert path.is_dir() or path.read_bytes() == (folder / path.relative_to(whole)).read_bytes(), path


def test_quantised_experts_are_not_healed(tmp_path, source):
    with pytest.raises(PlanError, match="heal without quantise, then quantise"):
        heal(source(options={"quantise": "int8"}), tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_run_is_healed_on_its_own_training_text(tmp_path, run, capsys, monkeypatch):  # noqa: F811
    for module in (healed, report):
        monkeypatch.setattr(
            module, "measured", lambda at, asked, reader=None: measuring._measure(at, asked, reader or at)
        )
    options = ["--heal-option", "steps=20", "--heal-option", "lr=0.01", "--seq-len", "32", "--calib-tokens", "512"]
    words = ["compress", str(run), str(tmp_path / "dst"), "--method", "reap", "--ratio", "0.5", "--heal", "lora"]
    assert main([*words, *options, "--eval", "--eval-tokens", "512"]) == 0
    said = json.loads((tmp_path / "dst" / "report.json").read_text())
    assert said["after"]["perplexity"] < said["healing"]["without"]["perplexity"]
    assert "perplexity, not healed" in capsys.readouterr().out
    assert "Healed by low-rank additions" in (tmp_path / "dst" / "README.md").read_text()


def test_bad_text_is_refused_before_anything_is_done(tmp_path, source, capsys):
    request, bad = source(), tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe")
    words = ["compress", str(request.source), str(tmp_path / "dst"), "--method", "reap", "--ratio", "0.25"]
    words += ["--calib", request.text, "--calib-tokens", "512", "--seq-len", "32"]
    for option, text, said in (
        ("--eval", bad, "not UTF-8"),
        ("--eval", tmp_path / "none.txt", "no such file"),
        ("--heal-text", bad, "not UTF-8"),
    ):
        assert main([*words, "--heal", "lora", option, str(text)]) == 1
        assert said in capsys.readouterr().err
    for more, said in (
        (["--heal-text", str(bad)], "without --heal nothing is healed"),
        (["--heal", "lora", "--heal-option", "steps=1.5"], "steps=1.5, allowed: whole numbers from 1"),
        (["--heal", "lora", "--heal-option", "pace=1"], "allowed: steps, lr, rank, alpha, clip"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    for more, said in (
        (["--ratio", "0.99"], "leaves 0 of 8 experts"),
        (["--option", "quantise=int8"], "cannot be healed"),
    ):
        assert main([*words, *more, "--heal", "lora"]) == 1
        assert said in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"src", "bad.txt"}
