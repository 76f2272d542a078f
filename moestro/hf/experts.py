"""Experts of transformers' models: our grouped operation as one of its implementations, and a look at every call.

transformers (5 and later) computes the experts of a layer through a table of implementations, chosen by name. Two names
are added here: `moestro`, and one for the time of an `intercepted` block.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, _default_apply_gate

from moestro.ops import expert_ffn
from moestro.routing import SparseRouting

MOESTRO = "moestro"
INTERCEPTED = "moestro_intercepted"
# Where an experts module keeps who looks at its calls.
WATCH = "_moestro_watch"
# layer, experts module, hidden [t d], ids [t k], weights [t k] -> output [t d], or None to compute as usual
Intercept = Callable[[int, nn.Module, Tensor, Tensor, Tensor], Tensor | None]


def experts_modules(model: nn.Module) -> dict[int, Any]:
    """The experts module of every layer that has one, by the number of the layer.

    Raises: ValueError where a module of experts stands outside of numbered layers, or two stand in one.
    """
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if not _dispatched(module):
            continue
        number = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
        if number is None or int(number[1]) in found:
            raise ValueError(f"{name}: allowed is one module of experts in each numbered layer")
        found[int(number[1])] = module
    return found


@contextmanager
def intercepted(model: PreTrainedModel, fn: Intercept, otherwise: str = "eager") -> Iterator[None]:
    """Inside, the experts of every layer of `model` are computed by `fn(layer, module, hidden, ids, weights)`, and
    where it returns None by the implementation `otherwise`: `eager` is transformers' own loop, to the last bit.

    hidden [t d], ids and weights [t k], output [t d]; gradients flow through what `fn` returns. Blocks may be nested:
    the inner one is asked alone. Afterwards the model is as it was, after an error too.

    Raises: ValueError where the model has no experts that transformers dispatches, or `otherwise` is not known.
    """
    modules = experts_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no experts that transformers dispatches by name")
    if otherwise != "eager" and otherwise not in ALL_EXPERTS_FUNCTIONS:
        raise ValueError(f"otherwise={otherwise!r}, allowed: eager, {', '.join(ALL_EXPERTS_FUNCTIONS.valid_keys())}")
    with ExitStack() as undo:
        # one config may serve many modules: what it said first is put back last
        for config in {id(module.config): module.config for module in modules.values()}.values():
            undo.callback(setattr, config, "_experts_implementation_internal", config._experts_implementation)
            config._experts_implementation_internal = INTERCEPTED
        for layer, module in modules.items():
            undo.callback(setattr, module, WATCH, getattr(module, WATCH, None))
            setattr(module, WATCH, (layer, fn, otherwise))
        yield


def eager_experts(
    module: Any, hidden: Float[Tensor, "t d"], ids: Int[Tensor, "t k"], weights: Float[Tensor, "t k"]
) -> Float[Tensor, "t d"]:
    """What the module's class defines: a loop over its experts in ascending order."""
    return type(module).forward.__wrapped__(module, hidden, ids, weights)


def _intercept(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    layer, fn, otherwise = getattr(module, WATCH)
    out = fn(layer, module, hidden, ids, weights)
    if out is not None:
        return out
    if otherwise == "eager":
        return eager_experts(module, hidden, ids, weights)
    return ALL_EXPERTS_FUNCTIONS[otherwise](module, hidden, ids, weights)


def moestro_experts(
    module: Any, hidden: Float[Tensor, "t d"], ids: Int[Tensor, "t k"], weights: Float[Tensor, "t k"]
) -> Float[Tensor, "t d"]:
    """y_t = sum_k weights_tk * expert_ids_tk(hidden_t), grouped by expert, on the module's own tensors.

    Gated experts without biases, gate|up [e, 2w, d] and down [e, d, w] (most families), run as `ops.expert_ffn`; those
    with biases, transposed matrices, gates or activations of their own (gpt-oss) are grouped alike, each product
    through autograd. Weights are rounded to the dtype of `hidden` before they multiply.

    Raises: ValueError for experts spread over several processes, which this operation does not know.
    """
    if module._is_expert_parallel:
        raise ValueError(
            f"experts_implementation={MOESTRO!r}: {type(module).__name__} is spread over processes; use eager"
        )
    n_experts: int = module.num_experts
    routing = SparseRouting.from_topk(ids, weights, n_experts).grouped()
    activation = activation_name(module.act_fn) if _plain(module) else None
    if activation is None:
        return _grouped(module, hidden, routing).to(hidden.dtype)  # type: ignore[call-arg]
    w_in, w_out = module.gate_up_proj.flatten(0, 1), module.down_proj
    widths = [w_out.shape[-1]] * n_experts
    return expert_ffn(hidden, routing.token, routing.weight, routing.offsets, w_in, w_out, widths, activation)


def activation_name(act: object) -> str | None:
    """Ours for an activation of transformers; None for one that we do not have."""
    if isinstance(act, GELUActivation):
        return "gelu" if act.act is F.gelu else None
    names = {nn.SiLU: "silu", SiLUActivation: "silu", nn.ReLU: "relu"}
    names |= {NewGELUActivation: "gelu_tanh", GELUTanh: "gelu_tanh"}
    return names.get(type(act))  # type: ignore[arg-type]


def _dispatched(module: nn.Module) -> bool:
    """Whether transformers chooses by name how this module computes."""
    return hasattr(module, "is_concatenated") and hasattr(type(module).forward, "__wrapped__")


def _plain(module: Any) -> bool:
    """Whether the experts are act(gate) * up between two matrices as they lie in most families, and nothing else."""
    usual = module.has_gate and module.is_concatenated and type(module)._apply_gate is _default_apply_gate
    return bool(usual and not (module.has_bias or module.is_transposed or module.has_post_expert_norm))


@torch.compiler.disable
def _grouped(module: Any, hidden: Tensor, routing: SparseRouting) -> Tensor:
    """Rows in expert order, two products for every expert that is met."""
    bounds = routing.offsets.tolist()
    met = [e for e in range(routing.n_experts) if bounds[e + 1] > bounds[e]]
    up, down = _linears(module, "gate_up_proj" if module.has_gate else "up_proj"), _linears(module, "down_proj")
    gathered, rows = routing.gather(hidden), [hidden.new_zeros(0, hidden.shape[1])]
    for e in met:
        middle = up(e, gathered[bounds[e] : bounds[e + 1]])
        middle = module._apply_gate(middle) if module.has_gate else module.act_fn(middle)
        rows.append(down(e, middle))
    together = torch.cat(rows)
    return routing.combine(module.post_expert_norm(together) if module.has_post_expert_norm else together)


def _linears(module: Any, name: str) -> Callable[[int, Tensor], Tensor]:
    """The product of expert e with rows. Matrices are taken apart once: their gradients are put together once."""
    matrices = getattr(module, name).unbind(0)
    biases = getattr(module, f"{name}_bias").unbind(0) if module.has_bias else [None] * len(matrices)
    return lambda e, rows: F.linear(rows, matrices[e].T if module.is_transposed else matrices[e], biases[e])


ExpertsInterface.register(MOESTRO, moestro_experts)
ExpertsInterface.register(INTERCEPTED, _intercept)
