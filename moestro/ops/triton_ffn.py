"""The expert feed-forward in Triton: the kernels of `triton_ffn_*` as custom operations with gradients.

Nothing waits for the device unless asked to, nothing is padded, no sum is atomic: two runs agree to the bit. To
`torch.compile` both operations are opaque, with shapes known from their arguments.
"""

from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import backend
from moestro.ops.activations import activation as find
from moestro.ops.glu import gates_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def expert_ffn(
    x: Float[Tensor, "t d"],
    token: Int[Tensor, "n"],
    weight: Float[Tensor, "n"],
    offsets: Int[Tensor, "e1"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"],
    widths: tuple[int, ...],
    activation: str,
) -> Float[Tensor, "t d"]:
    """`ops.ffn.expert_ffn` on CUDA tensors of one dtype, or on CPU tensors under Triton's interpreter.

    Saves `x`, the pre-activations z and the routing, or with `recompute` no z (`backend.TritonOptions`). Hidden rows
    are compact, but how many elements they take is known on the device only: memory is reserved as if every row had
    the greatest width, or, with `exact`, for what is needed, which graphs of `torch.compile` and CUDA cannot contain.

    Raises: ValueError for an unknown activation, and for a dtype or device that the kernels cannot take; ImportError
    where Triton is missing.
    """
    find(activation)
    require_dtype(x)
    options = backend.triton_options()
    padded = [(width + 7) // 8 * 8 for width in widths]
    capacity = len(token) * max(padded)
    if options.exact:
        capacity = int((offsets.diff() * torch.tensor(padded, device=offsets.device)).sum())
    differentiable = any(v.requires_grad for v in (x, weight, w_in, w_out)) and torch.is_grad_enabled()
    # an expert's mean number of rows times so much; with few experts no expert can have more
    split = backend.SPLIT_FROM * -(-len(token) // len(widths)) if options.split else 0
    return _forward(
        x, token, weight, offsets, _layout(widths, x.device), w_in, w_out,
        capacity, max(widths), activation, differentiable and not options.recompute, split,
    )[0]  # fmt: skip


def few_rows_ffn(
    x: Float[Tensor, "t d"],
    token: Int[Tensor, "n"],
    expert: Int[Tensor, "n"],
    weight: Float[Tensor, "n"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"],
    widths: tuple[int, ...],
    activation: str,
) -> Float[Tensor, "t d"]:
    """`ops.few_rows.few_rows_ffn` in three kernels: no sort, no plan, no waiting. No gradients.

    Raises: as `expert_ffn`.
    """
    find(activation)
    require_dtype(x)
    return _few_rows(x, token, expert, weight, _layout(widths, x.device), w_in, w_out, max(widths), activation)


@torch.compiler.assume_constant_result
def _layout(widths: tuple[int, ...], device: torch.device) -> Tensor:
    return _cached_layout(widths, device)


# one for each layer of the largest models, whose experts may have other widths in each: a new one waits for the device
@lru_cache(maxsize=4096)
def _cached_layout(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """What is known of the experts before any routing, int64 [2, n_experts + 1]: first units; widest experts first."""
    widest_first = sorted(range(len(widths)), key=lambda e: -widths[e])
    # kept for training as well, which can save no tensor that was made in inference mode
    with torch.inference_mode(False):
        return torch.tensor([[0, *accumulate(widths)], [*widest_first, 0]], device=device)


@torch.library.custom_op("moestro::triton_expert_ffn", mutates_args=())
def _forward(
    x: Tensor, token: Tensor, weight: Tensor, offsets: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor,
    capacity: int, widest: int, activation: str, save_z: bool, split: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y; z where it is to be saved, else empty; rows by token, and where each token's begin."""
    blocks = _blocks(x, token, offsets, widest)
    from moestro.ops import triton_ffn_forward as kernels
    from moestro.ops.triton_ffn_plan import make_plan

    x, token, offsets, w_in, w_out = (v.contiguous() for v in (x, token, offsets, w_in, w_out))
    gates = gates_of(w_in, w_out)
    sorted_token, order = token.sort(stable=True)
    starts = torch.searchsorted(sorted_token, torch.arange(len(x) + 1, device=x.device))
    plan = make_plan(offsets, experts, x.shape[1], blocks, split)
    z = x.new_empty(capacity * gates if save_z else 0)
    hidden, rows = x.new_empty(capacity), x.new_empty(len(token), x.shape[1])
    kernels.up(x, token, w_in, plan, z if save_z else None, hidden, activation, gates, blocks)
    kernels.down(hidden, w_out, plan, rows, 1, blocks)
    return kernels.combine(rows, weight.contiguous(), order, starts), z, order, starts


@_forward.register_fake
def _(x, token, weight, offsets, experts, w_in, w_out, capacity, widest, activation, save_z, split):
    gates = gates_of(w_in, w_out)
    order, starts = (token.new_empty(n, dtype=torch.int64) for n in (token.shape[0], x.shape[0] + 1))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(capacity * gates if save_z else 0), order, starts


@torch.library.custom_op("moestro::triton_expert_ffn_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, token: Tensor, weight: Tensor, offsets: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor,
    z: Tensor, order: Tensor, starts: Tensor, capacity: int, widest: int, activation: str, split: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, w_in and w_out."""
    blocks = _blocks(x, token, offsets, widest)
    from moestro.ops import triton_ffn_backward as backward
    from moestro.ops import triton_ffn_forward as forward
    from moestro.ops.triton_ffn_plan import make_plan

    dy, x, token, offsets = (v.contiguous() for v in (dy, x, token, offsets))
    weight, w_in, w_out = (v.contiguous() for v in (weight, w_in, w_out))
    gates = gates_of(w_in, w_out)
    # planned again, because the forward pass may have run with tile sizes that were the best then
    plan = make_plan(offsets, experts, x.shape[1], blocks, split)
    if not len(z):
        z = x.new_empty(capacity * gates)
        forward.up(x, token, w_in, plan, z, None, activation, gates, blocks)
    dz, scaled = torch.empty_like(z), x.new_empty(capacity)
    partial = x.new_zeros(len(token), -(-widest // blocks.units), dtype=torch.float32)
    backward.hidden_gradients(dy, token, weight, w_out, plan, z, dz, scaled, partial, activation, gates, blocks)
    dw_in, dw_out, dx_rows = torch.empty_like(w_in), torch.empty_like(w_out), x.new_empty(len(token), x.shape[1])
    units = backward.part_units(len(token), widest, split)
    work = x.new_empty(units * gates * x.shape[1], dtype=torch.float32) if units else None
    backward.weight_gradients(scaled, dy, token, plan, dw_out, 1, blocks, split, work)
    backward.weight_gradients(dz, x, token, plan, dw_in, gates, blocks, split, work)
    forward.down(dz, w_in, plan, dx_rows, gates, blocks)
    return forward.combine(dx_rows, None, order, starts), partial.sum(1).to(weight.dtype), dw_in, dw_out


@_backward.register_fake
def _(dy, x, token, weight, offsets, experts, w_in, w_out, z, order, starts, capacity, widest, activation, split):
    return tuple(torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, weight, w_in, w_out))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.capacity, ctx.widest, ctx.activation, _, ctx.split = inputs
    _, *rest = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(*tensors, *rest)


def _autograd(ctx, dy, *_):
    known = ctx.capacity, ctx.widest, ctx.activation, ctx.split
    dx, dweight, dw_in, dw_out = _backward(dy, *ctx.saved_tensors, *known)
    return dx, None, dweight, None, None, dw_in, dw_out, *[None] * 5


_forward.register_autograd(_autograd, setup_context=_setup_context)


@torch.library.custom_op("moestro::triton_few_rows_ffn", mutates_args=())
def _few_rows(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor,
    widest: int, activation: str,
) -> Tensor:  # fmt: skip
    require_device(x)
    from moestro.ops import triton_ffn_few as kernels

    x, weight, w_in, w_out = (v.contiguous() for v in (x, weight, w_in, w_out))
    rows = kernels.Rows(token.contiguous(), expert.contiguous(), experts[0], widest)
    hidden = kernels.up(x, rows, w_in, activation, gates_of(w_in, w_out))
    return kernels.combine(kernels.down(hidden, rows, w_out), rows, weight, x)


@_few_rows.register_fake
def _(x, token, expert, weight, experts, w_in, w_out, widest, activation):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _blocks(x: Tensor, token: Tensor, offsets: Tensor, widest: int):
    """Tile sizes for these shapes."""
    require_device(x)
    from moestro.ops.triton_ffn_tuning import blocks_for

    return blocks_for(len(token), len(offsets) - 1, x.shape[1], widest, x.dtype, x.device)


def require_dtype(x: Tensor) -> None:
    """Raises: ValueError for a dtype that the kernels do not read."""
    if x.dtype not in DTYPES:
        raise ValueError(f"backend 'triton' on {x.dtype}, allowed: {', '.join(str(dtype) for dtype in DTYPES)}")


def interprets() -> bool:
    """Whether Triton is there and takes tensors of the CPU."""
    if find_spec("triton") is None:
        return False
    from moestro.ops.triton_ffn_plan import interpreted

    return interpreted()


def require_device(x: Tensor) -> None:
    """The first question to Triton.

    Raises: ImportError where Triton is missing; ValueError where its kernels cannot run on the device of `x`.
    """
    try:
        from moestro.ops.triton_ffn_plan import interpreted
    except ImportError as error:
        raise ImportError("the backend 'triton' needs the package 'triton': pip install 'moestro[triton]'") from error
    if not x.is_cuda and not (x.device.type == "cpu" and interpreted()):
        where = "cuda, or cpu with TRITON_INTERPRET=1 set before triton is imported"
        raise ValueError(f"backend 'triton' on a tensor on {x.device}, allowed: {where}")
    if interpreted() and x.dtype == torch.bfloat16:
        raise ValueError("backend 'triton' on torch.bfloat16 under the interpreter, which computes it wrongly")
