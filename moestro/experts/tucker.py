"""Factored experts in Tucker format: a small tensor between one factor for each mode."""

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.experts.factored import RankedBank, homogeneous, uniform


class TuckerBank(RankedBank):
    """W[n_1, ..., n_E, i, o] = sum C[a, m_1, ..., m_E, c] U_1[n_1, m_1] ... U_E[n_E, m_E] U_i[i, a] U_o[o, c].

    `ranks` are those of the experts' modes, of the input and of the output. Inputs are contracted with the core first,
    which costs a token the least memory. The authors' last code has no such format; it starts here as the others do:
    U_1 ~ N(1, 1), further U_e 1, U_i uniform within i^-0.5, U_o within r_o^-0.5, and the core uniform so that it keeps
    the scale of its inputs where one expert has all the weight. `core` is [r_i, product of the experts' ranks, r_o].
    """

    def add_factors(self, modes: Sequence[int]) -> None:
        further = zip(modes[1:], self.ranks[1:], strict=False)
        self.experts = nn.ParameterList([self.fresh_codes(modes[0]), *(torch.ones(n, rank) for n, rank in further)])
        *codes, inner, outer = self.ranks
        self.inputs = nn.Parameter(uniform(self.d_in + 1, inner, within=self.d_in**-0.5))
        self.outputs = nn.Parameter(uniform(self.d_out, outer, within=outer**-0.5))
        # a code has a second moment of 2 where the first mode's rows are N(1, 1)
        within = (3 / (2 * inner * prod(codes))) ** 0.5
        self.core = nn.Parameter(uniform(inner, prod(codes), outer, within=within))

    def fresh_codes(self, n: int) -> Float[Tensor, "n m"]:
        return 1 + torch.randn(n, self.ranks[0])

    def merge(self, left: Float[Tensor, "*n a"], right: Float[Tensor, "*n b"]) -> Float[Tensor, "*n ab"]:
        return (left[..., :, None] * right[..., None, :]).flatten(-2)

    def join(self, code: Float[Tensor, "n m"], z: Float[Tensor, "n a"]) -> Float[Tensor, "n c"]:
        by_code = (z @ self.core.flatten(1)).unflatten(1, self.core.shape[1:])
        return (code[:, None] @ by_code.to(code.dtype)).squeeze(1)

    def join_flops(self) -> float:
        return 2.0 * (self.core.numel() + self.core[0].numel())

    def mirrored(self) -> "TuckerBank":
        ranks = [*self.ranks[:-2], self.ranks[-1], self.ranks[-2]]
        return TuckerBank(self.d_out, self.modes, ranks, self.d_out, self.d_in)

    @staticmethod
    @torch.no_grad()
    def from_dense(
        weight: Float[Tensor, "o i"],
        bias: Float[Tensor, "o"] | None,
        modes: Sequence[int],
        ranks: Sequence[int],
        noise: float = 0.0,
    ) -> "TuckerBank":
        """Experts that are all the best approximation of a dense layer of the lower rank of input and output, exact
        where its rank is no higher.

        Each code is spread evenly over its ranks, U_1 = 1 + noise * N(0, 1). What lies beyond the rank of W starts with
        U_o = 0.
        """
        matrix = homogeneous(weight, bias)
        bank = TuckerBank(1, modes, ranks, matrix.shape[0] - 1, matrix.shape[1]).to(matrix)
        for table in bank.experts:
            table.fill_(1)
        bank.experts[0].add_(noise * torch.randn(modes[0], ranks[0]).to(matrix))
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        given = min(len(s), *ranks[-2:])
        bank.inputs[:, :given] = u[:, :given]
        bank.outputs.zero_()[:, :given] = v.T[:, :given]
        between = torch.zeros(ranks[-2], ranks[-1]).to(matrix)
        between[range(given), range(given)] = s[:given] / bank.core.shape[1]
        bank.core.copy_(between[:, None].expand_as(bank.core))
        return bank

    @staticmethod
    @torch.no_grad()
    def from_experts(matrices: Float[Tensor, "e i1 o"], ranks: Sequence[int]) -> "TuckerBank":
        """Linear experts, e_n(x) = [x; 1] matrices[n], by the singular vectors of their three unfoldings (De Lathauwer
        2000). Exact at the ranks of the unfoldings, N, i + 1 and o at most; ranks beyond those start at 0.

        Raises: ValueError for ranks that are not three.
        """
        n, d_in, d_out = matrices.shape
        bank = TuckerBank(1, [n], ranks, d_in - 1, d_out).to(matrices)
        core = matrices
        for mode, factor in enumerate((bank.experts[0], bank.inputs, bank.outputs)):
            vectors = torch.linalg.svd(matrices.transpose(0, mode).flatten(1), full_matrices=False).U
            vectors = vectors[:, : factor.shape[1]]
            factor.zero_()[:, : vectors.shape[1]] = vectors
            core = torch.einsum("abc,ar->bcr", core, factor)
        # each mode was taken from the front and put behind: experts, inputs, outputs again
        bank.core.copy_(core.transpose(0, 1))
        return bank
