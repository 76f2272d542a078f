"""The bytes of one expert in one precision: its parts, their shapes and offsets, and where they lie in files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.offload.codecs import Codec, Grouped, Plain
from moestro.offload.packed import packed

# Every tensor begins at a multiple of this, as torch's own do.
ALIGNMENT = 64


@dataclass(frozen=True)
class Field:
    """One stored tensor of a part."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        """The tensor, in a blob's bytes."""
        return buffer[self.offset : self.offset + self.size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Part:
    """One tensor of the expert, under the name that the model gives it."""

    name: str
    shape: tuple[int, ...]
    codec: Codec
    fields: tuple[Field, ...]

    def of(self, buffer: Tensor) -> dict[str, Tensor]:
        """What is stored of it, in a blob's bytes."""
        return {field.name: field.of(buffer) for field in self.fields}

    def standing(self, buffer: Tensor, dtype: torch.dtype) -> Any:
        """The tensor, or what stands for it in products."""
        fields, decode = self.of(buffer), self.codec.decode
        if not isinstance(self.codec, Grouped):
            return decode(fields, self.shape, dtype)
        return packed(fields, self.codec.bits, lambda: decode(fields, self.shape, dtype))


@dataclass(frozen=True)
class Blob:
    """Layout of an expert's bytes; `dtype` is that of its numbers when they are computed with."""

    dtype: torch.dtype
    parts: tuple[Part, ...]
    size: int

    def read(self, buffer: Tensor) -> dict[str, Tensor]:
        """The expert's tensors out of its bytes [size]; views of them where they are kept as they are."""
        return {part.name: part.codec.decode(part.of(buffer), part.shape, self.dtype) for part in self.parts}

    def standing(self, buffer: Tensor) -> dict[str, Any]:
        """As `read`, but matrices that products need not decode stand as they are (`offload.packed`)."""
        return {part.name: part.standing(buffer, self.dtype) for part in self.parts}

    def write(
        self, buffer: Tensor, tensors: Mapping[str, Tensor], importance: Mapping[str, Tensor] | None = None
    ) -> None:
        """Encode an expert's tensors into its bytes [size]."""
        for part in self.parts:
            encoded = part.codec.encode(tensors[part.name], (importance or {}).get(part.name))
            for field in part.fields:
                field.of(buffer).copy_(encoded[field.name])


def laid_out(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, codec: Codec) -> Blob:
    """The layout of an expert with these tensors; vectors (biases) are kept as they are."""
    parts, offset = [], 0
    for name, shape in shapes.items():
        used = codec if len(shape) == 2 else Plain()
        fields = []
        for field, (kind, size) in used.fields(shape, dtype).items():
            fields.append(Field(field, kind, size, offset))
            offset += -(-fields[-1].size // ALIGNMENT) * ALIGNMENT
        parts.append(Part(name, shape, used, tuple(fields)))
    return Blob(dtype, tuple(parts), offset)


@dataclass(frozen=True)
class Extent:
    """`size` bytes of a file from `start`, which belong at offset `at` of a blob."""

    file: Path
    start: int
    size: int
    at: int

    def pieces(self, most: int) -> Iterator["Extent"]:
        """The extent in pieces of at most so many bytes."""
        for done in range(0, self.size, most):
            yield Extent(self.file, self.start + done, min(most, self.size - done), self.at + done)


@dataclass(frozen=True)
class Stored:
    """One expert as files keep it."""

    blob: Blob
    extents: tuple[Extent, ...]
    # of the extents' bytes, one after another; None where the files were not written here
    checksum: int | None = None


# [layer][expert]; layers are counted among those with experts
Experts = Sequence[Sequence[Stored]]
