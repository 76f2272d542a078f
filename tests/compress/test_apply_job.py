"""Applying a plan: killed and continued, twice, with other or damaged inputs; the source never changes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moestro.compress import Group, LayerPlan, PlanError, TensorFile, write_plan
from moestro.compress.applying import RECORD, apply_plan
from moestro.formats import FormatError
from moestro.formats.writer import write_tensors
from tests.compress.folders import plan_for
from tests.formats.folders import mixtral_config, mixtral_tensors, write_folder


def source(tmp_path, shards=4, **config):
    folder = write_folder(tmp_path / "src", mixtral_tensors(8), mixtral_config(num_local_experts=8, **config), shards)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".cache").mkdir(exist_ok=True)
    (folder / ".cache" / "x").write_text("x")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_files_in_folders_of_the_source_come_along(tmp_path):
    folder = source(tmp_path)
    (folder / "original" / "notes").mkdir(parents=True)
    (folder / "original" / "notes" / "params.json").write_text('{"dim": 8}')
    apply_plan(folder, plan_for(folder, (0, 2, 3, 5, 6, 7)), tmp_path / "out")
    assert (tmp_path / "out" / "original" / "notes" / "params.json").read_text() == '{"dim": 8}'
    assert not list((tmp_path / "out").rglob(".*"))


KILLED = """
import os, signal, sys
from pathlib import Path
from moestro.compress import read_plan
from moestro.compress.applying import apply_plan
from moestro.formats import writer

count, stop = 0, int(sys.argv[4])
pieces = writer.file_pieces
def counted(path, start, end):
    global count
    count += 1
    if count == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return pieces(path, start, end)
