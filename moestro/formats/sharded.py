"""Which file holds each tensor of a folder that is written, and its index."""

from collections.abc import Mapping, Sequence
from typing import Any

from moestro.formats.shards import SINGLE
from moestro.formats.writer import Outgoing


def files_of(tensors: Sequence[Outgoing], shard_bytes: int) -> dict[str, list[Outgoing]]:
    """{file name: tensors}: in their order, as many to a file as fit into `shard_bytes`, one at least."""
    groups: list[list[Outgoing]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if groups[-1] and tensor.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(tensor)
        room -= tensor.nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}


def index_of(files: Mapping[str, Sequence[Outgoing]], metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The index of several files; `metadata` stays but for its sums, which are those of these files."""
    tensors = [tensor for all_ in files.values() for tensor in all_]
    sums = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    if metadata and "total_parameters" in metadata:
        sums["total_parameters"] = sum(tensor.n_elements for tensor in tensors)
    placed = {tensor.name: name for name, all_ in files.items() for tensor in all_}
    return {"metadata": {**(metadata or {}), **sums}, "weight_map": dict(sorted(placed.items()))}
