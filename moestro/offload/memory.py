"""The fast tier: slots of bytes for copies of experts."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moestro.offload.policies import Key
from moestro.offload.scorer import Precision
from moestro.offload.sources import Source, Tiers
from moestro.offload.transport import Job

Copy = tuple[Key, Precision]


class SlotMemory:
    """Bytes of the cached copies on a device, and one slot besides for what finds no room (`scratch`).

    Buffers of evicted copies are used again by the next ones of their size, and freed where they would carry a pool
    beyond its capacity. On a GPU a copy starts after the last computation on its buffer, and a computation after the
    copy, by events of streams. `poison`: buffers are filled with NaN before a copy starts, so that a test sees whoever
    computes too early.
    """

    def __init__(
        self,
        tiers: Tiers,
        source: Source,
        capacity: Mapping[Precision, int],
        device: torch.device,
        poison: bool = False,
    ) -> None:
        self.tiers, self.source, self.capacity, self.device, self.poison = tiers, source, capacity, device, poison
        self._buffers: dict[Copy, Tensor] = {}
        self._free: dict[Precision, list[Tensor]] = {precision: [] for precision in Precision}
        self._scratch: Tensor | None = None
        self._arrivals: dict[int, torch.cuda.Event] = {}
        self._held = dict.fromkeys(Precision, 0)
        self.peak = 0

    def size(self, key: Key, precision: Precision) -> int:
        """Bytes of a copy."""
        return self.tiers[precision][key[0]][key[1]].blob.size

    def take(self, key: Key, precision: Precision, scratch: bool = False) -> Job:
        """Give a copy its buffer; the job fills it."""
        size = self.size(key, precision)
        buffer = self._scratch_of(size) if scratch else self._buffer(precision, size)
        if not scratch:
            self._buffers[key, precision] = buffer
        if self.poison:
            buffer.view(torch.uint8).fill_(0xFF)
        ordered = self.source.ordered(key, precision)
        return Job(key, precision, size, self._blocks(key, precision, buffer), ordered)

    def _blocks(self, key: Key, precision: Precision, buffer: Tensor) -> list[Callable[[], object]]:
        blocks = self.source.blocks(key, precision, buffer)
        if self.device.type != "cuda":
            return blocks
        stream, read, arrived = self.source._copies.stream, torch.cuda.Event(), torch.cuda.Event()  # type: ignore
        read.record(torch.cuda.current_stream(self.device))
        self._arrivals[buffer.data_ptr()] = arrived
        return [lambda: stream.wait_event(read), *blocks, lambda: arrived.record(stream)]

    def _buffer(self, precision: Precision, size: int) -> Tensor:
        free = self._free[precision]
        for index, buffer in enumerate(free):
            if len(buffer) == size:
                return free.pop(index)
        while free and self._held[precision] + size > self.capacity[precision]:
            self._held[precision] -= len(free[-1])
            self._let_go(free.pop())
        self._held[precision] += size
        buffer = self._new(size)
        self._note()
        return buffer

    def _new(self, size: int) -> Tensor:
        # threads that fill it are in no inference mode, whoever asks for it is
        with torch.inference_mode(False):
            return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _scratch_of(self, size: int) -> Tensor:
        if self._scratch is None or len(self._scratch) < size:
            if self._scratch is not None:
                self._let_go(self._scratch)
            self._scratch = self._new(size)
            self._note()
        return self._scratch[:size]

    def _let_go(self, buffer: Tensor) -> None:
        """Before memory is freed: not while a copy to it that was given up may still run."""
        self._arrivals.pop(buffer.data_ptr(), None)
        if self.device.type == "cuda":
            buffer.record_stream(self.source._copies.stream)  # type: ignore

    def _note(self) -> None:
        scratch = 0 if self._scratch is None else len(self._scratch)
        self.peak = max(self.peak, sum(self._held.values()) + scratch)

    def release(self, key: Key, precision: Precision) -> None:
        """The copy is not needed any more."""
        self._free[precision].append(self._buffers.pop((key, precision)))

    def tensors(
        self, key: Key, precision: Precision, scratch: bool = False, standing: bool = False
    ) -> dict[str, Tensor]:
        """An expert's tensors out of its slot, once its job is done; `standing`: matrices in few bits as they are."""
        if scratch and self._scratch is None:
            raise ValueError("nothing lies in the scratch slot")
        buffer = self._scratch if scratch and self._scratch is not None else self._buffers[key, precision]
        if buffer.data_ptr() in self._arrivals:
            torch.cuda.current_stream(self.device).wait_event(self._arrivals[buffer.data_ptr()])
        blob = self.tiers[precision][key[0]][key[1]].blob
        return blob.standing(buffer) if standing else blob.read(buffer)

    def lying(self, key: Key, precision: Precision, standing: bool = False) -> dict[str, Tensor]:
        """An expert's tensors where they lie in host memory, as `tensors` gives them.

        Raises: ValueError where they lie in files.
        """
        buffer = self.source.lying(key, precision)
        if buffer is None:
            raise ValueError("experts that lie in files cannot be computed there: hold them in host memory")
        blob = self.tiers[precision][key[0]][key[1]].blob
        return blob.standing(buffer) if standing else blob.read(buffer)
