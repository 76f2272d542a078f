"""Checkpoint folders: complete or absent, verified, few."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from moestro.train import CheckpointError, OptimSettings, load_weights
from moestro.train.checkpoint import (
    keep_checkpoints,
    list_checkpoints,
    read_state,
    read_tensors,
    write_checkpoint,
)
from moestro.train.durable import remove_temporary
from moestro.train.optim import build_optimizer
from moestro.train.tensors import (
    join,
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
    random_state,
    set_random_state,
    split,
)
from moestro.upgrades import CHECKPOINT, VersionError
from tests.train.tiny import tiny_model


def write(folder, step, value=1.0, **state):
    return write_checkpoint(folder, step, {"model": {"w": torch.full((3,), value)}}, state)


def test_what_was_written_comes_back(tmp_path):
    tensors = {
        "model": {"a": torch.randn(3, 2), "b": torch.tensor(2.5, dtype=torch.float64), "none": torch.empty(0, 4)},
        "optimizer": {
            "a/step": torch.tensor(3.0),
            "bits": torch.tensor([True, False]),
            "half": torch.ones(2).bfloat16(),
        },
    }
    path = write_checkpoint(tmp_path, 7, tensors, {"counters": {"tokens": 12}})
    assert path == tmp_path / "step-00000007"
    state = read_state(path)
    assert (state["step"], state["format_version"], state["counters"]) == (7, CHECKPOINT.version, {"tokens": 12})
    for name, named in tensors.items():
        back = read_tensors(path, name)
        assert back.keys() == named.keys()
        assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in named.items())


def test_nothing_is_pickled(tmp_path):
    path = write(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_the_last_and_the_best_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step)
    keep_checkpoints(tmp_path, last=2, best_step=5)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000015", "step-00000100"]
    keep_checkpoints(tmp_path, last=1, best_step=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000100"]


def test_copies_under_other_names_are_no_checkpoints_and_steps_are_numbers(tmp_path):
    for step in (5, 99_999_999, 100_000_000):
        write(tmp_path, step)
    shutil.copytree(tmp_path / "step-00000005", tmp_path / "step-00000005-backup")
    keep_checkpoints(tmp_path, last=2, best_step=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert (tmp_path / "step-00000005-backup").is_dir()


def test_unfinished_folders_are_no_checkpoints_and_are_cleared(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".writing-step-00000002").mkdir()
    (tmp_path / ".writing-step-00000002" / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_writing_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 1, value=1.0)
    path = write(tmp_path, 1, value=2.0)
    assert read_tensors(path, "model")["w"].tolist() == [2.0] * 3
    read_state(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def flip_last_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_changed_bit_is_found_and_the_intact_checkpoint_named(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    newest = write(tmp_path, 15)
    expected = json.loads((newest / "state.json").read_text())["sha256"]["model.safetensors"]
    flip_last_bit(tmp_path / "step-00000010" / "model.safetensors")
    flip_last_bit(newest / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        read_state(newest)
    text = str(error.value)
    assert f"checkpoint step-00000015 is damaged: {newest / 'model.safetensors'} has sha256 " in text
    assert f"expected {expected}" in text
    assert f"step-00000005 is intact: remove {newest} to continue from there" in text


def test_without_an_intact_earlier_one_the_error_says_so(tmp_path):
    path = write(tmp_path, 5)
    flip_last_bit(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="No earlier checkpoint is intact: remove .* to start again"):
        read_state(path)


def test_a_missing_file_is_found(tmp_path):
    path = write(tmp_path, 5)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000005 is damaged: .*model\.safetensors is missing"):
        read_state(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:20], r"state\.json cannot be read"),
        (lambda text: "{}", r"state\.json has no checksum"),
        (lambda text: text.replace('"step": 5', '"step": 6'), r"state\.json has sha256 .*, expected"),
    ],
)
def test_a_changed_state_is_found(tmp_path, damage, message):
    path = write(tmp_path, 5)
    file = path / "state.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(CheckpointError, match=f"checkpoint step-00000005 is damaged: .*{message}"):
        read_state(path)


def test_a_newer_format_version_is_refused_and_nothing_is_to_be_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("moestro.train.checkpoint.CHECKPOINT", replace(CHECKPOINT, steps={98: dict}))
        path = write(tmp_path, 5)
    with pytest.raises(VersionError, match="checkpoint of format version 99, written by a newer moestro") as error:
        read_state(path)
    assert "update moestro" in str(error.value) and "remove" not in str(error.value)


def test_tied_parameters_are_stored_once_and_stay_tied(tmp_path):
    model, other = tiny_model(seed=0, tie_embeddings=True), tiny_model(seed=1, tie_embeddings=True)
    tensors, tied = model_tensors(model)
    assert tied == {"head.weight": "embedding.weight"}
    assert "head.weight" not in tensors
    load_weights(other, write_checkpoint(tmp_path, 1, {"model": tensors}, {"tied": tied}))
    assert other.head.weight is other.embedding.weight
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(CheckpointError, match=r"the checkpoint ties \{'head\.weight'.*\}, this model ties nothing"):
        load_model(tiny_model(), tensors, tied)


def test_another_model_is_refused():
    tensors, tied = model_tensors(tiny_model(kinds=("moe", "peer")))
    with pytest.raises(CheckpointError, match=r"the checkpoint is of another model: blocks\.1\.ffn\..* and \d+ more"):
        load_model(tiny_model(kinds=("moe", "dense")), tensors, tied)


def test_optimizer_state_comes_back_under_names():
    model, other = tiny_model(), tiny_model()
    optimizer, resumed = build_optimizer(model, OptimSettings()), build_optimizer(other, OptimSettings(lr=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = optimizer_tensors(model, optimizer)
    assert {"head.weight/exp_avg", "head.weight/exp_avg_sq", "head.weight/step"} <= tensors.keys()
    load_optimizer(other, resumed, tensors)
    assert all(torch.equal(v, tensors[k]) for k, v in optimizer_tensors(other, resumed).items())
    assert {group["lr"] for group in resumed.param_groups} == {0.5}
    with pytest.raises(CheckpointError, match="has optimizer state of 'ghost', which is not trained here"):
        load_optimizer(other, resumed, {"ghost/step": torch.ones(())})


def test_nested_state_survives_json():
    state = {"counts": [torch.arange(3), {"deep": torch.ones(2)}], "step": 3, "name": "x", "none": None, "empty": {}}
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(split(state, "0", tensors)))
    assert tensors.keys() == {"0/counts/0", "0/counts/1/deep"}
    back = join(plain, tensors)
    assert torch.equal(back["counts"][0], torch.arange(3))
    assert torch.equal(back["counts"][1]["deep"], torch.ones(2))
    assert {k: v for k, v in back.items() if k != "counts"} == {"step": 3, "name": "x", "none": None, "empty": {}}
    with pytest.raises(TypeError, match="0: the key 3 of a rule's state is not a string"):
        split({3: 1}, "0", {})


def test_random_state_comes_back():
    device = torch.device("cpu")
    before = json.loads(json.dumps(random_state(device)))
    first = torch.rand(3)
    set_random_state(before, device)
    assert torch.equal(torch.rand(3), first)
