"""Feed-forward experts of any widths on rows sorted by expert: one pass, no padding, no copies of weights."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import backend, reference, triton_ffn
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
    if backend.active() == "triton":
        return triton_ffn.expert_ffn(x, token, weight, offsets, w_in, w_out, tuple(widths), activation)
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
    plan = _Plan(token, len(x), offsets.tolist(), widths)
    return _ExpertFFN.apply(x, token, weight, w_in, w_out, plan, activation)  # type: ignore


class _Plan:
    """Where each busy expert's rows and units lie, and which rows belong to each token."""

    def __init__(self, token: Tensor, n_tokens: int, bounds: list[int], widths: tuple[int, ...]) -> None:
        units = [0, *accumulate(widths)]
        every = [(slice(bounds[e], bounds[e + 1]), slice(units[e], units[e + 1])) for e in range(len(widths))]
        self.jobs = [(rows, unit) for rows, unit in every if _length(rows) and _length(unit)]
        self.idle = [unit for rows, unit in every if not _length(rows)]
        self.size = sum(_length(rows) * _length(unit) for rows, unit in self.jobs)
        # experts of width 0 have rows but no job: what they would write must not be left unwritten
        self.complete = sum(_length(rows) for rows, _ in self.jobs) == len(token)
        self.by_token = token.argsort(stable=True)
        count = torch.bincount(token, minlength=n_tokens)
        self.starts = count.cumsum(0) - count

    def buffer(self, like: Tensor) -> Tensor:
        """Room for one output of every row."""
        n = len(self.by_token)
        return like.new_empty(n, like.shape[1]) if self.complete else like.new_zeros(n, like.shape[1])

    def combine(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted sum of each token's rows, always in the same order."""
        if not len(rows):
            return rows.new_zeros(len(self.starts), rows.shape[1])
        each = None if weight is None else weight[self.by_token]
        return F.embedding_bag(self.by_token, rows, self.starts, per_sample_weights=each, mode="sum")


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token, weight, w_in, w_out, plan, activation):  # type: ignore[override]
        act = find(activation).forward
        gates = len(w_in) // max(len(w_out), 1)
        out = plan.buffer(x)
        z_all = x.new_empty(plan.size * gates)
        start = 0
        for rows, unit in plan.jobs:
            n, width = _length(rows), _length(unit)
            z = z_all[start : start + n * width * gates].view(n, width * gates)
            start += z.numel()
            torch.mm(x.index_select(0, token[rows]), w_in[_scaled(unit, gates)].T, out=z)
            torch.mm(_hidden(z, width, act), w_out[unit], out=out[rows])
        ctx.save_for_backward(x, token, weight, w_in, w_out, z_all)
        ctx.plan, ctx.activation = plan, activation
        return plan.combine(out, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        x, token, weight, w_in, w_out, z_all = ctx.saved_tensors
        act = find(ctx.activation)
        gates = len(w_in) // max(len(w_out), 1)
        dx_rows = ctx.plan.buffer(x)
        dweight, dw_in, dw_out = torch.zeros_like(weight), torch.empty_like(w_in), torch.empty_like(w_out)
        for unit in ctx.plan.idle:
            dw_in[_scaled(unit, gates)] = 0
            dw_out[unit] = 0
        start = 0
        for rows, unit in ctx.plan.jobs:
            n, width = _length(rows), _length(unit)
            z = z_all[start : start + n * width * gates].view(n, width * gates)
            start += z.numel()
            index, gate = token[rows], weight[rows, None]
            dy_rows = dy.index_select(0, index)
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
            torch.mm(dz.T, x.index_select(0, index), out=dw_in[block])
            torch.mm(dz, w_in[block], out=dx_rows[rows])
        return ctx.plan.combine(dx_rows), None, dweight, dw_in, dw_out, None, None


def _hidden(z: Tensor, width: int, act) -> Tensor:
    if z.shape[1] == width:
        return act(z)
    return act(z[:, :width]) * z[:, width:]


def _length(s: slice) -> int:
    return s.stop - s.start


def _scaled(s: slice, factor: int) -> slice:
    return slice(s.start * factor, s.stop * factor)
