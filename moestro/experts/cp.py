"""Factored experts in CP format: a sum of outer products."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moestro.experts.factored import FactoredBank, homogeneous, uniform


class CPBank(FactoredBank):
    """W[n_1, ..., n_E, i, o] = sum_r U_1[n_1, r] ... U_E[n_E, r] U_i[i, r] U_o[o, r]: a sum of `rank` outer products.

    y = ((a_1 U_1) * ... * (a_E U_E) * ([x; 1] U_i)) U_o^T, R (sum of modes + i + 1 + o) multiply-adds a token and as
    many parameters. Starts as the authors' code does: U_1 ~ N(1, 1), so that experts differ from the first step; the
    further U_e are 1, U_i uniform within i^-0.5 and U_o within R^-0.5. `d_in` and `d_out` are d_model where not given.
    """

    def __init__(
        self, d_model: int, modes: Sequence[int], rank: int, d_in: int | None = None, d_out: int | None = None
    ) -> None:
        super().__init__(modes, d_model if d_in is None else d_in, d_model if d_out is None else d_out, [rank])
        self.rank = rank
        self.experts = nn.ParameterList([self.fresh_codes(modes[0]), *(torch.ones(n, rank) for n in modes[1:])])
        self.inputs = nn.Parameter(uniform(self.d_in + 1, rank, within=self.d_in**-0.5))
        self.outputs = nn.Parameter(uniform(self.d_out, rank, within=rank**-0.5))

    def fresh_codes(self, n: int) -> Float[Tensor, "n r"]:
        return 1 + torch.randn(n, self.rank)

    def merge(self, left: Float[Tensor, "*b r"], right: Float[Tensor, "*b r"]) -> Float[Tensor, "*b r"]:
        return left * right

    def join(self, code: Float[Tensor, "n r"], z: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
        return code * z

    def mirrored(self) -> "CPBank":
        return CPBank(self.d_out, self.modes, self.rank, self.d_out, self.d_in)

    @staticmethod
    @torch.no_grad()
    def from_dense(
        weight: Float[Tensor, "o i"],
        bias: Float[Tensor, "o"] | None,
        modes: Sequence[int],
        rank: int,
        noise: float = 0.0,
    ) -> "CPBank":
        """Experts that are all the best approximation of a dense layer of this rank, exact from its rank on.

        W = U S V^T: U_i = U S, U_o = V, U_e = 1, and U_1 = 1 + noise * N(0, 1). Without noise and with gates at zero no
        gradient tells experts apart. Terms beyond the rank of W start with U_o = 0.
        """
        matrix = homogeneous(weight, bias)
        bank = CPBank(1, modes, rank, matrix.shape[0] - 1, matrix.shape[1]).to(matrix)
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        bank._set_terms((u * s)[:, :rank], v.T[:, :rank])
        for table in bank.experts:
            table.fill_(1)
        bank.experts[0].add_(noise * torch.randn_like(bank.experts[0]))
        return bank

    @staticmethod
    @torch.no_grad()
    def from_experts(matrices: Float[Tensor, "e i1 o"], rank: int, sweeps: int = 0) -> "CPBank":
        """The best approximation of linear experts, e_n(x) = [x; 1] matrices[n], in which each term belongs to one
        expert: the `rank` largest of all their singular values. Exact where no more of them are above 0, at
        N min(i + 1, o) always. Terms beyond start with U_o = 0 and are everyone's.

        From there `sweeps` rounds of alternating least squares share terms among experts: each solves for one factor
        after another with the others held fixed, so that the error never grows.
        """
        n, d_in, d_out = matrices.shape
        bank = CPBank(1, [n], rank, d_in - 1, d_out).to(matrices)
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        best = s.flatten().argsort(descending=True, stable=True)[:rank]
        bank._set_terms((u * s[:, None]).mT.flatten(0, 1)[best].T, v.flatten(0, 1)[best].T)
        owner = best // s.shape[1]
        bank.experts[0][:, : len(best)] = (torch.arange(n, device=owner.device)[:, None] == owner).to(matrices)
        for _ in range(sweeps):
            bank._sweep(matrices)
        return bank

    def _sweep(self, matrices: Float[Tensor, "e i1 o"]) -> None:
        """Each factor's least-squares solution in turn (Kolda 2009, "Tensor Decompositions and Applications", 3.4)."""
        factors = [self.experts[0], self.inputs, self.outputs]
        for place, factor in enumerate(factors):
            others = [other.double() for other in factors if other is not factor]
            unfolded = matrices.double().movedim(place, 0).flatten(1)
            product = torch.einsum("ar,br->abr", *others).flatten(0, 1)
            gram = (others[0].T @ others[0]) * (others[1].T @ others[1])
            factor.copy_(unfolded @ product @ torch.linalg.pinv(gram, hermitian=True))

    def _set_terms(self, inputs: Float[Tensor, "i1 r"], outputs: Float[Tensor, "o r"]) -> None:
        """The first terms; further ones keep the inputs they started with and put nothing out."""
        given = inputs.shape[1]
        self.inputs[:, :given] = inputs
        self.outputs.zero_()[:, :given] = outputs
