"""A rank's parts of a checkpoint, however many ranks wrote it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moestro.parallel.layout import Layout, is_sharded, layout_of, local, part_of, whole_layout
from moestro.train.checkpoint import added_tensors, read_parts, stored_shapes
from moestro.train.tensors import model_tensors, require_same_shapes


def model_parts(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """What `load_model` needs of a checkpoint: whole tensors, and of those that are spread over ranks this rank's part.

    Raises: CheckpointError saying how the model differs.
    """
    own, stored = model_tensors(model)[0], stored_shapes(path, "model")
    layouts = {name: layout_of(tensor) for name, tensor in own.items()}
    added = added_tensors(path, stored, own)
    shapes = stored | {name: tuple(tensor.shape) for name, tensor in added.items()}
    require_same_shapes("model", {name: layout.shape for name, layout in layouts.items()}, shapes)
    wanted = {name: (layouts[name], tuple(local(own[name]).shape)) for name in stored}
    parts = read_parts(path, "model", wanted) | {name: part_of(value, own[name]) for name, value in added.items()}
    return {name: like(own[name], part) for name, part in parts.items()}


def optimizer_parts(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """What `load_optimizer` needs of a checkpoint: entries that have a parameter's shape, or a number for each of its
    rows, are spread as it is."""
    parameters = dict(model.named_parameters())
    wanted: dict[str, tuple[Layout, tuple[int, ...]]] = {}
    for key, shape in stored_shapes(path, "optimizer").items():
        parameter, layout = parameters.get(key.rsplit("/", 1)[0]), whole_layout(shape)
        own = shape
        if parameter is not None and shape and shape == layout_of(parameter).shape[: len(shape)]:
            layout, own = layout_of(parameter).first_dims(len(shape)), tuple(local(parameter).shape)[: len(shape)]
        wanted[key] = layout, own
    parts = read_parts(path, "optimizer", wanted)
    return {key: like(parameters.get(key.rsplit("/", 1)[0]), part) for key, part in parts.items()}


def like(tensor: Tensor | None, part: Tensor) -> Tensor:
    """A rank's part as a DTensor, where `tensor` is one and of as many dimensions; else as it is."""
    if tensor is None or not is_sharded(tensor) or part.ndim != tensor.ndim:
        return part
    from torch.distributed.tensor import DTensor

    spread: Any = tensor
    return DTensor.from_local(
        part.to(local(tensor).device),
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
