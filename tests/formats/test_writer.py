"""Tensors into a file: what safetensors reads, and no second copy on the way."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from moestro.formats import writer
from moestro.formats.shards import DTYPES, FormatError, header
from moestro.formats.writer import Outgoing, computed, of_file, of_tensor, write_file, write_tensors
from moestro.ops.whole_files import sha256


def test_every_dtype_and_shape_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PIECE", 24)
    tensors = {str(dtype): torch.arange(21).remainder(2).view(7, 3).to(dtype) for dtype in DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "transposed": torch.randn(5, 3).T}
    tensors["part"] = torch.randn(10, 4)[3:8, :2]
    digest = write_tensors(tmp_path / "file", tensors)
    assert digest == sha256(tmp_path / "file")
    back = load_file(tmp_path / "file")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].double(), tensor.double()), name


def test_nothing_is_a_file_too(tmp_path):
    write_tensors(tmp_path / "file", {})
    assert load_file(tmp_path / "file") == {}


def test_a_dtype_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"w: torch\.complex64 cannot be stored; allowed: torch\.float64"):
        write_tensors(tmp_path / "file", {"w": torch.zeros(2, dtype=torch.complex64)})


def test_rows_and_ranges_of_other_files_are_copied_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "PIECE", 40)
    tensors = {"table": torch.randn(9, 3, 2), "other": torch.randn(4, dtype=torch.bfloat16), "n": torch.arange(5)}
    write_tensors(tmp_path / "source", tensors)
    entries, _ = header(tmp_path / "source")
    rows = (0, 1, 2, 5, 8)
    outgoing = [
        of_file("rows", tmp_path, entries["table"], rows),
        of_file("none", tmp_path, entries["n"], ()),
        *(of_file(name, tmp_path, entry) for name, entry in entries.items()),
        computed("made", torch.float32, (2, 2), lambda: torch.ones(2, 2)),
    ]
    digest = write_file(tmp_path / "file", outgoing, {"format": "pt"})
    assert digest == sha256(tmp_path / "file") and header(tmp_path / "file")[1] == {"format": "pt"}
    back = load_file(tmp_path / "file")
    assert torch.equal(back["rows"], tensors["table"][list(rows)]) and torch.equal(back["made"], torch.ones(2, 2))
    assert back["none"].shape == (0,) and all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_that_is_not_what_it_said_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"w is torch.float32 \(3,\), expected torch.float32 \(2,\)"):
        write_file(tmp_path / "file", [computed("w", torch.float32, (2,), lambda: torch.ones(3))])
    with pytest.raises(ValueError, match="w has 3 bytes, its header says 8"):
        write_file(tmp_path / "file", [Outgoing("w", "F32", (2,), 8, lambda: [b"abc"])])
    write_file(tmp_path / "source", [of_tensor("w", torch.ones(4))])
    outgoing = of_file("w", tmp_path, header(tmp_path / "source")[0]["w"])
    (tmp_path / "source").write_bytes(b"")
    with pytest.raises(ValueError, match="ends at byte .* it changed while it was read"):
        write_file(tmp_path / "file", [outgoing])
    with pytest.raises(FormatError, match="truncated"):
        header(tmp_path / "source")


PEAK = """
import resource, sys
from pathlib import Path
import torch
from moestro.experts import SingletonBank
from moestro.ops import singleton_experts
from moestro.train import OptimSettings
from moestro.train.checkpoint import read_state, read_tensors, write_checkpoint
from moestro.train.optim import build_optimizer
from moestro.train.tensors import load_model, load_optimizer, model_tensors, optimizer_tensors

torch.set_num_threads(1)
n, d = 2**18, 64
bank = SingletonBank(d, n, sparse_gradients=True)
optimizer = build_optimizer(bank, OptimSettings())
ids = torch.randint(n, (8, 4))
singleton_experts(torch.randn(8, d), ids, torch.rand(8, 4), bank.up, bank.down, "gelu", True).sum().backward()
optimizer.step()
for entries in optimizer.state.values():
    for tensor in entries.values():
        tensor.add_(0)  # makes its pages
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = peak()
tensors = {"model": model_tensors(bank)[0], "optimizer": optimizer_tensors(bank, optimizer)}
path = write_checkpoint(Path(sys.argv[1]), 1, tensors, {})
written = peak()
read_state(path)
load_model(bank, read_tensors(path, "model"), {})
load_optimizer(bank, optimizer, read_tensors(path, "optimizer"))
print(written - before, peak() - before)
"""


@pytest.mark.slow
def test_tables_are_written_and_read_without_a_second_copy(tmp_path):
    """MiB of peak memory for 128 of tables and 256 of moments. What is read is mapped: at most a file's own pages,
    which the system can take back, lie beside the tables."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True)
    written, read = (int(word) for word in done.stdout.split())
    assert written < 16, done.stderr
    assert read < 256 + 32


def test_zeros_take_room_on_the_disk_unless_holes_are_asked_for(tmp_path):
    """A first checkpoint, whose moments are 0, must not fit where the later ones will not."""
    tensors = {"moments": torch.zeros(2**20)}
    digest = write_tensors(tmp_path / "full", tensors)
    assert write_file(tmp_path / "holes", [of_tensor("moments", tensors["moments"])], sparse=True) == digest
    assert (tmp_path / "full").read_bytes() == (tmp_path / "holes").read_bytes()
    on_disk = {name: (tmp_path / name).stat().st_blocks * 512 for name in ("full", "holes")}
    assert on_disk["full"] >= 2**22 > on_disk["holes"]
