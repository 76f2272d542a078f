"""Feed-forward experts of any widths on rows sorted by expert: one pass, no padding, no copies of weights."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, reference
from moestro.ops.activations import activation as find
from moestro.ops.precision import compute_dtype


def expert_ffn(
    x: Float[Tensor, "t d"],
    token: Int[Tensor, "n"],
    weight: Float[Tensor, "n"],
    offsets: Int[Tensor, "e1"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"],
    widths: Sequence[int],
    activation: str,
) -> Float[Tensor, "t d"]:
    """y_t = sum over the rows n of token t of weight_n * FFN_e(x_t).

    Rows lie in expert order: expert e owns rows `offsets[e]:offsets[e+1]`. Storage is unit-major: with S the sum of
    the widths, expert e owns `widths[e]` rows of `w_out` [S, d] and, for a gated expert, twice as many rows of
    `w_in` [2S, d], its gate rows before its up rows; `w_in` [S, d] means no gate. FFN(x) = (act(G x) * (U x)) @ W_out.

    Slicing one parameter under autograd adds a full-size gradient per expert; here each expert writes its own slice
    of one buffer. Saves only `x` and the pre-activations.
    """
    dtype = compute_dtype(x)
    x, w_in, w_out, weight = (v.to(dtype) for v in (x, w_in, w_out, weight))
    if backend.active() == "reference":
        return reference.expert_ffn(x, token, weight, offsets, w_in, w_out, widths, activation)
    return _fused(x, token, weight, w_in, w_out, offsets, tuple(widths), activation)  # type: ignore[call-arg]


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
    return _ExpertFFN.apply(x, token, weight, w_in, w_out, _Plan(offsets.tolist(), widths), activation)  # type: ignore


class _Plan:
    """Where each busy expert's rows, units and pre-activations lie: (rows, units, elements of z) as slices."""

    def __init__(self, bounds: list[int], widths: tuple[int, ...]) -> None:
        units = [0, *accumulate(widths)]
        self.jobs: list[tuple[slice, slice]] = [
            (slice(bounds[e], bounds[e + 1]), slice(units[e], units[e + 1]))
            for e in range(len(widths))
            if bounds[e + 1] > bounds[e] and widths[e] > 0
        ]
        self.size = sum(_length(rows) * _length(unit) for rows, unit in self.jobs)


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token, weight, w_in, w_out, plan, activation):  # type: ignore[override]
        act = find(activation).forward
        gates = len(w_in) // max(len(w_out), 1)
        y = torch.zeros_like(x)
        z_all = x.new_empty(plan.size * gates)
        start = 0
        for rows, unit in plan.jobs:
            n, width = _length(rows), _length(unit)
            z = z_all[start : start + n * width * gates].view(n, width * gates)
            start += z.numel()
            index = token[rows]
            torch.mm(x.index_select(0, index), w_in[_scaled(unit, gates)].T, out=z)
            out = _hidden(z, width, act) @ w_out[unit]
            y.index_add_(0, index, out.mul_(weight[rows, None]))
        ctx.save_for_backward(x, token, weight, w_in, w_out, z_all)
        ctx.plan, ctx.activation = plan, activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, token, weight, w_in, w_out, z_all = ctx.saved_tensors
        act = find(ctx.activation)
        gates = len(w_in) // max(len(w_out), 1)
        dx, dweight, dw_in, dw_out = (torch.zeros_like(v) for v in (x, weight, w_in, w_out))
        start = 0
        for rows, unit in ctx.plan.jobs:
            n, width = _length(rows), _length(unit)
            z = z_all[start : start + n * width * gates].view(n, width * gates)
            start += z.numel()
            index, gate = token[rows], weight[rows, None]
            dy_rows, x_rows = dy.index_select(0, index), x.index_select(0, index)
            hidden = _hidden(z, width, act.forward)
            dhidden = dy_rows @ w_out[unit].T
            dweight[rows] = (dhidden * hidden).sum(-1)
            torch.mm(hidden.mul_(gate).T, dy_rows, out=dw_out[unit])
            dhidden.mul_(gate)
            dz = torch.empty_like(z)
            if gates == 2:
                gate_z, up_z = z[:, :width], z[:, width:]
                dz[:, :width] = act.backward(dhidden * up_z, gate_z)
                torch.mul(dhidden, act.forward(gate_z), out=dz[:, width:])
            else:
                dz.copy_(act.backward(dhidden, z))
            block = _scaled(unit, gates)
            torch.mm(dz.T, x_rows, out=dw_in[block])
            dx.index_add_(0, index, dz @ w_in[block])
        return dx, None, dweight, dw_in, dw_out, None, None


def _hidden(z: Tensor, width: int, act) -> Tensor:
    if z.shape[1] == width:
        return act(z)
    return act(z[:, :width]) * z[:, width:]


def _length(s: slice) -> int:
    return s.stop - s.start


def _scaled(s: slice, factor: int) -> slice:
    return slice(s.start * factor, s.stop * factor)
