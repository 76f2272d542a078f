"""`moestro export`: what is in the folder, what it computes, and what may go wrong while it is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moestro.cli import main
from moestro.data import load_tokenizer
from moestro.export import MoestroForCausalLM, open_model, own
from moestro.export.folder import Choices, ExportError, export_run
from moestro.export.tensors import cast
from moestro.train import CheckpointError
from moestro.train.folder_job import FolderInUse, FolderJob
from tests.conftest import ROOT
from tests.export.conftest import some_tokens
from tests.hf.families import in_own_memory

Runs = Callable[..., Path]


@torch.no_grad()
def logits(folder: Path, dtype: torch.dtype | None = None) -> torch.Tensor:
    return in_own_memory(open_model(folder, dtype=dtype).model)(some_tokens(2, 24)).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_has_all_that_others_ask_for_and_computes_the_same(run_of: Runs, tmp_path: Path) -> None:
    run, out = run_of("hmoe"), tmp_path / "out" / "hmoe"
    done = export_run(run, out, Choices(shard_bytes=2_000_000, licence="cc-by-4.0"))
    assert done.architecture == "MoestroForCausalLM" and done.nbytes > 4e6
    named = set(contents(out))
    assert named >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert named >= {"modeling_moestro.py", "configuration_moestro.py", "model.safetensors.index.json"}
    shards = sorted(name for name in named if name.endswith(".safetensors"))
    assert len(shards) == 3 and all((out / name).stat().st_size < 2_100_000 for name in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {name: load_file(out / file) for file in shards for name in [file]}
    assert index["weight_map"] == {name: file for file, held in tensors.items() for name in held}
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in tensors.values() for t in held.values())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model) is MoestroForCausalLM and torch.equal(logits(out), logits(run))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["MoestroForCausalLM"] and config["dtype"] == "float32"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_moestro.MoestroForCausalLM"
    assert config["recipe"]["optim"]["lr"] == 2e-3 and config["max_position_embeddings"] == 128
    assert "top_k" not in config and str(tmp_path.parent) not in (out / "config.json").read_text()
    own, theirs = load_tokenizer(run / "tokenizer"), AutoTokenizer.from_pretrained(out)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert theirs(text)["input_ids"] == own.encode(text)
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_card_says_where_a_model_comes_from(run_of: Runs, tmp_path: Path) -> None:
    run = run_of("hmoe")
    export_run(run, tmp_path / "out", Choices(licence="cc-by-4.0"))
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n") and "license: cc-by-4.0" in text.split("---")[1]
    bpb = json.loads((run / "done.json").read_text())["eval"]["bpb"]
    for said in ("arXiv:2408.10681", "raw widths", f"{bpb:.4f}", "parameter_penalty", "trust_remote_code"):
        assert said in text, said
    assert str(tmp_path.parent) not in text


@torch.no_grad()
def test_narrower_weights_and_the_best_checkpoint(run_of: Runs, tmp_path: Path) -> None:
    run = run_of("hmoe")
    export_run(run, tmp_path / "narrow", Choices(dtype="bfloat16", checkpoint="best"))
    stored = load_file(tmp_path / "narrow" / "model.safetensors")
    dtypes = {("router" in name, t.dtype) for name, t in stored.items() if t.is_floating_point()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    model = open_model(tmp_path / "narrow").model
    assert {name: t.dtype for name, t in model.named_parameters()} == {
        name: stored[name].dtype for name, _ in model.named_parameters()
    }
    wide = logits(run)
    assert (logits(tmp_path / "narrow").float() - wide).abs().median() < 0.02 * wide.std()
    assert torch.equal(logits(tmp_path / "narrow"), logits(run, torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["peer", pytest.param("dynmoe", marks=pytest.mark.slow), pytest.param("hypermoe", marks=pytest.mark.slow)]
)
def test_other_systems_too(run_of: Runs, tmp_path: Path, name: str) -> None:
    run = run_of(name)
    export_run(run, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(run))
    opened = open_model(tmp_path / "out")
    inputs = opened.tokenizer(["the quick", "a"], return_tensors="pt", padding=True)
    said = opened.model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 5


def test_what_cannot_be_cached_says_so_in_the_folder(run_of: Runs, tmp_path: Path) -> None:
    export_run(run_of("expert_choice"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["use_cache"] is False
    assert "nothing is cached" in (tmp_path / "out" / "README.md").read_text()
    opened = open_model(tmp_path / "out")
    inputs = opened.tokenizer("the quick", return_tensors="pt")
    assert opened.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (1, 12)


def test_the_same_export_twice_changes_nothing_and_another_is_refused(run_of: Runs, tmp_path: Path) -> None:
    run, out = run_of("moe"), tmp_path / "out"
    out.mkdir()
    first = export_run(run, out)
    before = contents(out)
    assert export_run(run, out) == first and contents(out) == before
    with pytest.raises(ExportError, match="holds another export.*--force"):
        export_run(run, out, Choices(dtype="bfloat16"))
    assert contents(out) == before
    export_run(run, out, Choices(dtype="bfloat16", force=True))
    assert open_model(out).model.dtype == torch.bfloat16
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_put_beside_an_export_is_not_replaced_and_links_are_followed(run_of: Runs, tmp_path: Path) -> None:
    run, link = run_of("moe"), tmp_path / "link"
    (tmp_path / "real").mkdir()
    link.symlink_to(tmp_path / "real")
    assert export_run(run, link).path == tmp_path / "real" and link.is_symlink()
    (link / "model.gguf").write_text("an hour of work")
    with pytest.raises(ExportError, match=r"holds what no export wrote \(model\.gguf\)"):
        export_run(run, link, Choices(dtype="bfloat16", force=True))
    (link / "model.gguf").unlink()
    for record in ("{", "[1]", '{"weights": "", "files": 3, "beside": []}'):
        (link / "export.json").write_text(record)
        with pytest.raises(ExportError, match="no export wrote it"):
            export_run(run, link, Choices(force=True))
    with pytest.raises(ExportError, match="root of the file system"):
        export_run(run, "/")


@pytest.mark.parametrize("force", [False, True])
def test_other_files_are_never_replaced(run_of: Runs, tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("ten years")
    with pytest.raises(ExportError, match="no export wrote it"):
        export_run(run_of("moe"), tmp_path / "out", Choices(force=force))
    assert contents(tmp_path / "out") == {"thesis.tex": b"ten years"}


def test_a_model_can_be_saved_over_the_export_it_came_from(run_of: Runs, tmp_path: Path) -> None:
    export_run(run_of("moe"), tmp_path / "out")
    model = open_model(tmp_path / "out").model
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    model.save_pretrained(tmp_path / "out")
    again = open_model(tmp_path / "out").model
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_runs_that_cannot_be_exported_say_why(run_of: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_of("moe"), run)
    with pytest.raises(ExportError, match=r"no recipe\.yaml"):
        export_run(tmp_path, tmp_path / "out")
    for end in ("done.json", "hashes.json"):
        (run / end).unlink()
    with pytest.raises(ExportError, match="training of .* is not over .*--unfinished"):
        export_run(run, tmp_path / "out")
    export_run(run, tmp_path / "half", Choices(unfinished=True))
    assert "in the middle of training" in (tmp_path / "half" / "README.md").read_text()
    weights = next((run / "checkpoints").glob("*/model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        export_run(run, tmp_path / "out", Choices(unfinished=True))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        export_run(run, tmp_path / "out", Choices(unfinished=True))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_what_was_there(run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = run_of("moe"), tmp_path / "out"
    export_run(run, out)
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))
        with pytest.raises(ExportError, match=r"needs 0\.00 GB more, 0\.00 GB are free"):
            export_run(run, out, Choices(dtype="float16", force=True))
    with monkeypatch.context() as patch:

        def full(path: Path, text: str) -> None:
            raise OSError(28, os.strerror(28))

        patch.setattr(own, "write_text", full)
        with pytest.raises(ExportError, match="No space left on device.*the same command continues"):
            export_run(run, out, Choices(dtype="float16", force=True))
    assert contents(out) == before
    export_run(run, out, Choices(dtype="float16", force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_numbers_beyond_a_dtype_are_refused() -> None:
    with pytest.raises(ExportError, match=r"w has numbers of up to 1e\+05, beyond torch\.float16"):
        cast("w", lambda: torch.tensor([1.0, 1e5]), torch.float16)


def test_one_process_writes_a_folder_at_a_time(run_of: Runs, tmp_path: Path) -> None:
    with FolderJob(tmp_path / "out", {}), pytest.raises(FolderInUse, match="another process is writing"):
        export_run(run_of("moe"), tmp_path / "out")


def test_killed_before_the_folder_has_its_name_the_same_command_writes_the_same_files(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes and the record of the first attempt are there already: they are of no file of the second."""

    def killed(self: FolderJob) -> Path:
        raise KeyboardInterrupt

    run = run_of("moe")
    export_run(run, tmp_path / "whole" / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FolderJob, "publish", killed)
        export_run(run, tmp_path / "again" / "out")
    assert (tmp_path / "again" / ".writing-out" / "hashes.json").is_file()
    export_run(run, tmp_path / "again" / "out")
    assert contents(tmp_path / "again" / "out") == contents(tmp_path / "whole" / "out")
    assert torch.equal(logits(tmp_path / "again" / "out"), logits(run))


