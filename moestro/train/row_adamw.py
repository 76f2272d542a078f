"""AdamW on the rows that a step touched: its cost does not know how many rows the table has."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moestro.ops.huge_pages import request_huge_pages

# Numbers of a table updated at a time: few enough to stay in a core's cache.
CHUNK = 2**17
SKIPPED = ("keep", "decay")


class RowAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov 2019, arXiv:1711.05101) for tables whose gradients are sparse over rows (`torch.sparse_coo`).

    A step reads and writes the rows in the gradient and no others. For such a row it does what `torch.optim.AdamW`
    does, in the same arithmetic: where every step has every row, the results are the same. In float32 they are the
    same to the bit as those of torch's plain and foreach kernels (the fused one rounds elsewhere); in float64 powers of
    beta, taken for every row, may differ in the last bit. What differs is what becomes of a row while it is skipped:

    - *Position*: dense AdamW goes on moving it by stale momentum; here it stays where it is.
    - *Weight decay*: none is lost. The product of (1 - lr * weight_decay) over all steps skipped, each with its own
      learning rate, is charged when the row is next touched, before that step's own update. Until then the row is read
      without it.
    - *Moments*: with `skipped="keep"` (lazy Adam) they wait: the row's bias corrections count the steps that touched
      it, as if Adam had been run on those steps alone. With `skipped="decay"` they decay by beta for each step skipped
      and bias corrections count all steps: the moments are those of dense AdamW given zero gradients.

    State, beside the parameter: `exp_avg`, `exp_avg_sq` [N, d], in float32 at least, as is all arithmetic; `clock`
    [N], the steps that touched a row (keep) or the last step that did (decay); `charged` [N], the logarithm of the
    decay that a row has had; `step` and `log_decay` of the table. A parameter without a gradient skips the step, as in
    torch.

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
    ) -> None:
        if skipped not in SKIPPED:
            raise ValueError(f"skipped={skipped!r}, allowed: {', '.join(SKIPPED)}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={list(betas)}, allowed: two numbers in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.skipped = skipped

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        for group in self.param_groups:
            if group["lr"] * group["weight_decay"] >= 1:
                raise ValueError(f"lr={group['lr']} * weight_decay={group['weight_decay']}: must be below 1")
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

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
            n_rows, device = len(parameter), parameter.device
            wide = torch.promote_types(parameter.dtype, torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                # on the CPU not yet written, so that huge pages can still be had
                state[name] = torch.zeros(parameter.shape, dtype=wide, device=device)
                request_huge_pages(state[name])
            state["clock"] = torch.zeros(n_rows, dtype=torch.int32, device=device)
            state["charged"] = torch.zeros(n_rows, dtype=torch.float64, device=device)
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["log_decay"] = torch.zeros((), dtype=torch.float64)
        return state

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        ids, values = rows_of(parameter)
        state = self._state_of(parameter)
        size = max(1, CHUNK // max(1, parameter.shape[1]))
        state["step"] += 1
        for some, gradient in zip(ids.split(size), values.split(size), strict=True):
            self._update_rows(parameter, some, gradient, state, group)
        state["log_decay"] += self._log_factor(group)

    def _update_rows(
        self, parameter: Tensor, ids: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        """The operations of `torch.optim.adam._single_tensor_adam`, in its order; its scalars differ from row to
        row."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        mean, square = (state[name].index_select(0, ids) for name in ("exp_avg", "exp_avg_sq"))
        rows, gradient = parameter.index_select(0, ids).to(mean.dtype), gradient.to(mean.dtype)
        count = self._tick(ids, state, mean, square, (beta1, beta2))
        rows.mul_(column(self._decay(ids, state, group), rows))
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        correction = column((1 - beta2**count).sqrt(), rows)
        denominator = square.sqrt().div_(correction).add_(group["eps"])
        size = column(-lr / (1 - beta1**count), rows)
        rows.addcdiv_(size * mean, denominator)
        parameter.index_copy_(0, ids, rows.to(parameter.dtype))
        state["exp_avg"].index_copy_(0, ids, mean)
        state["exp_avg_sq"].index_copy_(0, ids, square)

    def _tick(
        self, ids: Tensor, state: dict[str, Tensor], mean: Tensor, square: Tensor, betas: tuple[float, float]
    ) -> Tensor:
        """Move the rows' clocks to this step and their moments past the steps skipped; returns the steps that their
        bias corrections count."""
        before, step = state["clock"].index_select(0, ids), int(state["step"])
        if self.skipped == "keep":
            now = before + 1
        else:
            now = torch.full_like(before, step)
            idle = (now - before - 1).double()
            mean.mul_(column(betas[0] ** idle, mean))
            square.mul_(column(betas[1] ** idle, square))
        state["clock"].index_copy_(0, ids, now)
        return now.double()

    def _decay(self, ids: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """The decay of the steps skipped times that of this one; exactly 1 - lr * weight_decay where none was."""
        before = float(state["log_decay"])
        pending = (before - state["charged"].index_select(0, ids)).exp()
        state["charged"].index_fill_(0, ids, before + self._log_factor(group))
        return pending * (1 - group["lr"] * group["weight_decay"])

    def _log_factor(self, group: dict[str, Any]) -> float:
        return math.log1p(-group["lr"] * group["weight_decay"])


def rows_of(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """Ids, ascending and each once, and values of a parameter's row gradient, after which `.grad` is coalesced too.

    torch forgets, when it accumulates gradients, that they were coalesced; where the ids still ascend, that is
    restored without a copy.

    Raises: ValueError where the gradient is not sparse over rows.
    """
    grad = parameter.grad
    if grad is None or grad.layout != torch.sparse_coo or (grad.sparse_dim(), grad.dense_dim()) != (1, 1):
        kind = "none" if grad is None else str(grad.layout)
        raise ValueError(f"RowAdamW needs gradients that are sparse over rows (torch.sparse_coo), got {kind}")
    if not grad.is_coalesced():
        ids, values = grad._indices(), grad._values()
        if bool((ids[0, 1:] > ids[0, :-1]).all()):
            grad = torch.sparse_coo_tensor(ids, values, grad.shape, is_coalesced=True, check_invariants=False)
        else:
            grad = grad.coalesce()
        parameter.grad = grad
    return grad._indices()[0], grad._values()


def column(each: Tensor, like: Tensor) -> Tensor:
    """A number for every row, in the dtype of the rows."""
    return each.to(like.dtype)[:, None]
