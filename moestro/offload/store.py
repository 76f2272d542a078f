"""LOW copies of all experts in a folder: one file a layer, complete or absent, resumed where it stopped."""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro.formats import FormatError
from moestro.formats.shards import header
from moestro.formats.writer import computed, write_file
from moestro.offload.blobs import Blob, Experts, Extent, Stored, laid_out
from moestro.offload.calibration import Calibration
from moestro.offload.codecs import Codec, Grouped, relative_error
from moestro.offload.files import Files, OffloadError
from moestro.ops.whole_files import TEMPORARY, sha256, sha256_json, sync_file
from moestro.train.durable import remove_temporary, write_json
from moestro.upgrades import STORE

FORMAT = "moestro-offload-store"
# An expert whose output may be off by more than this share of itself is named.
LARGE_ERROR = 0.2


@dataclass(frozen=True)
class Store:
    """Low copies, and how far each expert's matrices are from its HIGH ones (`errors[layer][expert]`, weighted as they
    were calibrated)."""

    experts: Experts
    errors: list[list[float]]
    calibrated: bool

    def warning(self) -> str | None:
        """One line about experts that LOW copies change much; None where there are none."""
        every = [error for layer in self.errors for error in layer]
        large = sum(error > LARGE_ERROR for error in every)
        if not large:
            return None
        how = "" if self.calibrated else " (not calibrated: --calibrate TEXT may help)"
        return (
            f"{large} of {len(every)} experts are off by more than {LARGE_ERROR:.0%} in LOW, the worst by "
            f"{max(every):.0%}{how}: look at the perplexity in the report"
        )


