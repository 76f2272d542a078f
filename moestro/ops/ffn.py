"""Feed-forward experts of any widths on rows sorted by expert: one pass, no padding, no copies of weights."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, reference, triton_ffn
from moestro.ops.activations import activation as find
from moestro.ops.ffn_plan import Expert, Job, Plan
from moestro.ops.glu import compiled_experts, gates_of, hidden, hidden_backward
from moestro.ops.native.few_rows import few_rows
from moestro.ops.precision import compute_dtype
from moestro.ops.tiled_ffn import multiplies, tiled_ffn

# Without gradients, up to so many rows, and so many times the number of experts, take as long as reading the weights:
# then nothing is gained by products of matrices, and the kernels for few rows are it.
MOST_ROWS, ROWS_PER_EXPERT = 256, 4


def expert_ffn(
    x: Float[Tensor, "t d"],
    token: Int[Tensor, "n"],
    weight: Float[Tensor, "n"],
    offsets: Int[Tensor, "e1"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"] | Float[Tensor, "e d w"],
    widths: Sequence[int],
    activation: str,
) -> Float[Tensor, "t d"]:
    """y_t = sum over the rows n of token t of weight_n * FFN_e(x_t).

    Rows lie in expert order: expert e owns rows `offsets[e]:offsets[e+1]`. Storage is unit-major: with S the sum of
    the widths, expert e owns `widths[e]` rows of `w_out` [S, d] and, for a gated expert, twice as many rows of
    `w_in` [2S, d], its gate rows before its up rows; `w_in` [S, d] means no gate. FFN(x) = (act(G x) * (U x)) @ W_out.
    `w_out` may be stacked instead, [e, d, w] with one matrix for each expert of the same width: the layout of public
    checkpoints, which is then read as it lies.

    Slicing one parameter under autograd adds a full-size gradient per expert; here each expert writes its own slice
    of one buffer. Saves only `x` and the pre-activations.
    """
    find(activation)
    dtype = compute_dtype(x)
    if _reads_once(x, weight, w_in, w_out, len(widths), activation):
        # their weights need no other dtype: they are read once
        return _few(x.to(dtype), token, weight.to(dtype), w_in, w_out, offsets, tuple(widths))  # type: ignore[call-arg]
    x, w_in, w_out, weight = (v.to(dtype) for v in (x, w_in, w_out, weight))
    if backend.active() == "reference":
        return reference.expert_ffn(x, token, weight, offsets, w_in, unit_major(w_out), widths, activation)
    if backend.active() == "triton":
        return triton_ffn.expert_ffn(x, token, weight, offsets, w_in, unit_major(w_out), tuple(widths), activation)
    return _fused(x, token, weight, w_in, w_out, offsets, tuple(widths), activation)  # type: ignore[call-arg]


def unit_major(w_out: Float[Tensor, "s d"] | Float[Tensor, "e d w"]) -> Float[Tensor, "s d"]:
    """One row for each unit: a copy of stacked matrices, the tensor itself where it lies so already."""
    return w_out.mT.flatten(0, 1) if w_out.ndim == 3 else w_out


def wants_gradient(*leaves: Tensor) -> bool:
    """Whether autograd records what is done with these."""
    return torch.is_grad_enabled() and any(v.requires_grad for v in leaves)


def _reads_once(x: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor, n_experts: int, activation: str) -> bool:
    """Whether the kernels for few rows are the way."""
    return (
        compiled_experts(x, w_in, w_out, activation)
        and len(weight) <= min(MOST_ROWS, ROWS_PER_EXPERT * n_experts)
        and not wants_gradient(x, weight, w_in, w_out)
    )


@torch.compiler.disable
def _few(
    x: Tensor, token: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor, offsets: Tensor, widths: tuple[int, ...]
) -> Tensor:
    return few_rows(x, token, weight, offsets.tolist(), w_in, w_out, widths)


@torch.compiler.disable
def _fused(
    x: Tensor,
    token: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    offsets: Tensor,
    widths: tuple[int, ...],
    activation: str,
) -> Tensor:
    if multiplies(x, w_in, w_out, activation):
        gradient = wants_gradient(x, weight, w_in, w_out)
        return tiled_ffn(x, token, weight, w_in, w_out, offsets.tolist(), widths, gradient)
    plan = Plan(token, len(x), offsets.tolist(), widths, roomy=x.device.type == "cpu" and x.dtype.itemsize == 2)
    if wants_gradient(x, weight, w_in, w_out):
        return _ExpertFFN.apply(x, weight, w_in, w_out, plan, activation)  # type: ignore
    return _forward(x, weight, w_in, w_out, plan, activation, None)


def _forward(
    x: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor, plan: Plan, activation: str, z_all: Tensor | None
) -> Tensor:
    """y; writes the pre-activations of all experts to `z_all` where it is given."""
    gates = gates_of(w_in, w_out)
    rows = plan.gather(x)
    z_one, h_one = _scratch(plan, x, gates if z_all is None else 0), _scratch(plan, x)
    for job in plan.jobs:
        z = _view(z_one, job, gates) if z_all is None else _of(z_all, job, gates)
        torch.mm(rows[job.slots], _own(w_in, job.expert, gates).T, out=z)
        # an expert's outputs take the place of its inputs
        torch.mm(hidden(z, _view(h_one, job), activation), _out(w_out, job), out=rows[job.slots])
    return plan.combine(rows, weight)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, w_in, w_out, plan, activation):  # type: ignore[override]
        z_all = x.new_empty(plan.n_hidden * gates_of(w_in, w_out))
        ctx.save_for_backward(x, weight, w_in, w_out, z_all)
        ctx.plan, ctx.activation = plan, activation
        return _forward(x, weight, w_in, w_out, plan, activation, z_all)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, weight, w_in, w_out, z_all = ctx.saved_tensors
        plan, gates = ctx.plan, gates_of(w_in, w_out)
        needs_x, _, needs_in, needs_out = ctx.needs_input_grad[:4]
        dw_in = _gradient(w_in, plan, gates) if needs_in else None
        dw_out = _gradient(w_out, plan) if needs_out else None
        weight = plan.spread(weight)
        dweight = torch.zeros_like(weight)
        dhidden_one, scaled_one, dz_one = (_scratch(plan, x, g) for g in (1, 1, gates))
        rows, dy_rows = plan.gather(x), plan.gather(dy)
        for job in plan.jobs:
            slots, block = job.slots, _scaled(job.expert.unit, gates)
            dhidden, scaled, dz = _view(dhidden_one, job), _view(scaled_one, job), _view(dz_one, job, gates)
            torch.mm(dy_rows[slots], _out(w_out, job).T, out=dhidden)
            z = _of(z_all, job, gates)
            hidden_backward(dhidden, z, weight[slots], dz, scaled, dweight[slots], ctx.activation)
            if dw_out is not None:
                left, right = (scaled, dy_rows[slots]) if dw_out.ndim == 2 else (dy_rows[slots], scaled)
                torch.mm(left.T, right, out=_own(dw_out, job.expert))
            if dw_in is not None:
                torch.mm(dz.T, rows[slots], out=dw_in[block])
            if needs_x:
                torch.mm(dz, w_in[block], out=rows[slots])
        return plan.combine(rows) if needs_x else None, plan.collect(dweight), dw_in, dw_out, None, None


def _scratch(plan: Plan, like: Tensor, gates: int = 1) -> Tensor:
    """Memory for one expert's hidden rows at a time, used again by the next: it stays in the cache."""
    return like.new_empty(gates * max((job.n_slots * job.width for job in plan.jobs), default=0))


