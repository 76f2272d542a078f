"""The tensors of a folder: which file holds each, its shape and dtype, read one at a time."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class FormatError(ValueError):
    """A folder is not what its format says; the message names the file, the tensor or the key."""


@dataclass(frozen=True)
class Entry:
    """One tensor as its file's header describes it; `start` and `stop` are bytes from the beginning of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises: FormatError where the file is missing, no JSON, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path.parent} has no {path.name}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a {type(found).__name__}, expected an object")
    return found


def header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of one safetensors file.

    Raises: FormatError where the file is missing, truncated, longer than its header says, or no safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise FormatError(f"{path} is truncated or no safetensors file: {size} bytes, header of {length}")
            fields = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise FormatError(f"{path.parent} has no {path.name}, which its index names") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is no safetensors file: its header is not valid JSON") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{path} is no safetensors file: its header is a {type(fields).__name__}, no object")
    metadata, base = fields.pop("__metadata__", None) or {}, 8 + length
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path} is no safetensors file: its __metadata__ is no object of words: {metadata!r}")
    entries = {name: _entry(path, name, field, base) for name, field in fields.items()}
    end = max((entry.stop for entry in entries.values()), default=base)
    if end != size:
        raise FormatError(f"{path} has {size} bytes, its header describes {end}: truncated or overwritten")
    return entries, metadata


def _entry(path: Path, name: str, field: Any, base: int) -> Entry:
    try:
        (start, stop), dtype, shape = field["data_offsets"], field["dtype"], tuple(field["shape"])
        sizes = (start, stop - start, *shape)
        known = isinstance(dtype, str) and all(type(size) is int and size >= 0 for size in sizes)
        if known and (dtype not in DTYPES or stop - start == math.prod(shape) * DTYPES[dtype].itemsize):
            return Entry(name, path.name, dtype, shape, base + start, base + stop)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: the header's entry for {name} is malformed: {field!r}") from error
    raise FormatError(f"{path}: the header's entry for {name} is malformed: {field!r}")


def is_file_name(name: str) -> bool:
    """Whether what a folder says of a file of its own names one: no path, nothing above."""
    return name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


class Shards(Mapping[str, Entry]):
    """Tensor name -> entry, over one file or an index of several.

    Raises: FormatError on opening where a shard is missing or truncated, where index and shards disagree on a tensor,
    or where two shards hold tensors of one name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
        self.files = self._files()
        self.metadata: dict[str, dict[str, str]] = {}
        self._entries: dict[str, Entry] = {}
        for file in self.files:
            entries, self.metadata[file] = header(folder / file)
            if twice := sorted(entries.keys() & self._entries.keys()):
                raise FormatError(f"{folder}: {twice[0]} is in {self._entries[twice[0]].file} and in {file}")
            self._entries |= entries
        if self.index is not None:
            self._check_index(self.index["weight_map"])

    def _files(self) -> tuple[str, ...]:
        if self.index is None:
            if not (self.folder / SINGLE).is_file():
                others = sorted(path.name for pattern in ("*.bin", "*.pth") for path in self.folder.glob(pattern))
                hint = f"; {others[0]} is a pickle, which is never loaded: convert it to safetensors" if others else ""
                raise FormatError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")
            return (SINGLE,)
        weights = self.index.get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
            raise FormatError(f"{self.folder / INDEX}: weight_map must map tensor names to file names")
        files = tuple(sorted(set(weights.values())))
        if outside := [file for file in files if not is_file_name(file)]:
            raise FormatError(f"{self.folder / INDEX}: {outside[0]!r} is not a file name inside the folder")
        return files

    def _check_index(self, weights: Mapping[str, str]) -> None:
        for name in sorted(weights.keys() ^ self._entries.keys()):
            if name in weights:
                raise FormatError(f"{self.folder}: {INDEX} places {name} in {weights[name]}, which does not hold it")
            raise FormatError(f"{self.folder}: {self._entries[name].file} holds {name}, which {INDEX} does not list")
        for name, entry in self._entries.items():
            if weights[name] != entry.file:
                raise FormatError(f"{self.folder}: {name} is in {entry.file}; {INDEX} places it in {weights[name]}")

    def __getitem__(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError as error:
            raise FormatError(f"{self.folder} has no tensor {name}") from error

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def matrix(self, name: str) -> str:
        """Under what name a matrix is stored: its own, or that of its packed numbers (compressed-tensors), which have
        as many rows."""
        packed = f"{name}_packed"
        return packed if name not in self and packed in self else name

    def dtype(self, name: str) -> torch.dtype:
        """Raises: FormatError for a dtype that torch does not have."""
        stored = self[name].dtype
        if stored not in DTYPES:
            raise FormatError(
                f"{self.folder / self[name].file}: {name} has dtype {stored}, allowed: {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or `rows` of its first dimension (of step 1), in memory of its own: no view of a memory map, which
        would end the process where the file is cut.

        Raises: FormatError where the file cannot be read or has become shorter.
        """
        entry, shape, start, stop = self[name], self[name].shape, self[name].start, self[name].stop
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            shape, row = (max(0, last - first), *shape[1:]), (stop - start) // max(1, shape[0])
            start, stop = start + first * row, start + max(first, last) * row
        values = torch.empty(stop - start, dtype=torch.uint8)
        _fill(values, self.folder / entry.file, start, name)
        return values.view(self.dtype(name)).view(shape)


def _fill(values: Tensor, path: Path, start: int, name: str) -> None:
    view, done = values.numpy().data, 0
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while done < len(view):
                read = file.readinto(view[done:])
                if not read:
                    raise FormatError(
                        f"{path}: cannot read {name}: it ends at byte {start + done}, cut since it opened"
                    )
                done += read
    except OSError as error:
        raise FormatError(f"{path}: cannot read {name}: {error}") from error
