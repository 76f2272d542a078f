"""Model, optimizer and rule state as flat named tensors, and back."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moestro.parallel.layout import lay_out, own_layout
from moestro.train.checkpoint import CheckpointError
from moestro.train.optim import Optimizers
from moestro.train.row_adamw import RowAdamW
from moestro.train.tables import named_tensors
from moestro.upgrades import Shapes


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parameters and buffers, each once, and the other names of tied ones: {name: name it is stored under}."""
    tensors: dict[str, Tensor] = {}
    stored: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in stored:
            tied[name] = stored[id(tensor)]
        else:
            stored[id(tensor)] = name
            tensors[name] = tensor
    return tensors, tied


def load_model(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
    """Copy stored tensors into a model of the same names, shapes and ties.

    Raises: CheckpointError saying how the model differs.
    """
    own, own_tied = model_tensors(model)
    if own_tied != tied:
        raise CheckpointError(f"the checkpoint ties {tied or 'nothing'}, this model ties {own_tied or 'nothing'}")
    require_same_shapes("model", shapes_of(own), shapes_of(tensors))
    model.load_state_dict(tensors | {name: tensors[stored] for name, stored in tied.items()})


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def require_same_shapes(what: str, own: Shapes, stored: Shapes) -> None:
    """Raises: CheckpointError naming the first tensors that differ in name or shape."""
    differing = [
        f"{name}: checkpoint {shape_of(stored, name)}, here {shape_of(own, name)}"
        for name in sorted(own.keys() | stored.keys())
        if shape_of(stored, name) != shape_of(own, name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(f"the checkpoint is of another {what}: {'; '.join(differing[:3])}{more}")


def shape_of(shapes: Shapes, name: str) -> str:
    """Shape of a named tensor, or that it is absent."""
    return str(list(shapes[name])) if name in shapes else "absent"


def optimizer_tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """The optimizer's state under `<parameter>/<entry>`, for example `head.weight/exp_avg`; what is of a parameter that
    is one rank's own lies as that does."""
    names = {id(parameter): name for name, parameter in named_tensors(model).items()}
    tensors: dict[str, Tensor] = {}
    for parameter, entries in optimizer.state.items():
        layout = own_layout(parameter)
        for key, value in entries.items():
            if layout is not None and value.ndim and value.shape == parameter.shape[: value.ndim]:
                lay_out(value, layout.first_dims(value.ndim))
            tensors[f"{names[id(parameter)]}/{key}"] = value
    return tensors


def load_optimizer(model: nn.Module, optimizer: Optimizers, tensors: dict[str, Tensor]) -> None:
    """Put stored state back; learning rates and other settings stay those of `optimizer`.

    Raises: CheckpointError for state of parameters that the optimizer does not have, or of another kind of optimizer.
    """
    names = {id(parameter): name for name, parameter in named_tensors(model).items()}
    trained = {names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
    entries: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, entry = key.rsplit("/", 1)
        entries.setdefault(name, {})[entry] = tensor
    if unknown := entries.keys() - trained:
        raise CheckpointError(f"the checkpoint has optimizer state of {min(unknown)!r}, which is not trained here")
    for part in optimizer.parts:
        parameters = [parameter for group in part.param_groups for parameter in group["params"]]
        order = [names[id(parameter)] for parameter in parameters]
        state = {index: entries[name] for index, name in enumerate(order) if name in entries}
        rows = isinstance(part, RowAdamW)
        if odd := [order[index] for index, stored in state.items() if ("clock" in stored) is not rows]:
            kinds = ("dense", "sparse") if rows else ("sparse", "dense")
            raise CheckpointError(f"{odd[0]} was trained with {kinds[0]} gradients, here they are {kinds[1]}")
        if not rows:
            state = {
                index: {key: laid_out_like(parameters[index], value) for key, value in stored.items()}
                for index, stored in state.items()
            }
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})


def laid_out_like(parameter: Tensor, stored: Tensor) -> Tensor:
    """A copy in which elements lie as those of the parameter do, where it has as many: fused kernels walk both in the
    order of memory. What was read is a view of a mapped file, all of which torch would keep as long as one lives."""
    if stored.shape != parameter.shape:
        return stored.clone()
    return torch.empty_like(parameter, dtype=stored.dtype, device=stored.device).copy_(stored)


def split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """A nested state without its tensors: each goes to `tensors` under its path and leaves {"tensor": path} behind."""
    if isinstance(tree, Tensor):
        tensors[path] = on_cpu(tree)
        return {"tensor": path}
    if isinstance(tree, Mapping):
        if odd := [key for key in tree if not isinstance(key, str)]:
            raise TypeError(f"{path}: the key {odd[0]!r} of a rule's state is not a string, which JSON cannot keep")
        return {key: split(value, f"{path}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return [split(value, f"{path}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `split` (tuples come back as lists)."""
    if isinstance(tree, Mapping):
        if tree.keys() == {"tensor"}:
            return tensors[tree["tensor"]]
        return {key: join(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [join(value, tensors) for value in tree]
    return tree


def on_cpu(tensor: Tensor) -> Tensor:
    """Detached, contiguous, on the CPU."""
    return tensor.detach().cpu().contiguous()


def random_state(device: torch.device) -> dict[str, str]:
    """State of torch's default random generators, base64."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_random_state(states: Mapping[str, str], device: torch.device) -> None:
    """Put the default random generators back where `random_state` found them."""
    decoded = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()
    }
    torch.set_rng_state(decoded["cpu"])
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)
