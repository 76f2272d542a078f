"""Linear experts that share the factors of one tensor: their matrices are never built."""

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Cost, Kept
from moestro.experts.base import ExpertBank
from moestro.ops.reindexed import reindexed
from moestro.routing import Routing, SlotRouting, SoftRouting, SparseRouting


class FactoredBank(ExpertBank):
    """e_n(x) = [x; 1] W[n], the slices of one tensor W [N_1, ..., N_E, i + 1, o] that exists as its factors only
    (Oldfield 2024, muMoE, arXiv:2402.12550). Experts are numbered row by row, the last mode fastest.

    In every format W is linear in a short *code* of the expert, the product (`merge`) of a row from each mode's table:

        y = W_o . vec(join(sum_n a_n code_n, [x; 1] W_i))

    so that a token of any routing costs one mixture of codes and one pass through the shared factors. Where gates come
    mode by mode (`SoftRouting.modes`), codes are mixed mode by mode, at a cost that grows with sum(modes) instead of
    their product. `experts[m]` [N_m, ...], `inputs` [i + 1, ...] (the last row is the bias) and `outputs` [o, ...] are
    the factors. Linear experts have no hidden units: width 0.

    Raises: ValueError for impossible sizes.
    """

    def __init__(self, modes: Sequence[int], d_in: int, d_out: int, ranks: Sequence[int]) -> None:
        super().__init__()
        if not modes or min(modes) < 1:
            raise ValueError(f"modes={list(modes)}, allowed: at least one mode, each of at least one expert")
        if min(ranks) < 1:
            raise ValueError(f"ranks={list(ranks)}, allowed: at least 1")
        if d_in < 1 or d_out < 1:
            raise ValueError(f"d_in={d_in}, d_out={d_out}, allowed: at least 1")
        self.d_in, self.d_out = d_in, d_out

    experts: nn.ParameterList
    inputs: nn.Parameter
    outputs: nn.Parameter

    def merge(self, left: Float[Tensor, "..."], right: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The code of (n_1, n_2) from those of both; any number of equal dimensions before."""
        raise NotImplementedError

    def join(self, code: Float[Tensor, "n ..."], z: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """What goes into the last factor, from a code and a projected input for every row."""
        raise NotImplementedError

    def join_flops(self) -> float:
        """Forward FLOPs of `join` for one row, but for products by elements."""
        return 0.0

    @property
    def modes(self) -> tuple[int, ...]:
        """Experts in every mode."""
        return tuple(len(table) for table in self.experts)

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return math.prod(self.modes)

    def codes(self, expert: Int[Tensor, "n"]) -> Float[Tensor, "n ..."]:
        """The code of every row's expert."""
        places = torch.unravel_index(expert, self.modes)
        return reduce(self.merge, [table[at] for table, at in zip(self.experts, places, strict=True)])

    def matrices(self) -> Float[Tensor, "e i1 o"]:
        """W, which nothing else builds: e_n(x) = [x; 1] W[n]. For reading, conversions and tests."""
        return torch.stack([self.matrix(n) for n in range(self.n_experts)])

    def matrix(self, expert: int) -> Float[Tensor, "i1 o"]:
        """W[n] of one expert."""
        code = self.codes(torch.full((len(self.inputs),), expert, device=self.inputs.device))
        return self._out(self.join(code, self.inputs))

    def run(self, z: Float[Tensor, "n i"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n o"]:
        return self._finish(self.codes(self.expert_of_rows(offsets, len(z))), z)

    def forward(self, x: Float[Tensor, "t i"], routing: Routing) -> Float[Tensor, "t o"]:
        if self._by_rows(routing):
            return super().forward(x, routing)
        return self._finish(self._mixture(routing), x)

    def _mixture(self, routing: Routing) -> Float[Tensor, "t ..."]:
        """sum_n a_n code_n for every token."""
        if isinstance(routing, SparseRouting):
            codes = self.codes(routing.expert)
            weight = routing.weight.to(codes.dtype).view(-1, *[1] * (codes.ndim - 1))
            return codes.new_zeros(routing.n_tokens, *codes.shape[1:]).index_add(0, routing.token, codes * weight)
        if self._mode_by_mode(routing):
            gates = routing.modes  # type: ignore[attr-defined]
            return reduce(self.merge, [_mixed(a, table) for a, table in zip(gates, self.experts, strict=True)])
        every = torch.arange(self.n_experts, device=self.inputs.device)
        return _mixed(routing.dense(), self.codes(every))

    def _by_rows(self, routing: Routing) -> bool:
        """Whether rows are slots, or fewer than tokens: then each goes through the shared factors by itself."""
        return isinstance(routing, SlotRouting) or routing.n_rows < routing.n_tokens

    def _mode_by_mode(self, routing: Routing) -> bool:
        return isinstance(routing, SoftRouting) and tuple(mode.shape[1] for mode in routing.modes) == self.modes

    def _finish(self, code: Float[Tensor, "n ..."], x: Float[Tensor, "n i"]) -> Float[Tensor, "n o"]:
        inputs = self.inputs.flatten(1)
        z = torch.addmm(inputs[-1], x, inputs[:-1]).unflatten(1, self.inputs.shape[1:])
        return self._out(self.join(code, z))

    def _out(self, hidden: Float[Tensor, "n ..."]) -> Float[Tensor, "n o"]:
        return F.linear(hidden.flatten(1), self.outputs.flatten(1))

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        """Its code, where there is one mode; all else, and all of several modes, is shared with other experts."""
        return ((self.experts[0], slice(expert, expert + 1)),) if len(self.experts) == 1 else ()

    def own_parameters(self) -> float:
        return float(self.experts[0][0].numel()) if len(self.experts) == 1 else 0.0

    def shared_parameters(self) -> float:
        return sum(p.numel() for p in self.parameters()) - self.n_experts * self.own_parameters()

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Move the experts of a single mode; a fresh one is drawn as at the start.

        Raises: ValueError for more modes: there an expert is named by its place in each, and not free to move.
        """
        if len(self.experts) > 1:
            raise ValueError("an expert of several modes is named by its place in the grid and cannot be moved")
        self.experts[0] = nn.Parameter(reindexed(self.experts[0], index, self.fresh_codes(len(index))))

    def fresh_codes(self, n: int) -> Float[Tensor, "n ..."]:
        """Rows for the first mode's table, drawn as at the start."""
        raise NotImplementedError

    def mirrored(self) -> "FactoredBank":
        """A fresh bank of the same format, modes and ranks that maps the other way, d_out to d_in."""
        raise NotImplementedError

    def row_flops(self) -> float:
        """One row through the shared factors and its part in a token's mixture of codes."""
        return 2.0 * self._code_size() + self._shared_flops()

    def row_widths(self) -> float:
        return 0.0

    def flops(self, routing: Routing) -> Cost:
        """Tokens meet the shared factors once, however many experts they have, unless there are fewer rows than tokens
        or rows are slots. Products by elements are not counted."""
        if self._by_rows(routing):
            return super().flops(routing)
        mixing = routing.n_rows * self._code_size()
        if self._mode_by_mode(routing):
            mixing = routing.n_tokens * sum(table.numel() for table in self.experts)
        return Cost.exact(2.0 * mixing + routing.n_tokens * self._shared_flops())

    def expected_token_flops(self, rows_per_token: float) -> float:
        """Of a token that meets so many experts; of one that meets all, weighted mode by mode."""
        mixing = sum(table.numel() for table in self.experts)
        if rows_per_token < self.n_experts:
            mixing = rows_per_token * self._code_size()
        return 2.0 * mixing + self._shared_flops()

    def kept_per_token(self, rows_per_token: float, d_model: int) -> Kept:
        """A mixture of codes, a projected input, what is made of both, and what is mapped, however many experts."""
        return Kept(3.0 * self._code_size() + self.d_in + 2.0 * self.d_out)

    def _code_size(self) -> int:
        return reduce(self.merge, [table[:1] for table in self.experts]).numel()

    def _shared_flops(self) -> float:
        return 2.0 * (self.inputs.numel() + self.outputs.numel()) + self.join_flops()


class RankedBank(FactoredBank):
    """A factored bank with one rank for each expert mode and two more; `d_in` and `d_out` are d_model where not given.

    Raises: ValueError where ranks and modes disagree.
    """

    def __init__(
        self,
        d_model: int,
        modes: Sequence[int],
        ranks: Sequence[int],
        d_in: int | None = None,
        d_out: int | None = None,
    ) -> None:
        if len(ranks) != len(modes) + 2:
            raise ValueError(f"ranks={list(ranks)}, allowed: {len(modes) + 2} for {len(modes)} modes")
        super().__init__(modes, d_model if d_in is None else d_in, d_model if d_out is None else d_out, ranks)
        self.ranks = tuple(ranks)
        self.add_factors(modes)

    def add_factors(self, modes: Sequence[int]) -> None:
        """Draw `experts`, `inputs` and `outputs`, and whatever lies between them."""
        raise NotImplementedError


def _mixed(gates: Float[Tensor, "t e"], table: Float[Tensor, "e ..."]) -> Float[Tensor, "t ..."]:
    return (gates.to(table.dtype) @ table.flatten(1)).unflatten(1, table.shape[1:])


def uniform(*shape: int, within: float) -> Float[Tensor, "..."]:
    """Numbers uniform between -within and within."""
    return torch.empty(shape).uniform_(-within, within)


@torch.no_grad()
def homogeneous(weight: Float[Tensor, "o i"], bias: Float[Tensor, "o"] | None) -> Float[Tensor, "i1 o"]:
    """A linear map as one matrix, x @ weight.T + bias = [x; 1] @ matrix."""
    last = weight.new_zeros(len(weight)) if bias is None else bias
    return torch.cat([weight.T, last[None]])


@torch.no_grad()
def relative_error(bank: FactoredBank, matrices: Float[Tensor, "e i1 o"]) -> float:
    """|W - matrices| / |matrices| in the Frobenius norm: what a conversion lost."""
    return float((bank.matrices() - matrices).norm() / matrices.norm())
