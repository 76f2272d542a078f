"""Feed-forward experts as matrix-product operators with one central tensor for all of them."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Cost
from moestro.experts.ffn import FFNBank, FFNExperts
from moestro.experts.linears import ConcatLinear, ExpertLinear
from moestro.experts.shared import SharedExpert
from moestro.ops.mpo import mpo_bonds, mpo_cores, mpo_factors, mpo_flops, mpo_matrix, padded
from moestro.ops.precision import at_least_fp32, without_autocast
from moestro.ops.reindexed import reindexed
from moestro.routing import Routing

Factors = tuple[tuple[int, ...], tuple[int, ...]]


class MPOLinear(ExpertLinear):
    """Matrices W_e [width, d_model] = T1_e .. C .. Tn_e: chains of cores, of which the middle one, C, is the same for
    all experts and the others, auxiliary, are an expert's own (Gao 2022, MPOE, arXiv:2203.01104).

    `factors` are the factors of the width and of d_model. As in `ConcatLinear`, side="in" maps d_model to units,
    "out" units to d_model, and `blocks` matrices an expert lie one after the other. `outer` [e, blocks, a, i, j, b]
    are the auxiliary cores in order, `central` [1, blocks, a, i, j, b] is held once. Auxiliary cores start as random
    isometries and C normal, so that every matrix starts normal with variance 1 / (its inputs), and all differ.
    """

    def __init__(
        self,
        n_experts: int,
        factors: Factors,
        side: Literal["in", "out"],
        blocks: int = 1,
        most_bond: int | None = None,
    ) -> None:
        super().__init__()
        rows, columns = factors
        self.factors, self.side, self.blocks = factors, side, blocks
        self.d_model, self.width = math.prod(columns), math.prod(rows)
        self.widths, self.middle = (self.width,) * n_experts, len(rows) // 2
        bonds = mpo_bonds(rows, columns, most_bond)
        shapes = list(zip(bonds, rows, columns, bonds[1:], strict=False))
        cores = [self._isometries(n_experts, shape, k < self.middle) for k, shape in enumerate(shapes)]
        del cores[self.middle]
        self.outer = nn.ParameterList(cores)
        fan_in = self.d_model if side == "in" else self.width
        before, after = mpo_bonds(rows, columns)[self.middle : self.middle + 2]
        std = (before * after / (shapes[self.middle][0] * shapes[self.middle][3] * fan_in)) ** 0.5
        self.central = nn.Parameter(torch.randn(1, blocks, *shapes[self.middle]) * std)
        self._kept: Tensor | None = None
        self._made_of: tuple = ()

    def _isometries(self, n_experts: int, shape: Sequence[int], left: bool) -> Tensor:
        """Cores whose columns (left of the middle) or rows (right of it) are orthonormal."""
        a, i, j, b = shape
        rows, columns = (a * i * j, b) if left else (i * j * b, a)
        q = torch.linalg.qr(torch.randn(n_experts, self.blocks, rows, min(rows, columns))).Q
        return (q if left else q.mT).reshape(n_experts, self.blocks, *shape).contiguous()

    def cores(self) -> list[Float[Tensor, "_ _ _ _ _ _"]]:
        """Auxiliary cores of all experts, with the central one in the middle."""
        return [*self.outer[: self.middle], self.central, *self.outer[self.middle :]]

    @property
    def weight(self) -> Float[Tensor, "_ d"]:  # type: ignore[override]
        """All matrices, unit-major, built from the cores in the cores' own precision. Without gradients and in
        evaluation they are kept until a core changes."""
        if self.training or torch.is_grad_enabled():
            return self._built()
        now = tuple((p.data_ptr(), p._version, p.dtype) for p in self.parameters())
        if self._kept is None or now != self._made_of:
            self._kept, self._made_of = self._built(), now
        return self._kept

    def train(self, mode: bool = True) -> "MPOLinear":
        """Also forgets what was kept: not every optimizer tells that it changed a core."""
        self._kept = None
        return super().train(mode)

    def _built(self) -> Float[Tensor, "_ d"]:
        with without_autocast(self.central):
            return mpo_matrix(self.cores()).flatten(0, 2)

    def matrices(self) -> list[Float[Tensor, "_ _"]]:
        views = self.weight.unflatten(0, (self.n_experts, -1)).unbind()
        return list(views) if self.side == "in" else [view.T for view in views]

    def build_flops(self) -> float:
        """FLOPs of building all matrices."""
        return self.n_experts * self.blocks * mpo_flops([core.shape[2:] for core in self.cores()])

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        return tuple((core, slice(expert, expert + 1)) for core in self.outer)

    def reindex(self, index: Int[Tensor, "m"], widths: Sequence[int]) -> None:
        """As in the base class; all widths are this one's. A fresh expert starts with isometries of its own."""
        for place, old in enumerate(self.outer):
            fresh = self._isometries(len(index), old.shape[2:], place < self.middle)
            self.outer[place] = nn.Parameter(reindexed(old, index, fresh))
        self.widths = (self.width,) * len(index)

    @torch.no_grad()
    def set_all(self, matrices: Float[Tensor, "blocks w d"], most_bond: int | None) -> None:
        """Make every expert's matrices these, or their best approximation with bonds of at most `most_bond`, in the
        balanced gauge; bonds become those of the decomposition, which is made in float32 at least."""
        blocks = [mpo_cores(at_least_fp32(matrix), *self.factors, most_bond) for matrix in matrices]
        bonds = [max(core.shape[3] for core in same) for same in zip(*blocks, strict=True)]
        stacked = [
            torch.stack([padded(core, before, after) for core in same]).to(matrices.dtype)
            for same, before, after in zip(zip(*blocks, strict=True), [1, *bonds], bonds, strict=False)
        ]
        self.central = nn.Parameter(stacked.pop(self.middle)[None])
        self.outer = nn.ParameterList([core.expand(self.n_experts, *core.shape).clone() for core in stacked])


