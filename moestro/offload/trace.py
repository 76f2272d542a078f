"""Recorded routing of a model: a JSONL file that replays through other caches without the model."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from moestro.upgrades import TRACE

FORMAT = "moestro-offload-trace"


class TraceError(ValueError):
    """A file that is no trace, or a damaged one."""


@dataclass(frozen=True)
class Header:
    """What the experts were: bytes of each, `high[layer][expert]` and `low[layer][expert]`."""

    model: str
    high: list[list[int]]
    low: list[list[int]]
    top_k: int

    @property
    def n_layers(self) -> int:
        """Layers with experts."""
        return len(self.high)

    @property
    def ratio(self) -> float:
        """Mean bytes of a LOW copy over those of a HIGH one."""
        return sum(map(sum, self.low)) / max(1, sum(map(sum, self.high)))


@dataclass(frozen=True)
class Step:
    """One layer of one pass: ids and weights [t, k]; `ahead`: the same as predicted here for the layers after it."""

    sequence: int
    layer: int
    ids: Tensor
    weights: Tensor
    ahead: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True)
class Trace:
    """A recording; `complete` is False where its end is missing (the last line that is whole is the last step)."""

    header: Header
    steps: list[Step] = field(repr=False)
    complete: bool = True

    def sequences(self) -> Iterator[list[Step]]:
        """The steps of one sequence after another."""
        part: list[Step] = []
        for step in self.steps:
            if part and step.sequence != part[-1].sequence:
                yield part
                part = []
            part.append(step)
        if part:
            yield part


class Recorder:
    """Writes a trace, a line a step. When the disk is full (or gone) recording stops at the last whole line and `error`
    says why; generation goes on. `close` ends the file, or says it is incomplete."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.error, self.n_steps = path, None, 0
        self._sequence, self._end = 0, 0
        self._file: IO[bytes] | None = path.open("wb")
        self._write({"format": FORMAT, TRACE.key: TRACE.version, **asdict(header)})

    error: OSError | None

    def start_sequence(self) -> None:
        """The next steps belong to another sequence."""
        self._sequence += self.n_steps > 0

    def step(self, layer: int, ids: Tensor, weights: Tensor, ahead: Sequence[tuple[Tensor, Tensor]] = ()) -> None:
        """Record a layer of a pass."""
        line: dict[str, Any] = {"s": self._sequence, "l": layer, "i": ids.tolist(), "w": _rounded(weights)}
        if ahead:
            line["a"] = [[i.tolist(), _rounded(w)] for i, w in ahead]
        self._write(line)
        self.n_steps += 1

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is None:
            return
        text = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self._stop(error)
        else:
            self._end += len(text)

    def _stop(self, error: OSError) -> None:
        """Leave the file at its last whole line."""
        self.error, self._file = error, None
        try:
            os.truncate(self.path, self._end)
        except OSError as again:
            error.add_note(f"{self.path} could not be cut to its last whole line: {again}")

    def close(self) -> None:
        """End the file; an incomplete one lacks its last line."""
        self._write({"end": self.n_steps})
        if self._file is not None:
            self._file.close()
            self._file = None


def _rounded(weights: Tensor) -> list[list[float]]:
    return [[float(f"{w:.8g}") for w in row] for row in weights.double().tolist()]


def read_trace(path: Path) -> Trace:
    """A recorded trace; where its last line is missing or cut, what is whole of it, marked incomplete.

    Raises: TraceError for a file of another kind, or damaged before its last line, with the line's number.
    """
    lines = path.read_bytes().split(b"\n")
    cut = lines.pop() != b""
    if not lines:
        raise TraceError(f"{path}: not a trace (no line that is whole)")
    header, steps, ended = _header(path, lines[0]), [], False
    for number, line in enumerate(lines[1:], 2):
        if ended:
            raise TraceError(f"{path}, line {number}: the trace ended before")
        parsed = _parsed(path, number, line)
        if "end" in parsed:
            if parsed["end"] != len(steps):
                raise TraceError(f"{path}: {len(steps)} steps, its last line says {parsed['end']}")
            ended = True
        else:
            steps.append(_step(path, number, parsed, header))
    return Trace(header, steps, ended and not cut)


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        raise TraceError(f"{path}, line {number}: not JSON: {line[:40]!r}") from None
    if not isinstance(parsed, dict):
        raise TraceError(f"{path}, line {number}: not a JSON object: {line[:40]!r}")
    return parsed


def _header(path: Path, line: bytes) -> Header:
    parsed = _parsed(path, 1, line)
    if parsed.pop("format", None) != FORMAT:
        raise TraceError(f"{path}: not a trace of format {FORMAT!r}")
    parsed = TRACE.upgraded(parsed, path)
    del parsed[TRACE.key]
    try:
        header = Header(**parsed)
        sizes = [size for layers in (header.high, header.low) for layer in layers for size in layer]
        same = [len(layer) for layer in header.high] == [len(layer) for layer in header.low]
    except TypeError as error:
        raise TraceError(f"{path}, line 1: {error}") from None
    numbers = all(type(size) is int and size >= 0 for size in sizes)
    if not same or not numbers or not any(map(any, header.high)):
        raise TraceError(f"{path}, line 1: sizes of experts are missing, all 0, no whole numbers, or differ in number")
    return header


def _step(path: Path, number: int, parsed: dict[str, Any], header: Header) -> Step:
    try:
        ahead = tuple(_chosen(i, w) for i, w in parsed.get("a", ()))
        step = Step(int(parsed["s"]), int(parsed["l"]), *_chosen(parsed["i"], parsed["w"]), ahead)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path}, line {number}: {type(error).__name__}: {error}") from None
    if not 0 <= step.layer < header.n_layers:
        raise TraceError(f"{path}, line {number}: layer {step.layer}, the trace has {header.n_layers}")
    for ahead_by, (ids, weights) in enumerate([(step.ids, step.weights), *step.ahead]):
        n_experts = len(header.high[min(step.layer + ahead_by, header.n_layers - 1)])
        if (
            ids.shape != weights.shape
            or ids.dim() != 2
            or len(ids) != len(step.ids)
            or (ids.numel() and not 0 <= ids.min() <= ids.max() < n_experts)
        ):
            raise TraceError(f"{path}, line {number}: ids and weights do not fit {n_experts} experts")
    return step


def _chosen(ids: list[list[int]], weights: list[list[float]]) -> tuple[Tensor, Tensor]:
    if not all(math.isfinite(w) for row in weights for w in row):
        raise ValueError("a weight is not finite")
    if not all(type(expert) is int for row in ids for expert in row):
        raise TypeError("an expert is no whole number")
    return torch.tensor(ids, dtype=torch.long), torch.tensor(weights, dtype=torch.float64)
