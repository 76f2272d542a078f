"""Where the experts of a folder in the Hugging Face format lie, read as they are."""

import torch

from moestro.formats import Checkpoint, Fused
from moestro.formats.shards import Entry
from moestro.offload.blobs import Experts, Extent, Stored, laid_out
from moestro.offload.codecs import Plain
from moestro.offload.files import OffloadError


def experts_in(checkpoint: Checkpoint) -> Experts:
    """Every expert of a folder, as parts `gate_up_proj`, `down_proj` (and `..._bias`) in the layout of the model's own
    parameters, which the files hold in consecutive bytes: one range a tensor, gate before up.

    Raises: FormatError for an incomplete folder; OffloadError where tensors of one expert differ in dtype.
    """
    fused = isinstance(checkpoint.family.experts, Fused)
    place = _fused if fused else _separate
    return [
        [place(checkpoint, layer, expert) for expert in range(checkpoint.n_experts(layer))]
        for layer in checkpoint.moe_layers
    ]


def _separate(checkpoint: Checkpoint, layer: int, expert: int) -> Stored:
    stored = checkpoint.expert_tensors(layer, expert)
    entry = {role: checkpoint.shards[place.name] for role, place in stored.items()}
    width, d_model = entry["gate"].shape
    parts = {"gate_up_proj": ["gate", "up"], "down_proj": ["down"]}
    shapes = {"gate_up_proj": (2 * width, d_model), "down_proj": (d_model, width)}
    ranges = {
        name: [(entry[role], entry[role].start, entry[role].stop) for role in roles] for name, roles in parts.items()
    }
    return _assembled(checkpoint, shapes, ranges)


def _fused(checkpoint: Checkpoint, layer: int, expert: int) -> Stored:
    experts, shapes, ranges = checkpoint.family.experts, {}, {}
    for name in ("gate_up", "gate_up_bias", "down", "down_bias"):
        template = getattr(experts, name)
        if template is not None:
            entry = checkpoint.shards[template.format(layer=layer)]
            size = (entry.stop - entry.start) // entry.shape[0]
            part = name.replace("gate_up", "gate_up_proj").replace("down", "down_proj")
            start = entry.start + expert * size
            shapes[part], ranges[part] = entry.shape[1:], [(entry, start, start + size)]
    return _assembled(checkpoint, shapes, ranges)


def _assembled(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], ranges: dict[str, list[tuple[Entry, int, int]]]
) -> Stored:
    dtypes: dict[torch.dtype, str] = {checkpoint.dtype(e.name): e.name for parts in ranges.values() for e, *_ in parts}
    if len(dtypes) != 1:
        raise OffloadError(f"{checkpoint.path}: tensors of one expert differ in dtype: {dtypes}")
    blob, extents = laid_out(shapes, next(iter(dtypes)), Plain()), []
    for part in blob.parts:
        at = part.fields[0].offset
        for entry, start, stop in ranges[part.name]:
            extents.append(Extent(checkpoint.path / entry.file, start, stop - start, at))
            at += stop - start
    return Stored(blob, tuple(extents))