class MPOBank(FFNExperts):
    """Feed-forward experts of one width whose matrices share their central tensors (Gao 2022, MPOE, arXiv:2203.01104).

    A matrix [width, d_model] is a chain of cores for `width_factors` and `d_factors` (as many numbers each, three at
    least, whose products are the sizes; five of `ops.mpo.mpo_factors` where not given), with bonds of at most
    `most_bond`. Per projection there are |C| + n_experts * |auxiliary| parameters instead of n_experts * width *
    d_model. Gate and up projection are matrices of their own. All matrices are built once a forward: the work on rows
    is that of `FFNBank`.

    Raises: ValueError for factors that do not give the sizes.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        width: int,
        activation: str = "silu",
        glu: bool = True,
        width_factors: Sequence[int] | None = None,
        d_factors: Sequence[int] | None = None,
        most_bond: int | None = None,
    ) -> None:
        if n_experts < 1 or width < 1 or (most_bond is not None and most_bond < 1):
            raise ValueError(f"n_experts={n_experts}, width={width}, most_bond={most_bond}, allowed: at least 1")
        rows = mpo_factors(width) if width_factors is None else tuple(width_factors)
        columns = mpo_factors(d_model) if d_factors is None else tuple(d_factors)
        if (math.prod(rows), math.prod(columns)) != (width, d_model) or not 3 <= len(rows) == len(columns):
            raise ValueError(
                f"width_factors={list(rows)}, d_factors={list(columns)}, allowed: as many numbers each, at least "
                f"three, with products width={width} and d_model={d_model}"
            )
        w_in = MPOLinear(n_experts, (rows, columns), "in", 2 if glu else 1, most_bond)
        super().__init__(w_in, MPOLinear(n_experts, (rows, columns), "out", 1, most_bond), activation, glu)
        self.most_bond = most_bond

    def own_parameters(self) -> float:
        return sum(core.numel() for linear in self._linears() for core in linear.outer) / self.n_experts

    def shared_parameters(self) -> float:
        return float(sum(linear.central.numel() for linear in self._linears()))

    def flops(self, routing: Routing) -> Cost:
        """Of the rows, and, while training, of building the matrices."""
        build = sum(linear.build_flops() for linear in self._linears())
        return super().flops(routing) + Cost.exact(build if self.training else 0.0)

    def _linears(self) -> list[MPOLinear]:
        return [self.w_in, self.w_out]  # type: ignore[list-item]

    @staticmethod
    @torch.no_grad()
    def from_dense(
        expert: SharedExpert,
        n_experts: int,
        width_factors: Sequence[int] | None = None,
        d_factors: Sequence[int] | None = None,
        most_bond: int | None = None,
    ) -> "MPOBank":
        """Experts that are all this dense feed-forward network, exactly without `most_bond`: what the authors' code
        starts from. Then only who is routed where tells experts apart.

        Raises: ValueError for a network with biases.
        """
        if expert.w_in.bias is not None:
            raise ValueError("this network has biases, which matrix-product operators have not")
        sizes = (expert.d_model, n_experts, expert.width, expert.activation, expert.glu)
        bank = MPOBank(*sizes, width_factors, d_factors, most_bond).to(expert.w_in.weight)
        w_in, w_out = bank._linears()
        w_in.set_all(expert.w_in.weight.unflatten(0, (w_in.blocks, -1)), most_bond)
        w_out.set_all(expert.w_out.weight.T[None], most_bond)
        return bank

    @torch.no_grad()
    def unshared(self) -> FFNBank:
        """The same experts with matrices of their own."""
        bank = FFNBank(self.w_out.d_model, self.widths, self.activation, self.glu).to(self.w_out.weight)
        for theirs, ours in ((bank.w_in, self.w_in), (bank.w_out, self.w_out)):
            if isinstance(theirs, ConcatLinear):
                theirs.weight.copy_(ours.weight)
        return bank
