"""`ExpertLinear`: how the matrices of many experts are stored."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ExpertLinear(nn.Module):
    """E matrices, [out_e, in_e] each. `matrices` is the definition; `forward` maps one group of rows an expert.

    `weight` are all of them in one tensor, unit-major: as `ConcatLinear` stores them and others build them.
    """

    d_model: int
    widths: tuple[int, ...]
    weight: Tensor

    @property
    def n_experts(self) -> int:
        """Number of matrices."""
        return len(self.widths)

    def matrices(self) -> Sequence[Float[Tensor, "_ _"]]:
        """The matrix of every expert."""
        raise NotImplementedError

    def forward(self, groups: Sequence[Float[Tensor, "_ _"]]) -> list[Float[Tensor, "_ _"]]:
        """groups[e] @ matrix_e.T for every expert."""
        return [rows @ matrix.T for rows, matrix in zip(groups, self.matrices(), strict=True)]

    def reindex(self, index: Int[Tensor, "m"], widths: Sequence[int]) -> None:
        """Make new expert j the old expert `index[j]`, of width `widths[j]`; -1 draws a fresh one."""
        raise NotImplementedError

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        """Parameters that hold one expert's matrix, and the rows of each that are its own."""
        raise NotImplementedError


class ConcatLinear(ExpertLinear):
    """Matrices of any widths in one unit-major tensor [blocks * S, d_model], S the sum of the widths.

    Expert e owns `blocks * widths[e]` consecutive rows, so any width aligns, one expert is a contiguous view, and
    optimizers, sharding and checkpoints see one parameter. side="in": matrix_e maps d_model to its units (the rows as
    they lie); side="out": units to d_model (the rows transposed, one block only).

    Initialisation: normal with standard deviation d_model^-0.5 for "in"; for "out" width_e^-0.5 of each expert's own
    width ("per_width"), or of the mean width for all ("shared").
    """

    weight: nn.Parameter

    def __init__(
        self,
        d_model: int,
        widths: Sequence[int],
        side: Literal["in", "out"],
        blocks: int = 1,
        init: Literal["per_width", "shared"] = "per_width",
    ) -> None:
        super().__init__()
        if side == "out" and blocks != 1:
            raise ValueError(f"blocks={blocks} with side='out', allowed: 1")
        self.d_model, self.side, self.blocks, self.init = d_model, side, blocks, init
        self.widths = tuple(widths)
        self.weight = nn.Parameter(self._fresh(self.widths))

    def matrices(self) -> list[Float[Tensor, "_ _"]]:
        views = self.weight.split([self.blocks * width for width in self.widths])
        return list(views) if self.side == "in" else [view.T for view in views]

    def rows_of(self, expert: int) -> slice:
        """The rows of the weight that are one expert's."""
        first = sum(self.widths[:expert])
        return slice(self.blocks * first, self.blocks * (first + self.widths[expert]))

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return ((self.weight, self.rows_of(expert)),)

    def reindex(self, index: Int[Tensor, "m"], widths: Sequence[int]) -> None:
        old = self.weight.detach().split([self.blocks * width for width in self.widths])
        new = self._fresh(tuple(widths)).to(self.weight).split([self.blocks * width for width in widths])
        rows = [new[j] if e < 0 else old[e] for j, e in enumerate(index.tolist())]
        self.widths = tuple(widths)
        self.weight = nn.Parameter(torch.cat(rows))

    def _fresh(self, widths: tuple[int, ...]) -> Tensor:
        rows = torch.randn(self.blocks * sum(widths), self.d_model)
        if self.side == "in":
            return rows * self.d_model**-0.5
        mean = max(1.0, sum(widths) / max(1, len(widths)))
        each = [max(1, w) if self.init == "per_width" else mean for w in widths]
        std = torch.tensor([s**-0.5 for s in each]).repeat_interleave(torch.tensor(widths), output_size=sum(widths))
        return rows * std.to(rows.device)[:, None]