@pytest.mark.slow
def test_killed_while_it_writes_nothing_appears_and_the_same_command_goes_on(run_of: Runs, tmp_path: Path) -> None:
    run, out = run_of("moe"), tmp_path / "out"
    slow = (
        "import sys, time\nfrom moestro.train import folder_job\nfrom moestro.cli import main\n"
        "whole = folder_job.FolderJob._finish\n"
        "def finish(*given):\n    whole(*given)\n    time.sleep(1)\n"
        "folder_job.FolderJob._finish = finish\n"
        f"main(['export', {str(run)!r}, '--out', {str(out)!r}, '--shard-size', '500KB'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], env={**os.environ, "PYTHONPATH": str(ROOT)})
    half = tmp_path / ".writing-out"
    while not len(list(half.glob("model-*"))) >= 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    # the last file may not be noted as whole yet
    kept = {path.name: path.stat().st_mtime_ns for path in sorted(half.glob("model-*"))[:-1]}
    assert main(["export", str(run), "--out", str(out), "--shard-size", "500KB"]) == 0
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert torch.equal(logits(out), logits(run)) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command(run_of: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = str(run_of("moe")), str(tmp_path / "out")
    assert main(["export", run, "--out", out, "--dtype", "bfloat16", "--shard-size", "1 MB"]) == 0
    assert "MoestroForCausalLM, 1,119,616 parameters, 2.2 MB" in capsys.readouterr().out
    for words, message in {
        "--dtype int8": "invalid choice: 'int8'",
        "--shard-size 3XB": "'3XB' is no size",
        "--format gguf": "invalid choice: 'gguf'",
    }.items():
        assert main(["export", run, "--out", out, *words.split()]) == 2
        assert message in capsys.readouterr().err
    assert main(["export", run, "--out", out]) == 1
    assert "holds another export" in capsys.readouterr().err
