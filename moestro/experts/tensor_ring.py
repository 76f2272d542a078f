"""Factored experts in tensor-ring format: a product of matrices, one for every place in every mode."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.experts.factored import RankedBank, homogeneous, uniform


class TensorRingBank(RankedBank):
    """W[n_1, ..., n_E, i, o] = trace(G_1[n_1] ... G_E[n_E] G_i[i] G_o[o]^T).

    `ranks` are r_0, r_1, ..., r_E and the last, r: G_e[n] is r_(e-1) x r_e, G_i[i] r_E x r, G_o[o] r_0 x r. r_0 = 1
    makes it a tensor train. A token costs, beside its gates, two FLOPs for each number in the cores and the products of
    matrices on its way. Starts as the authors' code does: the slices of G_1 are diagonal, N(1, 1), those of further
    modes identities, G_i uniform within i^-0.5 and G_o within (r_0 r)^-0.5.
    """

    def add_factors(self, modes: Sequence[int]) -> None:
        further = zip(modes[1:], self.ranks[1:], self.ranks[2:], strict=False)
        neutral = [torch.eye(before, after).repeat(n, 1, 1) for n, before, after in further]
        self.experts = nn.ParameterList([self.fresh_codes(modes[0]), *neutral])
        self.inputs = nn.Parameter(uniform(self.d_in + 1, *self.ranks[-2:], within=self.d_in**-0.5))
        ends = self.ranks[0], self.ranks[-1]
        self.outputs = nn.Parameter(uniform(self.d_out, *ends, within=prod(ends) ** -0.5))

    def fresh_codes(self, n: int) -> Float[Tensor, "n a b"]:
        before, after = self.ranks[:2]
        return (1 + torch.randn(n, before, 1)) * torch.eye(before, after)

    def merge(self, left: Float[Tensor, "*n a b"], right: Float[Tensor, "*n b c"]) -> Float[Tensor, "*n a c"]:
        return left @ right

    def join(self, code: Float[Tensor, "n a b"], z: Float[Tensor, "n b c"]) -> Float[Tensor, "n a c"]:
        return code @ z

    def join_flops(self) -> float:
        chain = sum(before * after for before, after in zip(self.ranks[1:], self.ranks[2:], strict=False))
        return 2.0 * self.ranks[0] * chain

    def mirrored(self) -> "TensorRingBank":
        return TensorRingBank(self.d_out, self.modes, self.ranks, self.d_out, self.d_in)

    @staticmethod
    @torch.no_grad()
    def from_dense(
        weight: Float[Tensor, "o i"],
        bias: Float[Tensor, "o"] | None,
        modes: Sequence[int],
        ranks: Sequence[int],
        noise: float = 0.0,
    ) -> "TensorRingBank":
        """Experts that are all the best approximation of a dense layer of rank r_0 r, exact where its rank is lower.

        Expert cores are identities, so that all ranks but the last must be equal; diagonals of the first get noise *
        N(0, 1). Terms beyond the rank of W start with G_o = 0.

        Raises: ValueError for other ranks.
        """
        if len(set(ranks[:-1])) != 1:
            raise ValueError(f"ranks={list(ranks)}, allowed: all but the last equal, so that experts can be identities")
        matrix = homogeneous(weight, bias)
        bank = TensorRingBank(1, modes, ranks, matrix.shape[0] - 1, matrix.shape[1]).to(matrix)
        first, last = ranks[0], ranks[-1]
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        given = min(len(s), first * last)
        # term k of the sum lies at row k // r and column k % r of both cores
        bank.inputs.flatten(1)[:, :given] = (u * s)[:, :given]
        bank.outputs.zero_().flatten(1)[:, :given] = v.T[:, :given]
        bank.experts[0].copy_(torch.eye(first).to(matrix) * (1 + noise * torch.randn(modes[0], first, 1).to(matrix)))
        return bank

    @staticmethod
    @torch.no_grad()
    def from_experts(matrices: Float[Tensor, "e i1 o"], ranks: Sequence[int]) -> "TensorRingBank":
        """Linear experts, e_n(x) = [x; 1] matrices[n], as a tensor train of ranks 1, r_1, r: truncated singular
        values of one unfolding after the other (Oseledets 2011, Algorithm 1). Exact at r_1 = min(N, (i + 1) o) and
        r = min(r_1 (i + 1), o); ranks beyond what there is start at 0.

        Raises: ValueError for ranks that do not begin with 1, or are not three.
        """
        if len(ranks) != 3 or ranks[0] != 1:
            raise ValueError(f"ranks={list(ranks)}, allowed: 1, r_1, r")
        n, d_in, d_out = matrices.shape
        bank = TensorRingBank(1, [n], ranks, d_in - 1, d_out).to(matrices)
        for core in bank.parameters():
            core.zero_()
        u, rest = _truncated(matrices.flatten(1), ranks[1])
        bank.experts[0][:, 0, : u.shape[1]] = u
        v, last = _truncated(rest.unflatten(1, (d_in, d_out)).flatten(0, 1), ranks[2])
        bank.inputs[:, : u.shape[1], : v.shape[1]] = v.unflatten(0, (u.shape[1], d_in)).transpose(0, 1)
        bank.outputs[:, 0, : last.shape[0]] = last.T
        return bank


def _truncated(matrix: Float[Tensor, "n m"], rank: int) -> tuple[Float[Tensor, "n r"], Float[Tensor, "r m"]]:
    """Two factors of its best approximation of that rank, or of its own size, the first orthonormal."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank, None] * v[:rank]
