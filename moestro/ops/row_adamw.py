"""AdamW on some rows of a table, each read and written once."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops.backend import runs_native
from moestro.ops.native import row_adamw
from moestro.ops.rounding import rounding_key, stochastic_bfloat16
from moestro.ops.row_gradients import RowGradient, spans


@dataclass(frozen=True)
class RowFactors:
    """What one step of AdamW multiplies n rows by, [n] each in the dtype of the arithmetic. `decay` is the weight
    decay's factor, `size` = -lr / (1 - beta1^count), `correction` = sqrt(1 - beta2^count); `mean` and `square` are the
    decay of the moments over skipped steps, None where they waited."""

    decay: Float[Tensor, "n"]
    size: Float[Tensor, "n"]
    correction: Float[Tensor, "n"]
    mean: Float[Tensor, "n"] | None = None
    square: Float[Tensor, "n"] | None = None

    def rows(self, start: int, stop: int) -> "RowFactors":
        """Those of some of the rows."""
        part = slice(start, stop)
        mean, square = (each if each is None else each[part] for each in (self.mean, self.square))
        return RowFactors(self.decay[part], self.size[part], self.correction[part], mean, square)


@dataclass(frozen=True)
class RowConstants:
    """What one step multiplies all rows by; `key` decides how bfloat16 is rounded in this step."""

    betas: tuple[float, float]
    eps: float
    key: int


def adamw_rows(
    table: Float[Tensor, "e d"],
    moments: tuple[Float[Tensor, "e d"], Float[Tensor, "e d"]],
    gradient: RowGradient,
    factors: RowFactors,
    constants: RowConstants,
) -> None:
    """Replace the rows of a gradient in a table and in Adam's two moments (Loshchilov 2019, arXiv:1711.05101, Alg. 2).

    In float32 at least; what is kept in bfloat16 is rounded stochastically. With native kernels each row is read and
    written once, its gradient summed on the way where it is left in factors.
    """
    kept = [moment.dtype for moment in moments]
    if runs_native(table, *moments, *gradient.tensors()) and kept == [table.dtype, torch.float32]:
        reals = map(float, (*constants.betas, constants.eps))
        numbers = (rounding_key(constants.key, 0), rounding_key(constants.key, 1), *reals)
        row_adamw.adamw_rows(table, moments, gradient.ids, gradient.native(), tuple(vars(factors).values()), numbers)
        return
    for start, stop in spans(len(gradient.ids), table.shape[1]):
        ids, values = gradient.ids[start:stop], gradient.values(start, stop)
        _adamw_piece(table, moments, ids, values, factors.rows(start, stop), constants)


def _adamw_piece(
    table: Tensor,
    moments: tuple[Tensor, Tensor],
    ids: Tensor,
    gradient: Tensor,
    factors: RowFactors,
    constants: RowConstants,
) -> None:
    """The operations of `torch.optim.adam._single_tensor_adam`, in its order."""
    (beta1, beta2), wide = constants.betas, torch.promote_types(table.dtype, torch.float32)
    rows, mean, square = (kept.index_select(0, ids).to(wide) for kept in (table, *moments))
    gradient = gradient.to(wide)
    if factors.mean is not None and factors.square is not None:
        mean.mul_(factors.mean[:, None])
        square.mul_(factors.square[:, None])
    rows.mul_(factors.decay[:, None])
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = square.sqrt().div_(factors.correction[:, None]).add_(constants.eps)
    rows.addcdiv_(factors.size[:, None] * mean, denominator)
    for number, (kept, new) in enumerate(zip((table, *moments), (rows, mean, square), strict=True)):
        kept.index_copy_(0, ids, rounded(new, ids, kept.dtype, rounding_key(constants.key, number)))


def rounded(x: Float[Tensor, "n d"], ids: Int[Tensor, "n"], dtype: torch.dtype, key: int) -> Float[Tensor, "n d"]:
    """Rows in the dtype in which they are kept."""
    return stochastic_bfloat16(x, ids, key) if dtype == torch.bfloat16 else x.to(dtype)
