"""The slow tier: experts in files, or all of them in host memory."""

import zlib
from collections.abc import Callable, Mapping
from threading import local
from typing import Protocol

import torch
from torch import Tensor

from moestro.offload.blobs import Experts, Extent, Stored
from moestro.offload.files import Files, OffloadError
from moestro.offload.policies import Key
from moestro.offload.scorer import Precision

# Bytes that are copied before something more urgent may go first.
BLOCK = 4 << 20
Tiers = Mapping[Precision, Experts]


class Source(Protocol):
    """Where copies come from."""

    def blocks(self, key: Key, precision: Precision, into: Tensor) -> list[Callable[[], object]]:
        """Steps that fill an expert's bytes; one after another where they are `ordered`, which is asked for first."""
        ...

    def ordered(self, key: Key, precision: Precision) -> bool: ...

    def lying(self, key: Key, precision: Precision) -> Tensor | None:
        """The bytes of an expert where they lie, None where that is no memory."""
        ...


class FileSource:
    """Experts in files, read block by block, past the system's page cache where `direct`; blobs written here are
    checked when they are first read."""

    def __init__(self, tiers: Tiers, device: torch.device, direct: bool = False) -> None:
        self.tiers, self.files = tiers, Files(direct)
        self._checked: set[tuple[Key, Precision]] = set()
        self._copies = DeviceCopies(device) if device.type == "cuda" else None
        for path in {e.file for tier in tiers.values() for layer in tier for stored in layer for e in stored.extents}:
            self.files.open(path)

    def ordered(self, key: Key, precision: Precision) -> bool:
        """Where a checksum is still to be taken, or copies to a GPU follow one another."""
        return self._copies is not None or self._unchecked(key, precision)

    def _unchecked(self, key: Key, precision: Precision) -> bool:
        written_here = self.tiers[precision][key[0]][key[1]].checksum is not None
        return written_here and (key, precision) not in self._checked

    def blocks(self, key: Key, precision: Precision, into: Tensor) -> list[Callable[[], object]]:
        stored = self.tiers[precision][key[0]][key[1]]
        check = Check(stored, key) if self._unchecked(key, precision) else None
        pieces = [piece for extent in stored.extents for piece in extent.pieces(BLOCK)]
        steps: list[Callable[[], object]] = [lambda piece=piece: self._piece(piece, into, check) for piece in pieces]
        if check is not None:
            steps.append(lambda: self._verified(key, precision, check))
        return steps

    def _piece(self, piece: Extent, into: Tensor, check: "Check | None") -> None:
        target = into[piece.at : piece.at + piece.size]
        read = target if self._copies is None else self._copies.staging()[: piece.size]
        self.files.read(piece, read)
        if check is not None:
            check.add(read)
        if self._copies is not None:
            self._copies.copy(read, target)

    def _verified(self, key: Key, precision: Precision, check: "Check") -> None:
        check.verify()
        self._checked.add((key, precision))

    def lying(self, key: Key, precision: Precision) -> Tensor | None:
        return None


class Check:
    """Checksum of a blob as its pieces come."""

    def __init__(self, stored: Stored, key: Key) -> None:
        self.stored, self.key, self.found = stored, key, 0

    def add(self, piece: Tensor) -> None:
        """The next bytes."""
        self.found = zlib.crc32(piece.numpy().data, self.found)

    def verify(self) -> None:
        """Raises: OffloadError where the bytes are not those that were written."""
        if self.found != self.stored.checksum:
            file = self.stored.extents[0].file
            raise OffloadError(
                f"{file}: the bytes of expert {self.key} are damaged; delete the store to have it rebuilt"
            )


class HostSource:
    """Experts in host memory, all read at once; pinned where they are to go to a GPU."""

    def __init__(self, tiers: Tiers, device: torch.device) -> None:
        files = FileSource(tiers, torch.device("cpu"))
        self._copies = DeviceCopies(device) if device.type == "cuda" else None
        self._held: dict[tuple[Key, Precision], Tensor] = {}
        for precision, tier in tiers.items():
            for layer, experts in enumerate(tier):
                for expert, stored in enumerate(experts):
                    buffer = torch.empty(stored.blob.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
                    for block in files.blocks((layer, expert), precision, buffer):
                        block()
                    self._held[(layer, expert), precision] = buffer
        files.files.close()

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._held.values())

    def ordered(self, key: Key, precision: Precision) -> bool:
        return self._copies is not None

    def blocks(self, key: Key, precision: Precision, into: Tensor) -> list[Callable[[], object]]:
        held = self._held[key, precision]
        pairs = zip(held.split(BLOCK), into.split(BLOCK), strict=True)
        if self._copies is not None:
            copies = self._copies
            return [lambda source=source, target=target: copies.copy(source, target) for source, target in pairs]
        return [lambda source=source, target=target: target.copy_(source) for source, target in pairs]

    def lying(self, key: Key, precision: Precision) -> Tensor | None:
        return self._held[key, precision]


class DeviceCopies:
    """Copies to a GPU on a stream of their own, through two pinned buffers a thread."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self._own = device, torch.cuda.Stream(device), local()

    def staging(self) -> Tensor:
        """A pinned buffer that no copy reads any more."""
        if not hasattr(self._own, "buffers"):
            self._own.buffers = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._own.events = [torch.cuda.Event() for _ in range(2)]
            self._own.turn = 0
        self._own.turn = 1 - self._own.turn
        self._own.events[self._own.turn].synchronize()
        return self._own.buffers[self._own.turn]

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Start copying pinned bytes to the GPU, after what the target's last reader does there."""
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            if hasattr(self._own, "events"):
                self._own.events[self._own.turn].record(self.stream)
