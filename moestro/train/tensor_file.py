"""Named tensors into a safetensors file, piece by piece: no second copy of them is ever in memory."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

# The format's names (huggingface/safetensors) of the dtypes that models and optimizers keep.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# Bytes that are copied to the CPU, hashed and written at a time.
PIECE = 2**24


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write `tensors`, wherever they lie, into one safetensors file; returns its SHA-256 (hexadecimal).

    Raises: ValueError for a dtype that `DTYPES` does not name; OSError where the system refuses.
    """
    # widest first: every tensor then begins at a multiple of its dtype's size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digest = hashlib.sha256()
    with path.open("wb") as file:
        everything = (piece for name in order for piece in pieces(tensors[name]))
        for piece in chain([header({name: tensors[name] for name in order})], everything):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """Length and JSON of dtype, shape and place of every tensor, in the order in which they follow."""
    entries, start = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: {tensor.dtype} cannot be stored; allowed: {', '.join(map(str, DTYPES))}")
        stop = start + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, `PIECE` of them at a time."""
    flat = tensor.detach().reshape(-1)
    size = PIECE // tensor.element_size()
    for start in range(0, len(flat), size):
        part = flat[start : start + size].cpu().contiguous()
        yield part.view(torch.uint8).numpy().data
