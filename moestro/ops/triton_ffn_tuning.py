"""Tile sizes of the Triton feed-forward that were measured to be best on a device, kept on disk.

Nothing is ever measured behind the caller: kernels run with the sizes that `tune` found on a device of this name for
layers of this kind, else with those of the rule in `triton_ffn_plan`.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moestro.ops.cache_folder import cache_root
from moestro.ops.triton_ffn_plan import Blocks, choose_blocks, interpreted, power_of_two

_trying: Blocks | None = None


class Kind(NamedTuple):
    """Layers that share tile sizes: device, dtype, width of the model, experts, and the powers of two that the mean
    number of rows of an expert and the greatest width do not exceed."""

    device: str
    dtype: str
    d_model: int
    n_experts: int
    rows: int
    widest: int


def kind(n_rows: int, n_experts: int, d_model: int, widest: int, dtype: torch.dtype, device: str) -> Kind:
    """The kind of a layer with that many rows on the device of that name."""
    mean = n_rows // max(n_experts, 1)
    name = str(dtype).removeprefix("torch.")
    return Kind(device, name, d_model, n_experts, power_of_two(mean), power_of_two(widest))


def blocks_for(
    n_rows: int, n_experts: int, d_model: int, widest: int, dtype: torch.dtype, device: torch.device
) -> Blocks:
    """The sizes to run with."""
    if _trying:
        return _trying
    found = None if interpreted() else _known().get(kind(n_rows, n_experts, d_model, widest, dtype, _name(device)))
    return found or choose_blocks(n_rows, n_experts, d_model, widest, dtype)


def candidates(default: Blocks) -> list[Blocks]:
    """What is worth trying beside the rule's choice, the rule's first: other row tiles, deeper loops, more warps."""
    other_rows = [default._replace(rows=rows) for rows in (default.rows // 2, default.rows * 2) if 16 <= rows <= 128]
    others = [
        default._replace(inner=default.inner // 2 if default.inner > 32 else default.inner * 2),
        default._replace(stages=default.stages + 1),
        default._replace(row_warps=12 - default.row_warps),
        default._replace(weight_warps=12 - default.weight_warps),
    ]
    return [default, *other_rows, *others]


def tune(
    this: Kind, run: Callable[[], Any], among: Sequence[Blocks], timed: Callable[[Callable[[], Any]], float]
) -> Blocks:
    """The fastest of `among` for `run`, forward and backward of a layer of that kind; kept on disk for later processes.

    `timed` takes the milliseconds of a call, such as `triton.testing.do_bench`. Sizes that the device has no room for
    are passed over.

    Raises: RuntimeError where none of them runs.
    """
    from triton.runtime.errors import OutOfResources  # pyright: ignore[reportMissingImports]

    times: dict[Blocks, float] = {}
    for blocks in among:
        try:
            with _with(blocks):
                times[blocks] = timed(run)
        except OutOfResources:
            continue
    if not times:
        raise RuntimeError(f"none of {len(among)} tile sizes runs on {this.device}")
    best = min(times, key=lambda blocks: times[blocks])
    _keep(this, best)
    return best


@contextmanager
def _with(blocks: Blocks):
    global _trying
    before, _trying = _trying, blocks
    try:
        yield
    finally:
        _trying = before


def _name(device: torch.device) -> str:
    return getattr(torch.get_device_module(device).get_device_properties(device), "name", device.type)


def _file() -> Path:
    return cache_root() / "triton_ffn.json"


@lru_cache(maxsize=1)
def _known() -> dict[Kind, Blocks]:
    """What the file holds; read once a process.

    Raises: ValueError for a file that is none of ours.
    """
    file = _file()
    if not file.exists():
        return {}
    try:
        return {Kind(**entry["kind"]): Blocks(**entry["blocks"]) for entry in json.loads(file.read_text("utf-8"))}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} does not hold tile sizes ({error}); delete it") from error


def _keep(this: Kind, best: Blocks) -> None:
    _known.cache_clear()
    every = _known() | {this: best}
    entries = [{"kind": k._asdict(), "blocks": b._asdict()} for k, b in every.items()]
    _file().parent.mkdir(parents=True, exist_ok=True)
    # whole or not at all, whoever else reads or writes it
    handle, name = tempfile.mkstemp(dir=_file().parent, prefix=".triton_ffn.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=1)
    os.replace(name, _file())
    _known.cache_clear()
