"""AdamW on some rows of a table, each read and written once."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops.backend import NATIVE_DTYPES, active, runs_native
from moestro.ops.native import row_adamw
from moestro.ops.quantized import QuantizedTable
from moestro.ops.rounding import rounding_key, stochastic_bfloat16
from moestro.ops.row_gradients import RowGradient, spans
from moestro.ops.triton_ffn import interprets


class RowState(NamedTuple):
    """What AdamW keeps of each row of a table: both moments, `clock`, the steps that touched it (or the last step that
    did, where moments do not wait), and `charged`, the logarithm of the weight decay that it has had."""

    mean: Float[Tensor, "e d"]
    square: Float[Tensor, "e d"]
    clock: Int[Tensor, "e"]
    charged: Float[Tensor, "e"]


@dataclass(frozen=True)
class RowStep:
    """One step of AdamW on a table, the `number`th, counted from 1. `log_decay` is the logarithm of the weight decay of
    all steps before; with `moments_wait` a row's moments stay as they are while it is skipped, else they decay as if
    its gradients had been 0; `key` decides how bfloat16 is rounded."""

    number: int
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    log_decay: float
    moments_wait: bool
    key: int

    @property
    def decay(self) -> float:
        """What this step alone multiplies weights by."""
        return 1 - self.lr * self.weight_decay

    @property
    def log_decay_after(self) -> float:
        """`log_decay` of the step after this one."""
        return self.log_decay + math.log1p(-self.lr * self.weight_decay)


@dataclass(frozen=True)
class RowFactors:
    """What a step multiplies n rows by, [n, 1] each in the dtype of the arithmetic. `decay` is the weight decay's
    factor, `size` = -lr / (1 - beta1^count), `correction` = sqrt(1 - beta2^count); `mean` and `square` are the decay of
    the moments over skipped steps, None where they wait."""

    decay: Float[Tensor, "n 1"]
    size: Float[Tensor, "n 1"]
    correction: Float[Tensor, "n 1"]
    mean: Float[Tensor, "n 1"] | None = None
    square: Float[Tensor, "n 1"] | None = None

    def rows(self, start: int, stop: int) -> "RowFactors":
        """Those of some of the rows."""
        part = slice(start, stop)
        mean, square = (each if each is None else each[part] for each in (self.mean, self.square))
        return RowFactors(self.decay[part], self.size[part], self.correction[part], mean, square)


def adamw_rows(
    table: Float[Tensor, "e d"] | QuantizedTable, state: RowState, gradient: RowGradient, step: RowStep
) -> None:
    """Replace the rows of a gradient in a table and in what AdamW keeps of them (Loshchilov 2019, arXiv:1711.05101,
    Alg. 2).

    In float32 at least; what is kept in bfloat16 or in 8 bits is rounded stochastically. With native kernels each row
    is read and written once, its gradient summed on the way where it is left in factors; so it is with Triton's.
    """
    moments = state.mean, state.square
    if _runs_native(table, moments, gradient):
        codes, scale = (table.codes, table.scale) if isinstance(table, QuantizedTable) else (table, None)
        keys = rounding_key(step.key, 0), rounding_key(step.key, 1)
        reals = *step.betas, step.eps, step.lr, step.decay, step.log_decay, step.log_decay_after
        numbers = (*keys, step.number, int(step.moments_wait), *map(float, reals))
        row_adamw.adamw_rows(codes, scale, tuple(state), gradient.ids, gradient.native(), numbers)
        return
    factors = _factors(gradient.ids, state, step)
    if _runs_triton(table, moments):
        from moestro.ops.triton_peer_adamw import adamw_rows as in_one_kernel

        in_one_kernel(table, moments, gradient, factors, step)
        return
    _adamw_in_pieces(table, moments, gradient, factors, step)


def _runs_native(table: Tensor | QuantizedTable, moments: tuple[Tensor, Tensor], gradient: RowGradient) -> bool:
    numbers = table.scale if isinstance(table, QuantizedTable) else table
    return _kept_as_kernels_do(table, moments) and runs_native(numbers, *moments, *gradient.tensors())


def _runs_triton(table: Tensor | QuantizedTable, moments: tuple[Tensor, Tensor]) -> bool:
    """Tables elsewhere than the kernel can reach, as those that are offloaded, go the plain way."""
    return active() == "triton" and _kept_as_kernels_do(table, moments) and (moments[0].is_cuda or interprets())


def _kept_as_kernels_do(table: Tensor | QuantizedTable, moments: tuple[Tensor, Tensor]) -> bool:
    """The first moment is in the dtype of the table, float32 or bfloat16, or beside codes in bfloat16; scales and the
    second moment are in float32."""
    if isinstance(table, QuantizedTable):
        numbers, first = table.scale.dtype == torch.float32, torch.bfloat16
    else:
        numbers, first = table.dtype in NATIVE_DTYPES, table.dtype
    return numbers and [moment.dtype for moment in moments] == [first, torch.float32]


def _factors(ids: Tensor, state: RowState, step: RowStep) -> RowFactors:
    """Move the rows' clocks to this step; returns what it multiplies the rows by."""
    beta1, beta2 = step.betas
    before = state.clock.index_select(0, ids)
    now = before + 1 if step.moments_wait else torch.full_like(before, step.number)
    pending = (step.log_decay - state.charged.index_select(0, ids)).exp()
    state.clock.index_copy_(0, ids, now)
    state.charged.index_fill_(0, ids, step.log_decay_after)
    count, idle = now.double(), (now - before - 1).double()
    # exactly the decay of one step where no row was skipped
    each = [pending * step.decay, -step.lr / (1 - beta1**count), (1 - beta2**count).sqrt()]
    each += [] if step.moments_wait else [beta1**idle, beta2**idle]
    return RowFactors(*(numbers.to(state.square.dtype)[:, None] for numbers in each))


