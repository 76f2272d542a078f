"""`AdaptedLinear`: soft mixtures of low-rank experts around a linear map of any module."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import NOTHING, Cost
from moestro.experts.low_rank import LowRankBank
from moestro.routers.base import Router, ScoredRouter
from moestro.routers.scores import LinearScore
from moestro.routers.selects import Soft
from moestro.routers.uniform import UniformRouter


@dataclass
class TokenFacts:
    """What the adapters of one model are told about the tokens of a forward: a group for every token (modality,
    language, domain), and which tokens count. None: no groups, and all count."""

    groups: Int[Tensor, "..."] | None = None
    keep: Bool[Tensor, "..."] | None = None

    def of_rows(self, x: Float[Tensor, "*b i"]) -> "TokenFacts":
        """The facts of x, which may hold the tokens alone that count, in one row."""
        keep = self.keep
        if keep is None or x.dim() != 2 or x.shape[:-1] == keep.shape or len(x) != int(keep.sum()):
            return self
        return TokenFacts(
            None if self.groups is None else self.groups[keep], torch.ones(len(x), dtype=torch.bool, device=x.device)
        )

    def in_sequences(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*c i"]:
        """x in the shape in which the model was called, where that is known: mixtures of experts put the tokens of all
        sequences in one row."""
        fact = self.keep if self.groups is None else self.groups
        in_one_row = fact is not None and x.dim() == 2 and fact.numel() == len(x)
        return x.view(*fact.shape, x.shape[-1]) if in_one_row else x  # type: ignore[union-attr]


class Mixture(nn.Module):
    """sum_n g_n(x) B_n A_n x on the tokens of one group, or on all; zeros for others."""

    def __init__(self, router: Router, bank: LowRankBank, group: int | None) -> None:
        super().__init__()
        self.router, self.bank, self.group = router, bank, group

    def forward(self, x: Float[Tensor, "*b i"], told: TokenFacts) -> Float[Tensor, "*b o"]:
        """Raises: ValueError where it serves a group and was not told the tokens' groups, or of other tokens."""
        shape = (*x.shape[:-1], self.bank.d_out)
        alone = told.of_rows(x)
        if alone is not told and not self.router.causal:
            raise ValueError(
                "tokens of several sequences stand in one row, their padding left out: slots would mix them"
            )
        told = alone
        x = told.in_sequences(x).to(self.bank.down.dtype)
        mask = self._mask(x, told)
        if self.router.causal:
            return self._tokens(x.flatten(0, -2), None if mask is None else mask.flatten()).view(shape)
        # slots mix the tokens of a sequence, never those of different ones
        sequences = x.flatten(0, -3) if x.dim() > 2 else x[None]
        masks = [None] * len(sequences) if mask is None else list(mask.reshape(-1, x.shape[-2]))
        mixed = [self._tokens(*each) for each in zip(sequences, masks, strict=True)]
        return torch.stack(mixed).view(shape) if mixed else x.new_zeros(shape)

    def _tokens(self, x: Float[Tensor, "t i"], mask: Bool[Tensor, "t"] | None) -> Float[Tensor, "t o"]:
        if mask is None:
            return self.bank(x, self.router(x))
        y = self._tokens(x[mask], None) if bool(mask.any()) else x.new_zeros(0, self.bank.d_out)
        return y.new_zeros(len(x), self.bank.d_out).index_copy(0, mask.nonzero().squeeze(-1), y)

    def _mask(self, x: Tensor, told: TokenFacts) -> Tensor | None:
        """The tokens it serves, None for all."""
        if self.group is not None and told.groups is None:
            raise ValueError(
                f"experts of group {self.group} were not told the groups of tokens: adapters.given(groups)"
            )
        for name, fact in vars(told).items():
            if fact is not None and fact.shape != x.shape[:-1]:
                raise ValueError(f"{name} of {list(fact.shape)} tokens, here are {list(x.shape[:-1])}")
        # which tokens count matters to those alone that are mixed with others
        keep = None if self.router.causal else told.keep
        if self.group is None or told.groups is None:
            return keep
        return told.groups == self.group if keep is None else keep & (told.groups == self.group)

    def merged(self) -> Float[Tensor, "o i"]:
        """The one matrix that this mixture is, for all tokens.

        Raises: ValueError where gates are learned, or tokens are told apart.
        """
        select = self.router.select if isinstance(self.router, ScoredRouter) else None
        alone = self.bank.n_experts == 1 and type(select) is Soft and select.gate in ("softmax", "entmax15")
        if self.group is not None or not (alone or isinstance(self.router, UniformRouter)):
            raise ValueError("a mixture whose gates depend on tokens is no single matrix and cannot be merged")
        return self.bank.matrices().mean(0)

    def flops(self, batch: int, seq_len: int) -> Cost:
        """Forward FLOPs on sequences all of whose tokens it serves."""
        n_tokens, router, bank = batch * seq_len, self.router, self.bank
        total = router.flops(n_tokens)
        if router.causal:
            rows = n_tokens * router.rows_per_token()
        else:
            rows = batch * router(torch.zeros(seq_len, bank.d_in).to(bank.down)).n_rows
            # every token is merged of outputs, which the router takes to be as wide as tokens
            total += 2.0 * rows * seq_len * (bank.d_out - bank.d_in)
        return Cost.exact(total + rows * bank.row_flops()).of_weights(self.parameters())


