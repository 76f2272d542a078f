"""Distributed Checkpoint on safetensors files: each rank writes the pieces it holds, any rank reads any pieces.

A piece of a tensor is stored under `<name>@<where it begins>`, a whole tensor under its name: files of a single process
are read alike. Nothing is pickled.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from moestro.formats.shards import DTYPES
from moestro.formats.writer import write_tensors
from moestro.parallel.layout import Layout, Piece, layout_of, local

# Between the name of a file and that of a tensor, and between that and where a piece begins.
IN_FILE, BEGINS = ":", "@"


@dataclass(frozen=True)
class Held:
    """What a rank holds of a tensor: its own part, and where that lies."""

    own: Tensor
    layout: Layout

    @classmethod
    def copied(cls, tensor: Tensor) -> "Held":
        """A copy on the CPU of what this rank holds, so that training may go on while it is written."""
        return cls(local(tensor).detach().to("cpu", copy=True), layout_of(tensor))

    def piece(self, index: MetadataIndex) -> Tensor:
        """The own part of the piece that begins at `index.offset`."""
        found = next(piece for piece in self.layout.pieces if piece.whole == tuple(index.offset or ()))
        return self.own[found.in_own]


def chunk(piece: Piece) -> ChunkStorageMetadata:
    """A piece in the checkpoint's words."""
    return ChunkStorageMetadata(torch.Size(piece.whole), torch.Size(piece.size))


class SavePieces(DefaultSavePlanner):
    """Plans the writing of `Held`; pieces that several ranks hold are written once."""

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for name, held in self.state_dict.items() for item in write_items(name, held)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece(index)


def write_items(name: str, held: Held) -> Iterator[WriteItem]:
    """One for every piece."""
    properties = TensorProperties(dtype=held.own.dtype)
    for piece in held.layout.pieces:
        data = TensorWriteData(chunk(piece), properties, torch.Size(held.layout.shape))
        yield WriteItem(MetadataIndex(name, torch.Size(piece.whole)), WriteItemType.SHARD, tensor_data=data)


class LoadPieces(DefaultLoadPlanner):
    """Plans the reading of `Held`: its own part is filled."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        metadata: Any = self.metadata
        stored = metadata.state_dict_metadata
        items = [
            item
            for name, held in self.state_dict.items()
            for item in create_read_items_for_chunk_list(name, stored[name], [chunk(p) for p in held.layout.pieces])
        ]
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece(index)


class Writer(StorageWriter):
    """Writes `<file>-<rank>.safetensors` into a folder that the main rank makes; there, `hashes` then has the SHA-256
    of every rank's files."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.hashes: dict[str, str] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        self.hashes = {}

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.folder.mkdir(parents=True)  # before others write: they wait for the plan

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        files: dict[str, dict[str, Tensor]] = {}
        items: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            file, _, name = item.index.fqn.partition(IN_FILE)
            own: Any = planner.resolve_data(item)
            whole = item.tensor_data is not None and item.tensor_data.chunk.sizes == item.tensor_data.size
            begins = "" if whole else BEGINS + ",".join(map(str, item.index.offset or ()))
            files.setdefault(file, {})[name + begins] = own.contiguous()
            items.setdefault(file, []).append(item)
        results: list[WriteResult] = []
        for file, tensors in files.items():
            name = f"{file}-{self.rank:05d}.safetensors"
            wrote = name, write_tensors(self.folder / name, tensors)
            results += [WriteResult(item.index, 0, wrote) for item in items[file]]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.hashes = dict(result.storage_data for of_rank in results for result in of_rank)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads the files `<file>.safetensors` or `<file>-<rank>.safetensors` of a folder."""

    def __init__(self, folder: Path, file: str) -> None:
        self.files = stored_files(folder, file)

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        where: dict[MetadataIndex, tuple[Path, str]] = {}
        for path in self.files:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    name, size, piece, dtype = stored_piece(file, key)
                    entry = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [])
                    described.setdefault(name, entry).chunks.append(piece)
                    described[name].size = torch.Size(map(max, described[name].size, size))
                    where[MetadataIndex(name, piece.offsets)] = path, key
        return Metadata(described, storage_data=where)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.where: Any = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        opened: dict[Path, Any] = {}
        for item in plan.items:
            path, key = self.where[item.storage_index]
            if path not in opened:
                opened[path] = safe_open(path, "pt").__enter__()
            place = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            part = opened[path].get_slice(key)[place] if place else opened[path].get_tensor(key)
            planner.resolve_tensor(item).copy_(part)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def stored_piece(file: Any, key: str) -> tuple[str, torch.Size, ChunkStorageMetadata, torch.dtype]:
    """What lies under a key: the tensor's name, how large it is at least, which piece this is, its dtype."""
    name, _, begins = key.partition(BEGINS)
    part = file.get_slice(key)
    shape = part.get_shape()
    start = [int(n) for n in begins.split(",")] if begins else [0] * len(shape)
    size = torch.Size(o + n for o, n in zip(start, shape, strict=True))
    return name, size, ChunkStorageMetadata(torch.Size(start), torch.Size(shape)), DTYPES[part.get_dtype()]


def stored_files(folder: Path, file: str) -> list[Path]:
    """The files in which the tensors of `file` lie: one, or one of each rank."""
    single = folder / f"{file}.safetensors"
    return [single] if single.exists() else sorted(folder.glob(f"{file}-*.safetensors"))


def save_pieces(folder: Path, files: Mapping[str, Mapping[str, Held]], rank: int, group: Any) -> dict[str, str]:
    """Write what all ranks hold; returns {file: SHA-256}, on the main rank alone. Every rank of `group`, which must be
    on the CPU, calls it with the same names; the main rank returns when all files are complete.

    Raises: OSError where a rank's disk refuses, RuntimeError where a rank was lost; on every rank.
    """
    flat = {f"{file}{IN_FILE}{name}": held for file, tensors in files.items() for name, held in tensors.items()}
    writer, planner = Writer(folder, rank), SavePieces(flatten_state_dict=False)
    try:
        save(flat, storage_writer=writer, planner=planner, process_group=group)  # type: ignore[arg-type]
    except CheckpointException as error:
        failed, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, OSError):
            raise OSError(f"rank {failed}: {cause}") from error
        raise RuntimeError(f"rank {failed} could not write its part of a checkpoint: {cause}") from error
    return writer.hashes


def stored_shapes(folder: Path, file: str) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Whole shape and dtype of every tensor of a file."""
    described: dict[str, Any] = Reader(folder, file).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in described.items()}


def read_pieces(folder: Path, file: str, wanted: Mapping[str, tuple[Layout, tuple[int, ...], torch.dtype]]) -> Any:
    """{name: this rank's part} of the tensors that `wanted` names, each with its layout, own shape and dtype, however
    many ranks wrote them. Waits for no other rank."""
    held = {name: Held(torch.zeros(shape, dtype=dtype), layout) for name, (layout, shape, dtype) in wanted.items()}
    reader, planner = Reader(folder, file), LoadPieces(flatten_state_dict=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
        load(held, storage_reader=reader, planner=planner, no_dist=True)  # type: ignore[arg-type]
    return {name: entry.own for name, entry in held.items()}
