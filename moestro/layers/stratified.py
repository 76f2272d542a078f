"""Experts in strata: a token passes over them again and again, as deep as its own choices take it."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.experts import BankSlice, ExpertBank
from moestro.layers.base import TokenLayer
from moestro.layers.moe import MoELayer
from moestro.routers.base import Router
from moestro.routing import Origin, Trace

FORMS = ("paper", "code", "stacked")


class StratifiedLayer(TokenLayer):
    """x <- x + MoE_i(LN_i(x)), where MoE_i chooses among the experts of strata i, i + 1, ...; the stratum of the expert
    with the greatest gate is the one that the token has then passed, and its next pass is the one after it. A token
    that has passed the last stratum is done, after 1 to L passes (Xu 2023, arXiv:2305.02176, section 3).

    `strata` are the numbers of experts in each stratum, in the order of `branches`, whose weights all passes share;
    `router(n_experts=...)` makes the gate of each pass. There is no capacity unless the routers have one, which counts
    the tokens at each gate by itself and drops rows, not passes. A token that its gate gives no expert moves on by one
    stratum.

    `form` says where norms and residuals are:

    - `paper`: as above. The layer owns its residual: its block adds none, and has no norm before it.
    - `code`: as the authors' code computes: x + MoE(LN(x)) in the first pass; a stream that is normalised itself, with
      the LN of the stratum it has passed, before each further pass and at the end.
    - `stacked`: neither norms nor residuals between passes, the paper's comparison; the block has its own as always.

    Raises: ValueError where strata and experts disagree, or a router looks at other tokens.
    """

    def __init__(
        self,
        d_model: int,
        strata: Sequence[int],
        router: Callable[..., Router],
        branches: Sequence[nn.Module],
        form: Literal["paper", "code", "stacked"] = "paper",
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        banks = [branch for branch in branches if isinstance(branch, ExpertBank)]
        _check(strata, branches, banks, form)
        self.strata, self.form = tuple(strata), form
        self.branches = nn.ModuleList(banks)
        gates = [router(n_experts=banks[0].n_experts - first) for first in self.firsts]
        if not gates[0].causal or gates[0].follows:
            other = "layers" if gates[0].follows else "tokens"
            raise ValueError(f"router={type(gates[0]).__name__} looks at other {other}; allowed: those that do not")
        slices = [[BankSlice(bank, first) for bank in banks] for first in self.firsts]
        self.passes = nn.ModuleList([MoELayer(gate, own) for gate, own in zip(gates, slices, strict=True)])
        self.stream_norms, self.norms, self.last_norm = _norms(form, d_model, len(strata), norm_eps)

    @property
    def owns_residual(self) -> bool:  # type: ignore[override]
        return self.form != "stacked"

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first expert of every stratum."""
        return tuple(accumulate(self.strata[:-1], initial=0))

    def tokens(self, x: Float[Tensor, "t d"]) -> tuple[Float[Tensor, "t d"], tuple[Trace, ...]]:
        passed = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        ends = torch.tensor(list(accumulate(self.strata)), device=x.device)
        traces: list[Trace] = []
        for number, first in enumerate(self.firsts):
            # every token makes the first pass; of later ones each token knows by itself whether it does
            index = (passed == number).nonzero().squeeze(-1) if number else None
            y, trace = self._pass(number, x if index is None else x[index])
            choice = trace.routing.as_wanted().first_choice() + first
            deeper = torch.bucketize(choice, ends, right=True) + 1
            if index is None:
                x, passed = y, deeper
            else:
                x, passed = x.index_copy(0, index, y.to(x.dtype)), passed.index_copy(0, index, deeper)
                trace = trace.inside(Origin(index, len(x)))
            traces.append(trace)
        return self.last_norm(x), tuple(traces)

    def _pass(self, number: int, x: Float[Tensor, "t d"]) -> tuple[Float[Tensor, "t d"], Trace]:
        stream = self.stream_norms[number](x)
        y, (trace,) = self.passes[number](self.norms[number](stream))
        return (stream + y if self.owns_residual else y), trace

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Experts stay in their stratum: a fresh one (-1) is of the stratum its position had, or of the last one's
        beyond the end.

        Raises: ValueError where experts would stand in another order than their strata, or a stratum lose its last.
        """
        of = [number for number, n in enumerate(self.strata) for _ in range(n)]
        want = [of[e] if e >= 0 else of[min(j, len(of) - 1)] for j, e in enumerate(index.tolist())]
        counts = [want.count(number) for number in range(len(self.strata))]
        if want != sorted(want) or not all(counts):
            raise ValueError(f"index={index.tolist()} puts strata {want} one after another; allowed: each, in order")
        old, self.strata = self.firsts, tuple(counts)
        for bank in self.branches:
            bank.reindex(index)  # type: ignore[operator]
        for number, moe in enumerate(self._passes()):
            seen = index[self.firsts[number] :]
            moe.router.reindex(torch.where(seen >= 0, seen - old[number], seen))
            for part in moe.branches:
                part.first = self.firsts[number]  # type: ignore[assignment]

    def _passes(self) -> list[MoELayer]:
        return list(self.passes)  # type: ignore[arg-type]

    def expected_token_flops(self) -> float:
        each = [moe.expected_token_flops() for moe in self._passes()]
        return sum(p * flops for p, flops in zip(pass_probabilities(self.strata), each, strict=True))


def pass_probabilities(strata: Sequence[int]) -> list[float]:
    """How likely a token is to make each pass where every visible expert is equally likely: 1, then that of passing
    the stratum before, n_j / (n_j + ... + n_L). Their sum, the expected number of passes, reproduces every FLOP count
    of the paper (Xu 2023, arXiv:2305.02176, Tables 1 and 2)."""
    return [1.0, *(n / sum(strata[j:]) for j, n in enumerate(strata[:-1]))]


def _norms(form: str, d_model: int, n: int, eps: float) -> tuple[nn.ModuleList, nn.ModuleList, nn.Module]:
    """Norms of the stream before each pass, of each pass's input, and of the stream at the end."""

    def layer_norms(number: int) -> list[nn.Module]:
        return [nn.LayerNorm(d_model, eps=eps) for _ in range(number)]

    def none(number: int) -> list[nn.Module]:
        return [nn.Identity() for _ in range(number)]

    if form == "paper":
        return nn.ModuleList(none(n)), nn.ModuleList(layer_norms(n)), nn.Identity()
    if form == "code":
        stream, first, last = layer_norms(n - 1), layer_norms(1), layer_norms(1)
        return nn.ModuleList([*none(1), *stream]), nn.ModuleList([*first, *none(n - 1)]), last[0]
    return nn.ModuleList(none(n)), nn.ModuleList(none(n)), nn.Identity()


def _check(strata: Sequence[int], branches: Sequence[nn.Module], banks: Sequence[ExpertBank], form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form={form!r}, allowed: {', '.join(FORMS)}")
    if not banks or len(banks) != len(branches):
        raise ValueError(f"branches={[type(branch).__name__ for branch in branches]}, allowed: banks of experts, only")
    if not strata or any(n < 1 for n in strata):
        raise ValueError(f"strata={list(strata)}, allowed: at least one stratum, none empty")
    for bank in banks:
        if bank.n_experts != sum(strata):
            raise ValueError(f"strata={list(strata)} are {sum(strata)} experts, {type(bank).__name__} {bank.n_experts}")