writer.file_pieces = counted
apply_plan(Path(sys.argv[1]), read_plan(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_killed_and_continued_gives_the_same_bytes(tmp_path):
    folder = source(tmp_path)
    plan = plan_for(folder, (0, 2, 3, 5, 6, 7))
    write_plan(plan, tmp_path / "plan.json")
    apply_plan(folder, plan, tmp_path / "whole")
    arguments = [sys.executable, "-c", KILLED, *map(str, (folder, tmp_path / "plan.json", tmp_path / "dst"))]
    killed = subprocess.run([*arguments, "20"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "dst").exists()
    done = json.loads((tmp_path / ".writing-dst.job" / "done.json").read_text())
    first = tmp_path / ".writing-dst" / sorted(done)[0]
    untouched = first.stat().st_mtime_ns
    apply_plan(folder, plan, tmp_path / "dst")
    assert (tmp_path / "dst" / first.name).stat().st_mtime_ns == untouched
    assert content(tmp_path / "dst") == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".writing-*"))


def test_half_written_and_foreign_files_of_a_job_are_written_again(tmp_path, monkeypatch):
    folder = source(tmp_path)
    plan, other = plan_for(folder, range(6)), plan_for(folder, range(2, 8))
    apply_plan(folder, plan, tmp_path / "whole")

    def interrupt(file, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        apply_plan(folder, plan, tmp_path / "dst", progress=interrupt)
    first = sorted(json.loads((tmp_path / ".writing-dst.job" / "done.json").read_text()))[0]
    os.truncate(tmp_path / ".writing-dst" / first, 10)
    shutil.copytree(tmp_path / ".writing-dst", tmp_path / ".writing-new")
    shutil.copytree(tmp_path / ".writing-dst.job", tmp_path / ".writing-new.job")
    apply_plan(folder, plan, tmp_path / "dst")
    assert content(tmp_path / "dst") == content(tmp_path / "whole")
    apply_plan(folder, other, tmp_path / "new")
    apply_plan(folder, other, tmp_path / "other")
    assert content(tmp_path / "new") == content(tmp_path / "other") != content(tmp_path / "dst")


def test_applied_again_nothing_happens_and_another_plan_is_refused(tmp_path):
    folder = source(tmp_path)
    plan = plan_for(folder, range(6))
    apply_plan(folder, plan, tmp_path / "dst")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    assert apply_plan(folder, plan, tmp_path / "dst") == tmp_path / "dst"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()} == before
    with pytest.raises(PlanError, match="dst holds another compression: choose another folder"):
        apply_plan(folder, plan_for(folder, range(4)), tmp_path / "dst")
    os.truncate(tmp_path / "dst" / "model-00001-of-00004.safetensors", 99)
    with pytest.raises(PlanError, match="dst exists and is no finished compression"):
        apply_plan(folder, plan, tmp_path / "dst")
    (tmp_path / "else").mkdir()
    with pytest.raises(PlanError, match="else exists and is no finished compression"):
        apply_plan(folder, plan, tmp_path / "else")


def test_the_source_stays_as_it_is_and_companions_go_along(tmp_path):
    folder = source(tmp_path)
    before = content(folder)
    apply_plan(folder, plan_for(folder, range(6)), tmp_path / "dst")
    assert content(folder) == before
    names = set(content(tmp_path / "dst"))
    assert names == (set(before) - {"pytorch_model.bin"}) | {RECORD, "compression_plan.json", "hashes.json"}
    for inside in (folder, folder / "below"):
        with pytest.raises(PlanError, match="lies in the source"):
            apply_plan(folder, plan_for(folder, range(6)), inside)


def test_files_that_lose_all_their_tensors_go_and_the_rest_is_numbered_again(tmp_path):
    tensors = mixtral_tensors(8)
    folder = write_folder(tmp_path / "src", tensors, mixtral_config(num_local_experts=8), 3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    placed = {name: files[1 if ".experts.7." in name else 0 if "gate" in name else 2] for name in tensors}
    for file in files:
        save_file({name: tensors[name] for name in tensors if placed[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": placed}))
    apply_plan(folder, plan_for(folder, range(7)), tmp_path / "dst")
    left = sorted(path.name for path in (tmp_path / "dst").glob("*.safetensors"))
    assert left == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert torch.equal(
        load_file(tmp_path / "dst" / left[0])["model.layers.1.block_sparse_moe.gate.weight"],
        tensors["model.layers.1.block_sparse_moe.gate.weight"][:7],
    )


def test_scales_and_other_companions_of_experts_are_renumbered(tmp_path):
    tensors = mixtral_tensors(8)
    for name in list(tensors):
        if ".experts." in name:
            tensors[f"{name}_scale_inv"] = torch.full((1,), float(name.split(".experts.")[1][0]))
    config = mixtral_config(num_local_experts=8, quantization_config={"quant_method": "fp8"})
    folder = write_folder(tmp_path / "src", tensors, config)
    apply_plan(folder, plan_for(folder, (1, 4, 7)), tmp_path / "dst")
    written = load_file(tmp_path / "dst" / "model.safetensors")
    for new, old in enumerate((1, 4, 7)):
        name = f"model.layers.0.block_sparse_moe.experts.{new}.w2.weight"
        assert float(written[f"{name}_scale_inv"]) == old
        assert torch.equal(written[name], tensors[name.replace(f"experts.{new}", f"experts.{old}")])
    assert len(written) == len(tensors) - 2 * 5 * 6
    merged = plan_for(folder, (0,) + tuple(range(2, 8)), groups=(Group((0, 1), (0.5, 0.5)),) + tuple(
        Group((e,), (1.0,)) for e in range(2, 8)
    ))  # fmt: skip
    with pytest.raises(PlanError, match="quantised; they can be dropped, not merged"):
        apply_plan(folder, merged, tmp_path / "merged")


def mtp(tmp_path):
    """A checkpoint with a layer of experts behind its decoder."""
    tensors = mixtral_tensors(8, layers=3)
    config = mixtral_config(num_local_experts=8, num_nextn_predict_layers=1)
    return tensors, write_folder(tmp_path / "src", tensors, config, 2)


def test_multi_token_prediction_is_dropped_where_the_plan_lacks_it(tmp_path):
    tensors, folder = mtp(tmp_path)
    apply_plan(folder, plan_for(folder, range(6)), tmp_path / "dst")
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and config["num_hidden_layers"] == 2
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert not [name for name in index["weight_map"] if name.startswith("model.layers.2.")]


def test_multi_token_prediction_is_pruned_where_the_plan_has_it(tmp_path):
    tensors, folder = mtp(tmp_path)
    plan = plan_for(folder, range(6))
    plan = replace(plan, layers=(*plan.layers, LayerPlan(2, 8, (1, 2, 3, 4, 5, 6))))
    apply_plan(folder, plan, tmp_path / "dst")
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    written = {k: v for path in (tmp_path / "dst").glob("*.safetensors") for k, v in load_file(path).items()}
    gate = "model.layers.2.block_sparse_moe.gate.weight"
    assert torch.equal(written[gate], tensors[gate][1:7])
    assert torch.equal(
        written["model.layers.2.block_sparse_moe.experts.5.w1.weight"],
        tensors["model.layers.2.block_sparse_moe.experts.6.w1.weight"],
    )
    whole = replace(plan, layers=tuple(replace(layer, keep=tuple(range(8))) for layer in plan.layers))
    assert content(apply_plan(folder, whole, tmp_path / "same"))["config.json"] == content(folder)["config.json"]


def test_narrower_experts_of_one_width_are_a_stock_folder(tmp_path):
    folder = source(tmp_path, shards=1, intermediate_size=6)
    units = tuple(tuple(sorted({e % 6, (e + 2) % 6, 5 - e % 2})) for e in range(3))
    units = tuple(chosen if len(chosen) == 3 else (0, 1, 2) for chosen in units)
    apply_plan(folder, plan_for(folder, (1, 4, 7), units=units), tmp_path / "dst")
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["intermediate_size"] == 3
    old, new = load_file(folder / "model.safetensors"), load_file(tmp_path / "dst" / "model.safetensors")
    for j, e in enumerate((1, 4, 7)):
        for part in ("w1", "w3"):
            stem = "model.layers.0.block_sparse_moe.experts"
            assert torch.equal(new[f"{stem}.{j}.{part}.weight"], old[f"{stem}.{e}.{part}.weight"][list(units[j])])
        assert torch.equal(new[f"{stem}.{j}.w2.weight"], old[f"{stem}.{e}.w2.weight"][:, list(units[j])])


def test_healed_tensors_stand_in_place_of_what_would_be_written(tmp_path):
    folder = source(tmp_path)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    digest = write_tensors(tmp_path / "healed.safetensors", {gate: torch.ones(6, 4)})
    plan = replace(plan_for(folder, range(6)), tensors=TensorFile("healed.safetensors", digest))
    path = write_plan(plan, tmp_path / "plan.json")
    with pytest.raises(PlanError, match="say where the plan lies"):
        apply_plan(folder, plan, tmp_path / "dst")
    apply_plan(folder, plan, tmp_path / "dst", plan_path=path)
    written = {k: v for file in (tmp_path / "dst").glob("*.safetensors") for k, v in load_file(file).items()}
    assert torch.equal(written[gate], torch.ones(6, 4))
    digest = write_tensors(tmp_path / "wrong.safetensors", {gate: torch.ones(8, 4)})
    wrong = replace(plan, tensors=TensorFile("wrong.safetensors", digest))
    with pytest.raises(PlanError, match=r"gate.weight is F32 \(8, 4\), expected F32 \(6, 4\)"):
        apply_plan(folder, wrong, tmp_path / "other", plan_path=path)


@pytest.mark.parametrize("what", ["config", "routers", "headers", "index", "model_type"])
def test_a_plan_for_another_checkpoint_is_refused_with_what_differs(tmp_path, what):
    folder = source(tmp_path)
    plan = plan_for(folder, range(6))
    file = folder / "model-00002-of-00004.safetensors"
    tensors = load_file(file)
    if what == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    elif what == "index":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    elif what == "routers":
        for path in folder.glob("*.safetensors"):
            moved = {k: v + ("gate" in k) for k, v in load_file(path).items()}
            save_file(moved, path, {"format": "pt"})
    elif what == "headers":
        save_file({k: v.double() for k, v in tensors.items()}, file, {"format": "pt"})
    else:
        plan = replace(plan, source=replace(plan.source, model_type="olmoe"))
    said = "model_type 'olmoe'" if what == "model_type" else rf"another checkpoint than .*\({what} is"
    with pytest.raises(PlanError, match=said):
        apply_plan(folder, plan, tmp_path / "dst")
    assert not (tmp_path / "dst").exists() and not list(tmp_path.glob(".writing-*"))


def test_damaged_sources_are_refused_and_leave_nothing(tmp_path):
    folder = source(tmp_path)
    plan = plan_for(folder, range(6))
    file = folder / "model-00003-of-00004.safetensors"
    whole = file.read_bytes()
    for damage in (whole[:-8], None, b"xx"):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(FormatError, match="model-00003"):
            apply_plan(folder, plan, tmp_path / "dst")
        file.write_bytes(whole)
    assert not (tmp_path / "dst").exists()


def test_one_process_at_a_time_writes_a_folder(tmp_path):
    from moestro.train.folder_job import FolderInUse, FolderJob

    with FolderJob(tmp_path / "dst", {}):
        with pytest.raises(FolderInUse, match="another process is writing"):
            FolderJob(tmp_path / "dst", {}).__enter__()


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    folder = source(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(PlanError, match="needs 0.00 GB more, 0.00 GB are free"):
        apply_plan(folder, plan_for(folder, range(6)), tmp_path / "dst")
