"""Folders are read expert by expert, and what is wrong with one is said before anything is read."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moestro.formats import FAMILIES, Checkpoint, FormatError
from moestro.formats.complete import layers_of
from moestro.formats.shards import Shards
from tests.formats.folders import WIDTH, D, E, mixtral_config, mixtral_tensors, write_folder


@pytest.mark.parametrize("n_shards", [1, 3])
def test_reads_every_expert(tmp_path: Path, n_shards: int) -> None:
    tensors = mixtral_tensors()
    checkpoint = Checkpoint(write_folder(tmp_path, tensors, mixtral_config(), n_shards))
    assert set(checkpoint.names()) == set(tensors) and checkpoint.moe_layers == (0, 1)
    assert (checkpoint.n_experts(1), checkpoint.width(1), checkpoint.top_k) == (E, WIDTH, 2)
    stem = "model.layers.1.block_sparse_moe"
    expert = checkpoint.expert(1, 2)
    for part, name in {"gate": "w1", "up": "w3", "down": "w2"}.items():
        assert torch.equal(getattr(expert, part), tensors[f"{stem}.experts.2.{name}.weight"])
    assert torch.equal(checkpoint.router(1)["weight"], tensors[f"{stem}.gate.weight"])
    assert torch.equal(checkpoint.read_rows(f"{stem}.gate.weight", 1, 3), tensors[f"{stem}.gate.weight"][1:3])
    assert checkpoint.dtype(f"{stem}.gate.weight") == torch.float32


def test_reads_fused_and_transposed_experts(tmp_path: Path) -> None:
    gate, up, down = torch.randn(E, WIDTH, D), torch.randn(E, WIDTH, D), torch.randn(E, D, WIDTH)
    stem = "model.layers.0.block_sparse_moe"
    granite = {
        f"{stem}.router.layer.weight": torch.randn(E, D),
        f"{stem}.input_linear.weight": torch.cat([gate, up], dim=1),
        f"{stem}.output_linear.weight": down,
    }
    config = mixtral_config(model_type="granitemoe", num_hidden_layers=1)
    one = Checkpoint(write_folder(tmp_path / "granite", granite, config)).expert(0, 3)
    stem, biases = "model.layers.0.mlp", torch.randn(2, E, WIDTH)
    oss = {
        f"{stem}.router.weight": torch.randn(E, D),
        f"{stem}.router.bias": torch.randn(E),
        f"{stem}.experts.gate_up_proj": torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, 2).contiguous(),
        f"{stem}.experts.gate_up_proj_bias": torch.stack([biases[0], biases[1]], dim=2).flatten(1),
        f"{stem}.experts.down_proj": down.transpose(1, 2).contiguous(),
        f"{stem}.experts.down_proj_bias": torch.randn(E, D),
    }
    checkpoint = Checkpoint(write_folder(tmp_path / "oss", oss, {**config, "model_type": "gpt_oss"}))
    two = checkpoint.expert(0, 3)
    for found in (one, two):
        assert torch.equal(found.gate, gate[3]) and torch.equal(found.up, up[3]) and torch.equal(found.down, down[3])
    assert one.gate_bias is None and two.gate_bias is not None and two.up_bias is not None
    assert torch.equal(two.gate_bias, biases[0, 3]) and torch.equal(two.up_bias, biases[1, 3])
    assert set(checkpoint.router(0)) == {"weight", "bias"}


def test_layers_beyond_the_last_are_prediction_heads(tmp_path: Path) -> None:
    tensors = mixtral_tensors(layers=3)
    assert Checkpoint(write_folder(tmp_path, tensors, mixtral_config())).extra_layers == (2,)


def drop(name: str) -> Callable[[dict], dict]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def rename(old: str, new: str) -> Callable[[dict], dict]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


LAYER = "model.layers.1.block_sparse_moe"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (drop(f"{LAYER}.experts.2.w3.weight"), {}, "has no tensor .*experts.2.w3"),
        (rename("layers.1.block_sparse_moe.experts.3", "layers.1.block_sparse_moe.experts.7"), {}, "no tensor.*3"),
        (lambda t: t | {f"{LAYER}.experts.4.w1.weight": torch.zeros(WIDTH, D)}, {}, "experts.4.*knows 4 experts"),
        (lambda t: t | {f"{LAYER}.experts.1.w1.weight": torch.zeros(WIDTH + 1, D)}, {}, "differ in shape"),
        (dict, {"num_local_experts": 8}, "routes to 4 experts, config.json states 8"),
        (dict, {"num_hidden_layers": 3}, "no tensor model.layers.2"),
        (dict, {"num_hidden_layers": None}, "num_hidden_layers is None, expected a whole number"),
        (dict, {"model_type": "mixtrl"}, "model_type 'mixtrl', allowed: mixtral"),
        (dict, {"num_experts_by_layer": [4]}, "not a list of 2 numbers"),
    ],
)
def test_incomplete_experts_are_refused(tmp_path: Path, change: Callable, config: dict, message: str) -> None:
    checkpoint = Checkpoint(write_folder(tmp_path, change(mixtral_tensors()), mixtral_config(**config)))
    with pytest.raises(FormatError, match=message):
        _ = checkpoint.family


def truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])


def edit(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = json.loads((folder / name).read_text())
        change(found)
        (folder / name).write_text(json.dumps(found))

    return apply


INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or overwritten"),
        (lambda folder: (folder / SECOND).unlink(), f"no {SECOND}, which its index names"),
        (lambda folder: (folder / SECOND).write_bytes(b"abc"), "truncated or no safetensors"),
        (lambda folder: (folder / SECOND).write_bytes((9).to_bytes(8, "little") + b"{not json"), "not valid JSON"),
        (edit(INDEX, lambda index: index["weight_map"].pop("model.embed_tokens.weight")), "which .* does not list"),
        (edit(INDEX, lambda index: index["weight_map"].update(ghost=SECOND)), "ghost in .* does not hold it"),
        (edit(INDEX, lambda index: index["weight_map"].update(ghost="../x.safetensors")), "not a file name"),
        (edit(INDEX, lambda index: index.update(weight_map=3)), "must map tensor names"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = write_folder(tmp_path, mixtral_tensors(), mixtral_config(), 2)
    damage(folder)
    with pytest.raises(FormatError, match=message):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}, "entry for t is malformed"),
        ({"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}, "entry for t is malformed"),
        ({"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}, "entry for t is malformed"),
        ({"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}, "entry for t is malformed"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}, "entry for t is malformed"),
        ({"dtype": "F32", "shape": [4], "data_offsets": [0.0, 16.0]}, "entry for t is malformed"),
        ("[1]", "its header is a list, no object"),
        ('{"__metadata__": {"format": 1}}', "its __metadata__ is no object of words"),
        ("[" * 100_000, "header is not valid JSON"),
    ],
)
def test_headers_that_describe_no_tensor_are_refused(tmp_path: Path, entry: dict | str, message: str) -> None:
    text = entry if isinstance(entry, str) else json.dumps({"t": entry, "u": entry | {"data_offsets": [0, 16]}})
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(16))
    with pytest.raises(FormatError, match=message):
        Shards(tmp_path)


@pytest.mark.parametrize(
    ("family", "key"),
    [("deepseek_v2", "moe_layer_freq"), ("qwen2_moe", "decoder_sparse_step"), ("jamba", "expert_layer_period")],
)
def test_steps_of_0_are_refused(tmp_path: Path, family: str, key: str) -> None:
    config = {"num_hidden_layers": 2, "expert_layer_offset": 0, key: 0}
    with pytest.raises(FormatError, match="does not say which layers have experts"):
        layers_of(FAMILIES[family], config, tmp_path)


def test_pickles_are_named_and_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FormatError, match="pytorch_model.bin is a pickle"):
        Checkpoint(tmp_path)
    with pytest.raises(FormatError, match="is not a folder"):
        Checkpoint(tmp_path / "nowhere")


def test_what_is_read_follows_the_file(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    for seed in (0, 1):
        tensors = mixtral_tensors(seed=seed)
        read = Checkpoint(write_folder(tmp_path, tensors, mixtral_config())).read(name)
        assert torch.equal(read, tensors[name])


def test_templates_name_what_they_take() -> None:
    for family in FAMILIES.values():
        named = [family.router, family.bias or "", family.correction or "", family.shared or ""]
        assert all(set(re.findall(r"\{(\w+)\}", name)) <= {"layer"} for name in named)


def test_tensors_read_are_copies_that_outlive_their_file(tmp_path: Path) -> None:
    """Every dtype and shape as safetensors itself reads it; a file that is cut afterwards is an error, not a signal."""
    values = torch.arange(24).view(4, 3, 2)
    dtypes = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint16, torch.bool]
    tensors = {f"t{i}": values.to(torch.float32).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "row": torch.ones(1, 5)}
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    read = {name: shards.read(name) for name in tensors}
    path = tmp_path / "model.safetensors"
    for rows in (slice(1, 3), slice(0, 0), slice(3, 9), slice(2, 1)):
        for name in ("t0", "t1", "t4", "none"):
            assert torch.equal(shards.read(name, rows).float(), tensors[name][rows].float())
    os.truncate(path, path.stat().st_size // 2)
    for name, want in tensors.items():
        assert read[name].dtype == want.dtype and torch.equal(read[name].double(), want.double()), name
    with pytest.raises(FormatError, match=r"model.safetensors: cannot read t\d: it ends at byte"):
        for name in dict.fromkeys(shards):
            shards.read(name)
    path.unlink()
    with pytest.raises(FormatError, match="cannot read t0"):
        shards.read("t0")