def open_store(
    folder: Path,
    high: Experts,
    codec: Codec,
    calibration: Calibration | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Store:
    """LOW copies in `folder` of the experts `high`, in `codec`; what is missing of them is built, a layer at a time,
    each file complete before it has its name. With a calibration, a store that was built without one (or with another)
    is built anew.

    Raises: OffloadError where the folder holds copies of other experts, lacks calibrated ones where no calibration is
    given, is damaged, or the disk is full; FormatError for a damaged file of copies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    state = {"format": FORMAT, STORE.key: STORE.version, "source": fingerprint(high), **_described(codec)}
    built = _state(folder, state)
    digest = None if calibration is None else _digest(calibration, high)
    if calibration is not None and built.get("calibration") != digest:
        for path in folder.glob("layer-*"):
            path.unlink()
        built["calibration"] = digest
    write_json(folder / "store.json", {**state, "calibration": built.get("calibration")})
    layers = []
    for layer, experts in enumerate(high):
        if not all((folder / f"layer-{layer:03}.{kind}").is_file() for kind in ("safetensors", "json")):
            if calibration is None and built.get("calibration") is not None:
                raise OffloadError(
                    f"{folder} is calibrated and lacks copies of layer {layer + 1}: give --calibrate TEXT again, or "
                    "delete the folder for copies that are not calibrated"
                )
            progress(f"{codec.name} copies of layer {layer + 1} of {len(high)}")
            _build(folder, layer, experts, codec, calibration)
        layers.append(_opened(folder, layer, experts, codec))
    return Store(
        [experts for experts, _ in layers], [errors for _, errors in layers], built.get("calibration") is not None
    )


def _described(codec: Codec) -> dict[str, Any]:
    grouped = {"bits": codec.bits, "group": codec.group} if isinstance(codec, Grouped) else {}
    return {"codec": codec.name, **grouped}


def _state(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    path = folder / "store.json"
    if not path.is_file():
        if any(folder.iterdir()):
            raise OffloadError(f"{folder} is not empty and no store: give another --store")
        return {}
    found = _read(path)
    if found.get("format") == FORMAT:
        found = STORE.upgraded(found, path)
    for key, value in wanted.items():
        if found.get(key) != value:
            raise OffloadError(f"{folder} holds copies of other experts: {key} {found.get(key)!r}, expected {value!r}")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OffloadError(f"{path} is damaged ({error}); delete the folder to have it rebuilt") from error
    if not isinstance(found, dict):
        raise OffloadError(f"{path} is damaged (no JSON object); delete the folder to have it rebuilt")
    return found


def fingerprint(high: Experts) -> str:
    """Of where the experts lie and how each begins (4 KiB): other weights of the same shapes have another one."""
    files, seen = Files(), []
    for layer in high:
        for stored in layer:
            first = stored.extents[0]
            begin = torch.empty(min(first.size, 4096), dtype=torch.uint8)
            files.read(Extent(first.file, first.start, len(begin), 0), begin)
            places = [(extent.file.name, extent.start, extent.size) for extent in stored.extents]
            seen.append([places, zlib.crc32(begin.numpy().data)])
    files.close()
    return sha256_json(seen)


def _digest(calibration: Calibration, high: Experts) -> str:
    keys = [(layer, expert) for layer, experts in enumerate(high) for expert in range(len(experts))]
    sums = [[float(v.double().sum()) for v in calibration.importance(key).values()] for key in keys]
    return sha256_json(sums)


def read_expert(files: Files, stored: Stored) -> Tensor:
    """An expert's bytes, on the CPU."""
    buffer = torch.empty(stored.blob.size, dtype=torch.uint8)
    for extent in stored.extents:
        files.read(extent, buffer[extent.at : extent.at + extent.size])
    return buffer


def _low_layout(blob: Blob, codec: Codec) -> Blob:
    return laid_out({part.name: part.shape for part in blob.parts}, blob.dtype, codec)


def _build(folder: Path, layer: int, experts: Sequence[Stored], codec: Codec, calibration: Calibration | None) -> None:
    """Write one layer's file, then the one that says it is complete."""
    files, checksums, errors = Files(), {}, {}

    def encoded(expert: int) -> Tensor:
        tensors = experts[expert].blob.read(read_expert(files, experts[expert]))
        importance = {} if calibration is None else calibration.importance((layer, expert))
        layout = _low_layout(experts[expert].blob, codec)
        buffer = torch.zeros(layout.size, dtype=torch.uint8)
        layout.write(buffer, tensors, importance)
        checksums[expert] = zlib.crc32(buffer.numpy().data)
        errors[expert] = _error(tensors, layout.read(buffer), importance)
        return buffer

    sizes = [_low_layout(stored.blob, codec).size for stored in experts]
    outgoing = [computed(f"experts.{e}", torch.uint8, (size,), lambda e=e: encoded(e)) for e, size in enumerate(sizes)]
    path, temporary = folder / f"layer-{layer:03}.safetensors", folder / f"{TEMPORARY}layer-{layer:03}.safetensors"
    try:
        digest = write_file(temporary, outgoing)
        sync_file(temporary)
        os.replace(temporary, path)
        facts = {
            "checksums": [checksums[e] for e in range(len(sizes))],
            "errors": [errors[e] for e in range(len(sizes))],
        }
        write_json(folder / f"layer-{layer:03}.json", {"sha256": digest, **facts})
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OffloadError(f"{path} cannot be written ({error.strerror}); run again to continue") from error
    finally:
        files.close()


def _error(tensors: dict[str, Tensor], decoded: dict[str, Tensor], importance: dict[str, Tensor]) -> float:
    """The largest relative error of an expert's matrices."""
    names = [name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.numel()]
    return max((relative_error(tensors[n], decoded[n], importance.get(n)) for n in names), default=0.0)


def _opened(folder: Path, layer: int, experts: Sequence[Stored], codec: Codec) -> tuple[list[Stored], list[float]]:
    path = folder / f"layer-{layer:03}.safetensors"
    entries, _ = header(path)
    facts, found = _read(folder / f"layer-{layer:03}.json"), []
    if not all(len(facts.get(key, ())) == len(experts) for key in ("checksums", "errors")):
        raise OffloadError(f"{path.with_suffix('.json')} is damaged (not {len(experts)} experts); delete the folder")
    for expert, stored in enumerate(experts):
        layout, entry = _low_layout(stored.blob, codec), entries.get(f"experts.{expert}")
        if entry is None or entry.stop - entry.start != layout.size:
            raise FormatError(f"{path}: expert {expert} is missing or of another size; delete the folder to rebuild it")
        place = Extent(path, entry.start, layout.size, 0)
        found.append(Stored(layout, (place,), facts["checksums"][expert]))
    return found, facts["errors"]


def verify_store(folder: Path) -> None:
    """Read every file of a store once.

    Raises: OffloadError where one does not have the bytes that were written.
    """
    for facts in sorted(folder.glob("layer-*.json")):
        path = facts.with_suffix(".safetensors")
        if not path.is_file() or sha256(path) != _read(facts)["sha256"]:
            raise OffloadError(f"{path} is missing or damaged; delete {facts.name} and it to have the layer rebuilt")
