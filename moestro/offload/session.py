"""A model that is larger than its memory, opened to run: what goes where, and what it did."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.offload.blobs import Experts
from moestro.offload.cache import SlotCache
from moestro.offload.calibration import Calibration
from moestro.offload.codecs import Codec
from moestro.offload.counts import Counts
from moestro.offload.engine import Engine
from moestro.offload.files import OffloadError
from moestro.offload.hosts import Host, host_of
from moestro.offload.loader import Loader
from moestro.offload.memory import SlotMemory
from moestro.offload.policies import SINGLE, Policy, Records
from moestro.offload.replay import budget
from moestro.offload.rows import RowTables, least_size, total_size
from moestro.offload.scorer import Precision, Thresholds
from moestro.offload.sources import FileSource, HostSource, Source, Tiers
from moestro.offload.store import Store, open_store
from moestro.offload.threads import ThreadTransport
from moestro.offload.trace import Header, Recorder
from moestro.ops.machine_memory import free_machine_memory


@dataclass(frozen=True)
class Plan:
    """How a model runs.

    `memory`: bytes of fast memory for weights, those besides the experts included. `low`: the codec of LOW copies, None
    for none; `low_share`: their part of the slots. `depth` layers are looked ahead. `host`: all experts in host memory
    instead of files; `cooperative`: misses are computed there. `direct`: experts are read past the system's page cache;
    None: where it could not hold their files beside `memory`.
    """

    memory: int
    low: Codec | None = None
    low_share: float = 0.25
    thresholds: Thresholds = field(default=Thresholds())
    policy: Policy = field(default=SINGLE["lru"])
    depth: int = 0
    host: bool = False
    cooperative: bool = False
    renormalise: bool = False
    per_sequence: bool = True
    direct: bool | None = None

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"prefetch depth {self.depth}, allowed: 0 (none) or more")
        if not 0 <= self.low_share < 1:
            raise ValueError(f"share of memory for LOW copies {self.low_share}, allowed: 0 <= share < 1")
        if self.low is None and not self.thresholds.exact and self.thresholds.high < self.thresholds.low:
            raise ValueError(f"{self.thresholds} ask for LOW copies, and there are none: give their precision")
        if self.cooperative and not self.host:
            raise ValueError("cooperative: experts in files cannot be computed there; it needs them in host memory")


class Session:
    """A folder's model without its experts, and the engine that brings them. Close it, or use it as a context."""

    def __init__(
        self,
        folder: str | Path,
        plan: Plan,
        device: str | torch.device = "cpu",
        store: Path | None = None,
        calibration: Calibration | None = None,
        progress: Callable[[str], None] = lambda text: None,
        poison: bool = False,
    ) -> None:
        self.plan, self.device, self.host = plan, torch.device(device), host_of(folder)
        high = self.host.experts
        self._require_host_memory()
        self.model: Any = self.host.load(self.device)
        held = (*self.model.parameters(), *self.model.buffers())
        self.resident = sum(tensor.nbytes for tensor in held if not tensor.is_meta)
        gates = self.host.predictor(self.model, self.device) if plan.depth else None
        # the rows first: they take their share, what is left is for experts
        left = plan.memory - self.resident - (gates.size if gates else 0)
        self.rows = self._rows(left) if self.host.tables else None
        left -= self.rows.size if self.rows else 0
        scratch = self._scratch(left)
        # which may take long, so after everything that can be refused
        self.low = self._low(high, store, calibration, progress)
        self.tiers: Tiers = {Precision.HIGH: high, **({Precision.LOW: self.low.experts} if self.low else {})}
        self.header = header_of(self.host, high, self.low.experts if self.low else high)
        self.capacity = self._capacity(left - scratch)
        self.memory = SlotMemory(self.tiers, self._source(), self.capacity, self.device, poison)
        self.transport = ThreadTransport(1 if self.device.type == "cuda" else 2)
        records = Records(plan.per_sequence, self.header.ratio)
        cache = SlotCache(self.capacity, plan.policy, len(high), records)
        self.loader = Loader(cache, self.memory, self.transport, plan.depth, plan.cooperative)
        layers, compute, scored = self.host.layers, self.host.compute, plan.thresholds
        self.engine = Engine(
            layers, self.loader, self.memory, compute, scored, gates, plan.renormalise, self.host.standing
        )

    def _low(
        self, high: Experts, store: Path | None, calibration: Calibration | None, progress: Callable[[str], None]
    ) -> Store | None:
        if self.plan.low is None or not high:
            return None
        path = self.host.path
        folder = store or path.with_name(f"{path.name}.offload-{self.plan.low.name}")
        return open_store(folder, high, self.plan.low, calibration, progress)

    def _require_host_memory(self) -> None:
        needed, free = total(self.host.experts) + total_size(self.host.tables), free_machine_memory()
        if self.plan.host and free is not None and needed > free:
            raise OffloadError(
                f"{needed:,} bytes of experts are to be held in host memory, and {free:,} are free: leave them in files"
            )

    def _source(self) -> Source:
        if self.plan.host:
            return HostSource(self.tiers, self.device)
        return FileSource(self.tiers, self.device, self._direct)

    @property
    def _direct(self) -> bool:
        if self.plan.direct is not None:
            return self.plan.direct
        free, files = free_machine_memory(), sum(total(tier) for tier in self.tiers.values())
        slots = sum(self.capacity.values()) if self.device.type == "cpu" else 0
        return free is not None and files + slots > free

    def _rows(self, memory: int) -> RowTables:
        """The rows of tables, with their share of the memory by the sizes of tables and experts in files."""
        tables, experts = total_size(self.host.tables), total(self.host.experts)
        least = sum(least_size(bank, self.host.top_k) for bank in self.host.tables.values())
        if memory < least:
            raise OffloadError(
                f"{self.plan.memory:,} bytes do not do: {self.plan.memory - memory:,} for what is no expert and "
                f"{least:,} for the rows that a token meets are the least for {self.host.path}"
            )
        share = max(least, int(memory * tables / (tables + experts)))
        return RowTables(self.host.tables, share, self.host.top_k, self.device, self.plan.host)

    @property
    def _share(self) -> float:
        return self.plan.low_share if self.plan.low else 0.0

    def _scratch(self, memory: int) -> int:
        """Bytes of the slot that is scratch, of the memory that is left for experts.

        Raises: OffloadError where the rest of it would not hold the largest expert.
        """
        scratch = max((stored.blob.size for layer in self.host.experts for stored in layer), default=0)
        slots = math.ceil(scratch / (1 - self._share))
        if memory - scratch < slots:
            besides = self.plan.memory - memory
            raise OffloadError(
                f"{self.plan.memory:,} bytes do not do: {besides:,} for what is no expert, {scratch:,} to compute the "
                f"largest expert and {slots:,} for slots make {besides + scratch + slots:,} the least for "
                f"{self.host.path}"
            )
        return scratch

    def _capacity(self, memory: int) -> dict[Precision, int]:
        """Bytes of each pool, of the memory that is left for their slots."""
        if not self.host.experts:
            return dict.fromkeys((Precision.HIGH, Precision.LOW), 0)
        return budget(self.header, memory, self._share)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model computes."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.host.running(self.model, self.engine))
            if self.rows is not None:
                stack.enter_context(self.rows.running(self.model.decoder))
            yield

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Inside, every expert is asked for in HIGH, and no request is counted."""
        before = self.engine.thresholds, self.loader.counts
        self.engine.thresholds, self.loader.counts = Thresholds(), Counts()
        try:
            yield
        finally:
            self.engine.thresholds, self.loader.counts = before

    @contextmanager
    def recording(self, path: Path, depth: int = 3) -> Iterator[Recorder]:
        """Inside, routing is written to `path`, with predictions `depth` layers ahead where routers can be asked.

        Raises: OffloadError where there are rows alone, whose traces `offload.routing_traces` records.
        """
        if not self.host.experts:
            raise OffloadError(f"{self.host.path} has rows of tables alone: they are not traced while generating")
        if self.engine.predictor is None and self.host.predictable:
            self.engine.predictor = self.host.predictor(self.model, self.device)
        recorder = self.engine.recorder = Recorder(path, self.header)
        self.engine.recorded_depth = depth
        try:
            yield recorder
        finally:
            self.engine.recorder = None
            recorder.close()

    def calibrate(self, tokens: Tensor, window: int = 256) -> Calibration:
        """What this text [n] shows of every expert's inputs, computed exactly."""
        found = self.engine.watcher = self.host.calibration()
        try:
            with self.running(), self.exactly():
                for part in tokens.split(window):
                    self.engine.start_sequence()
                    self.model(part[None].to(self.device), use_cache=False, logits_to_keep=1)
        finally:
            self.engine.watcher = None
        return found

    @property
    def counts(self) -> Counts:
        """What was asked of experts and rows so far."""
        rows = self.rows.counts if self.rows else Counts()
        return self.loader.counts + (replace(rows, passes=0) if self.host.experts else rows)

    def figures(self) -> dict[str, Any]:
        """What was done, and the bytes of every tier."""
        counts, source = self.counts, self.memory.source
        tiers = {
            "resident_bytes": self.resident,
            "slots_bytes": {precision.name.lower(): size for precision, size in self.capacity.items()},
            "slots_peak_bytes": self.memory.peak,
            "rows_bytes": self.rows.size if self.rows else 0,
            "host_bytes": (source.size if isinstance(source, HostSource) else 0)
            + (self.rows.host_size if self.rows else 0),
            "experts_bytes": {precision.name.lower(): total(tier) for precision, tier in self.tiers.items()},
            "tables_bytes": total_size(self.host.tables),
        }
        if self.device.type == "cuda":
            tiers["device_peak_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return {"counts": counts.as_json(), "penalty": counts.penalty(self.header.ratio), "memory": tiers}

    def close(self) -> None:
        """End the threads and close the files."""
        self.transport.close()
        if self.rows is not None:
            self.rows.files.close()
        if isinstance(self.memory.source, FileSource):
            self.memory.source.files.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def total(tier: Experts) -> int:
    """Bytes of all experts of a tier."""
    return sum(stored.blob.size for layer in tier for stored in layer)


def header_of(host: Host, high: Experts, low: Experts) -> Header:
    """What a trace says of the experts."""
    sizes = [[[stored.blob.size for stored in layer] for layer in tier] for tier in (high, low)]
    return Header(host.path.name, sizes[0], sizes[1], host.top_k)
