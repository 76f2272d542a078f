"""A checkpoint far larger than memory: applying a plan streams it. Its weights are holes in files."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SHARD = 5 * 10**9
D, WIDTH, E, LAYERS = 4096, 14336, 8, 16


def outlines():
    """Names and shapes of a Mixtral of 16 layers, bfloat16."""
    yield "model.embed_tokens.weight", (32000, D)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}.block_sparse_moe"
        yield f"{block}.gate.weight", (E, D)
        for expert in range(E):
            for part, shape in {"w1": (WIDTH, D), "w3": (WIDTH, D), "w2": (D, WIDTH)}.items():
                yield f"{block}.experts.{expert}.{part}.weight", shape
        for part in "qkvo":
            yield f"model.layers.{layer}.self_attn.{part}_proj.weight", (D if part in "qo" else D // 4, D)


def write_sparse(folder: Path) -> int:
    """The folder; returns its bytes. Only headers are written."""
    folder.mkdir()
    shards, size, total = [{}], 0, 0
    for name, (rows, columns) in outlines():
        nbytes = 2 * rows * columns
        if size + nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [size, size + nbytes]}
        size, total = size + nbytes, total + nbytes
    placed = {}
    for i, entries in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in entries.values()))
        placed |= dict.fromkeys(entries, file)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    known = {"num_hidden_layers": LAYERS, "num_local_experts": E, "num_experts_per_tok": 2, "hidden_size": D}
    (folder / "config.json").write_text(json.dumps({"model_type": "mixtral", "intermediate_size": WIDTH, **known}))
    return total


APPLY = """
import resource, shutil, sys
from pathlib import Path
from types import SimpleNamespace
from moestro.compress import LayerPlan, Plan, Group
from moestro.compress.applying import apply_plan
from moestro.compress.fingerprint import fingerprint
from moestro.formats import Checkpoint

folder = Path(sys.argv[1])
groups = (Group((0, 1), (0.5, 0.5)), *(Group((e,), (1.0,)) for e in range(2, 7)))
layers = [LayerPlan(layer, 8, (0, 2, 3, 4, 5, 6), groups if layer == 3 else None) for layer in range(16)]
plan = Plan("by hand", 0.25, fingerprint(Checkpoint(folder)), tuple(layers))
# zeros are written as holes: the disk need not have room for all that the files seem to hold
shutil.disk_usage = lambda path: SimpleNamespace(free=10**12)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
apply_plan(folder, plan, Path(sys.argv[2]))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


@pytest.mark.slow
def test_tens_of_gigabytes_stream_through_little_memory(tmp_path):
    """MiB of peak memory: dropping experts costs pieces of 16; one merged expert, its members in float64."""
    total = write_sparse(tmp_path / "src")
    assert total > 45e9
    paths = [str(tmp_path / name) for name in ("src", "dst")]
    done = subprocess.run([sys.executable, "-c", APPLY, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    one_expert = 3 * D * WIDTH * 8 / 2**20
    assert peak - before < 4 * one_expert
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    removed = LAYERS * 2 * (3 * D * WIDTH + D) * 2
    assert index["metadata"]["total_size"] == total - removed
    apparent = sum(path.stat().st_size for path in (tmp_path / "dst").glob("*.safetensors"))
    assert apparent > total - removed
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10 >= peak