def _view(buffer: Tensor, job: Job, gates: int = 1) -> Tensor:
    """The job's hidden rows in scratch memory."""
    return buffer[: job.n_slots * job.width * gates].view(job.n_slots, job.width * gates)


def _of(z_all: Tensor, job: Job, gates: int) -> Tensor:
    """The job's rows in a buffer for all experts."""
    return z_all[_scaled(job.hidden, gates)].view(job.n_slots, job.width * gates)


def _gradient(parameter: Tensor, plan: Plan, gates: int = 1) -> Tensor:
    """Memory for a gradient; units that no row meets get zeros."""
    gradient = torch.empty_like(parameter, memory_format=torch.contiguous_format)
    for idle in plan.idle:
        _own(gradient, idle, gates).zero_()
    return gradient


def _own(w: Tensor, expert: Expert, gates: int = 1) -> Tensor:
    """What of a weight is one expert's."""
    return w[expert.number] if w.ndim == 3 else w[_scaled(expert.unit, gates)]


def _out(w_out: Tensor, job: Job) -> Tensor:
    """An expert's output matrix, [w, d]."""
    own = _own(w_out, job.expert)
    return own.T if w_out.ndim == 3 else own


def _scaled(s: slice, factor: int) -> slice:
    return slice(s.start * factor, s.stop * factor)
