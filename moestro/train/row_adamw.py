"""AdamW on the rows that a step touched: its cost does not know how many rows the table has."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from moestro.ops.quantized import QuantizedTable
from moestro.ops.rounding import rounding_key
from moestro.ops.row_adamw import RowState, RowStep, adamw_rows
from moestro.ops.row_gradients import RowGradient, forget_factors, row_gradient
from moestro.ops.tables import new_table

SKIPPED = ("keep", "decay")


class RowAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov 2019, arXiv:1711.05101) for tables whose gradients are sparse over rows (`torch.sparse_coo`).

    A step reads and writes the rows in the gradient and no others. For such a row it does what `torch.optim.AdamW`
    does, in the same arithmetic: where every step has every row, the results are the same. In float32 they are the
    same to the bit as those of torch's plain and foreach kernels (the fused one rounds elsewhere), but for square roots
    where native kernels run: theirs are correctly rounded, torch's need not be. In float64 powers of beta, taken for
    every row, may differ in the last bit. What differs is what becomes of a row while it is skipped:

    - *Position*: dense AdamW goes on moving it by stale momentum; here it stays where it is.
    - *Weight decay*: none is lost. The product of (1 - lr * weight_decay) over all steps skipped, each with its own
      learning rate, is charged when the row is next touched, before that step's own update. Until then the row is read
      without it.
    - *Moments*: with `skipped="keep"` (lazy Adam) they wait: the row's bias corrections count the steps that touched
      it, as if Adam had been run on those steps alone. With `skipped="decay"` they decay by beta for each step skipped
      and bias corrections count all steps: the moments are those of dense AdamW given zero gradients.

    Arithmetic is in float32 at least. Tables in bfloat16 are rounded stochastically (`ops.rounding`) by a hash of step,
    table, row and column: changes far below the table's precision still count, and a resumed run rounds alike. So are
    tables in 8 bits: `quantized` says of codes among the parameters which table they are of.

    State, beside the parameter, and in files where tables are (`ops.tables`): `exp_avg` [N, d], in bfloat16 where the
    table is or is narrower, else in float32 at least; `exp_avg_sq` [N, d], in float32 at least; `clock` [N], the steps
    that touched a row (keep) or the last step that did (decay); `charged` [N], the logarithm of the decay that a row
    has had; `step` and `log_decay` of the table. A parameter without a gradient skips the step, as in torch.

    Raises: ValueError for impossible values, for a gradient that is not sparse over rows, and for
    lr * weight_decay >= 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        skipped: Literal["keep", "decay"] = "keep",
        quantized: Mapping[Tensor, QuantizedTable] | None = None,
    ) -> None:
        if skipped not in SKIPPED:
            raise ValueError(f"skipped={skipped!r}, allowed: {', '.join(SKIPPED)}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={list(betas)}, allowed: two numbers in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.skipped, self.quantized = skipped, dict(quantized or {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        number = 0
        for group in self.param_groups:
            if group["lr"] * group["weight_decay"] >= 1:
                raise ValueError(f"lr={group['lr']} * weight_decay={group['weight_decay']}: must be below 1")
            for parameter in group["params"]:
                number += 1
                gradient = row_gradient(parameter)
                if gradient is not None:
                    self._update(parameter, gradient, group, number)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, factors included."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                forget_factors(parameter)

    @torch.no_grad()
    def reset_rows(self, parameter: Tensor, rows: slice | int) -> None:
        """Make these rows as if they had never been met: no moments, and no decay that is still to be charged."""
        if state := self.state.get(parameter):
            for name in ("exp_avg", "exp_avg_sq", "clock"):
                state[name][rows] = 0
            state["charged"][rows] = state["log_decay"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every entry keeps its own dtype, and large ones are copied once."""
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, entries in state_dict["state"].items():
            own = self._state_of(order[index])
            for key, value in own.items():
                value.copy_(entries[key])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            (n_rows, width), dtype, device = parameter.shape, parameter.dtype, parameter.device
            wide = torch.promote_types(dtype, torch.float32)
            narrow = dtype == torch.bfloat16 or parameter in self.quantized
            state["exp_avg"] = new_table(n_rows, width, torch.bfloat16 if narrow else wide, device)
            state["exp_avg_sq"] = new_table(n_rows, width, wide, device)
            state["clock"] = torch.zeros(n_rows, dtype=torch.int32, device=device)
            state["charged"] = torch.zeros(n_rows, dtype=torch.float64, device=device)
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["log_decay"] = torch.zeros((), dtype=torch.float64)
        return state

    def _update(self, parameter: Tensor, gradient: RowGradient, group: dict[str, Any], table: int) -> None:
        state = self._state_of(parameter)
        state["step"] += 1
        step = RowStep(
            number := int(state["step"]),
            *(group[name] for name in ("lr", "weight_decay", "betas", "eps")),
            log_decay=float(state["log_decay"]),
            moments_wait=self.skipped == "keep",
            key=rounding_key(number, table),
        )
        kept = RowState(state["exp_avg"], state["exp_avg_sq"], state["clock"], state["charged"])
        adamw_rows(self.quantized.get(parameter, parameter), kept, gradient, step)
        state["log_decay"].fill_(step.log_decay_after)
