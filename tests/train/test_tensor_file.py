"""Tensors into a file: what safetensors reads, and no second copy on the way."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from moestro.train import tensor_file
from moestro.train.durable import sha256
from moestro.train.tensor_file import DTYPES, write_tensors


def test_every_dtype_and_shape_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", 24)
    tensors = {str(dtype): torch.arange(21).remainder(2).view(7, 3).to(dtype) for dtype in DTYPES}
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


PEAK = """
import resource, sys
from pathlib import Path
import torch
from moestro.train.tensor_file import write_tensors
table = torch.ones(2**26)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
write_tensors(Path(sys.argv[1]), {"table": table})
print(peak() - before)
"""


@pytest.mark.slow
def test_writing_takes_no_second_copy(tmp_path):
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / "file")], capture_output=True, text=True)
    assert (tmp_path / "file").stat().st_size > 2**28
    # kibibytes; the table has 2^18 of them
    assert int(done.stdout) < 2**15, done.stderr