class AdaptedLinear(nn.Module):
    """base(x) + scale * sum of mixtures (Wu 2023, Omni-SMoLA, arXiv:2312.00968): `base` may be frozen or quantised, for
    it is called and nothing else is asked of it. Mixtures compute in their own dtype; the sum has the base's."""

    def __init__(self, base: nn.Module, mixtures: Sequence[Mixture], scale: float, told: TokenFacts) -> None:
        super().__init__()
        self.base, self.mixtures, self.scale = base, nn.ModuleList(mixtures), scale
        self.told, self.enabled = told, True

    @property
    def weight(self) -> Tensor:
        """The base's, for those who count or tie weights."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        y = self.base(x)
        if not self.enabled:
            return y
        delta = sum((mixture(x, self.told) for mixture in self.mixtures), torch.zeros((), device=y.device))
        return y + (self.scale * delta).to(y.dtype)

    def each(self) -> list[Mixture]:
        """Its mixtures."""
        return list(self.mixtures)  # type: ignore[arg-type]

    def flops(self, batch: int, seq_len: int) -> Cost:
        """Forward FLOPs of the mixtures alone."""
        return sum((mixture.flops(batch, seq_len) for mixture in self.each()), NOTHING)


def adapter_flops(model: nn.Module, batch: int, seq_len: int) -> Cost:
    """Forward FLOPs of all adapters of a model on sequences all of whose tokens they serve."""
    adapters = (module for module in model.modules() if isinstance(module, AdaptedLinear))
    return sum((adapter.flops(batch, seq_len) for adapter in adapters), NOTHING)


def soft(d_model: int, n_experts: int) -> ScoredRouter:
    """Token mixing: gates softmax(x Phi), so that each token mixes experts by itself."""
    return ScoredRouter(LinearScore(d_model, n_experts), Soft())


class LowRankMixtures:
    """What is put around a linear map: for every entry of `groups` a mixture of `n_experts` experts of `rank`, which
    serves the tokens of that group, or all (null). `router` makes each mixture's router; by default tokens are mixed
    softly, causally. Gates sum to 1, so that each expert moves by 1 / n_experts of a step at the start;
    `times_experts` multiplies by that number.

    Raises: ValueError for impossible values.
    """

    def __init__(
        self,
        n_experts: int = 8,
        rank: int = 4,
        router: Callable[..., Router] = soft,
        groups: Sequence[int | None] = (None,),
        scale: float = 1.0,
        times_experts: bool = False,
    ) -> None:
        if n_experts < 1 or rank < 1 or not groups:
            raise ValueError(f"n_experts={n_experts}, rank={rank}, groups={list(groups)}, allowed: at least 1 of each")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale={scale}, allowed: above 0")
        self.n_experts, self.rank, self.router, self.groups = n_experts, rank, router, tuple(groups)
        self.scale = scale * n_experts if times_experts else scale

    def around(self, linear: nn.Module, told: TokenFacts) -> AdaptedLinear:
        """`linear` with fresh mixtures, which change nothing yet."""
        d_in, d_out = linear_sizes(linear)
        device = next((t.device for t in [*linear.parameters(), *linear.buffers()]), torch.device("cpu"))
        mixtures = [
            Mixture(
                self.router(d_model=d_in, n_experts=self.n_experts),
                LowRankBank(d_in, self.n_experts, self.rank, d_out=d_out),
                group,
            )
            for group in self.groups
        ]
        return AdaptedLinear(linear, mixtures, self.scale, told).to(device)


def linear_sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map: `nn.Linear` and what has its fields, or transformers' `Conv1D`.

    Raises: ValueError for any other module.
    """
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if hasattr(module, "nf") and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    raise ValueError(f"{type(module).__name__} is no linear map")
