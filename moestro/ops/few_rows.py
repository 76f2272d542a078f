"""Feed-forward experts of rows in any order, for so few rows that sorting them costs more than it saves: decoding."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import backend, triton_ffn
from moestro.ops.activations import activation as find
from moestro.ops.ffn import unit_major, wants_gradient
from moestro.ops.glu import compiled_experts, gates_of, hidden
from moestro.ops.native.few_rows import few_rows
from moestro.ops.precision import compute_dtype

# Triton: at most one row for so many experts, vLLM's rule; beyond it, rows of one expert are worth reading together.
EXPERTS_PER_ROW = 4


def skips_sorting(n_rows: int, n_tokens: int, n_experts: int, *leaves: Tensor) -> bool:
    """Whether `few_rows_ffn` is the way for these rows, none of which may need a gradient.

    A single token meets an expert once at most, so its rows are sorted as they are. The kernels for few rows of the
    backend `triton` have to be asked for (`TritonOptions.few_rows`): they are not yet measured.
    """
    if wants_gradient(*leaves):
        return False
    if backend.active() == "triton":
        return backend.triton_options().few_rows and EXPERTS_PER_ROW * n_rows <= n_experts
    return n_tokens == 1 and backend.active() != "reference"


def few_rows_ffn(
    x: Float[Tensor, "t d"],
    token: Int[Tensor, "n"],
    expert: Int[Tensor, "n"],
    weight: Float[Tensor, "n"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"] | Float[Tensor, "e d w"],
    widths: Sequence[int],
    activation: str,
) -> Float[Tensor, "t d"]:
    """`expert_ffn` of row n for token[n] by expert[n], in any order and without gradients. Reads only the weights of
    the experts that are met, also where autocast lowers them.

    Raises: ValueError for an unknown activation, and what the backend `triton` refuses (`triton_ffn.few_rows_ffn`).
    """
    find(activation)
    dtype = compute_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    if backend.active() == "triton":
        return triton_ffn.few_rows_ffn(
            x, token, expert, weight, w_in.to(dtype), unit_major(w_out).to(dtype), tuple(widths), activation
        )
    if len(x) == 1 and compiled_experts(x, w_in, w_out, activation):
        return _read_once(x, token, expert, weight, w_in, w_out, widths)  # type: ignore[call-arg]
    return _one_after_another(x, token, expert, weight, w_in, w_out, widths, activation)  # type: ignore[call-arg]


@torch.compiler.disable
def _read_once(
    x: Tensor, token: Tensor, expert: Tensor, weight: Tensor, w_in: Tensor, w_out: Tensor, widths: Sequence[int]
) -> Tensor:
    ids = expert.tolist()
    order = torch.tensor(sorted(range(len(ids)), key=ids.__getitem__), dtype=torch.int64)
    bounds = [0, *accumulate(map(ids.count, range(len(widths))))]
    return few_rows(x, token[order], weight[order], bounds, w_in, w_out, widths)


@torch.compiler.disable
def _one_after_another(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    widths: Sequence[int],
    activation: str,
) -> Tensor:
    units = [0, *accumulate(widths)]
    gates = gates_of(w_in, w_out)
    rows = x.new_zeros(len(token), x.shape[1])
    for n, (t, e) in enumerate(zip(token.tolist(), expert.tolist(), strict=True)):
        first, last = units[e], units[e + 1]
        if last > first:
            z = x[t : t + 1] @ w_in[gates * first : gates * last].to(x.dtype).T
            middle = hidden(z, z.new_empty(1, last - first), activation)
            own = w_out[e].T if w_out.ndim == 3 else w_out[first:last]
            torch.mm(middle, own.to(x.dtype), out=rows[n : n + 1])
    # in float32 at least, as sums over a token's rows are elsewhere
    wide = torch.promote_types(x.dtype, torch.float32)
    weighted = rows.to(wide) * weight[:, None].to(wide)
    return weighted.new_zeros(x.shape).index_add_(0, token, weighted).to(x.dtype)