def _adamw_in_pieces(
    table: Tensor | QuantizedTable,
    moments: tuple[Tensor, Tensor],
    gradient: RowGradient,
    factors: RowFactors,
    step: RowStep,
) -> None:
    for start, stop in spans(len(gradient.ids), moments[0].shape[1], moments[0].device):
        ids, values = gradient.ids[start:stop], gradient.values(start, stop)
        _adamw_piece(table, moments, ids, values, factors.rows(start, stop), step)


def _adamw_piece(
    table: Tensor | QuantizedTable,
    moments: tuple[Tensor, Tensor],
    ids: Tensor,
    gradient: Tensor,
    factors: RowFactors,
    step: RowStep,
) -> None:
    """The operations of `torch.optim.adam._single_tensor_adam`, in its order."""
    (beta1, beta2), wide = step.betas, moments[1].dtype
    mean, square = (kept.index_select(0, ids).to(wide) for kept in moments)
    in_codes = isinstance(table, QuantizedTable)
    rows = table.rows(ids, wide) if in_codes else table.index_select(0, ids).to(wide)
    gradient = gradient.to(wide)
    if factors.mean is not None and factors.square is not None:
        mean.mul_(factors.mean)
        square.mul_(factors.square)
    rows.mul_(factors.decay)
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = square.sqrt().div_(factors.correction).add_(step.eps)
    rows.addcdiv_(factors.size * mean, denominator)
    for number, (kept, new) in enumerate(zip((table, *moments), (rows, mean, square), strict=True)):
        key = rounding_key(step.key, number)
        if isinstance(kept, QuantizedTable):
            kept.replace_rows(ids, new, key)
        else:
            kept.index_copy_(0, ids, rounded(new, ids, kept.dtype, key))


def rounded(x: Float[Tensor, "n d"], ids: Int[Tensor, "n"], dtype: torch.dtype, key: int) -> Float[Tensor, "n d"]:
    """Rows in the dtype in which they are kept."""
    return stochastic_bfloat16(x, ids, key) if dtype == torch.bfloat16 else x.to(dtype)
