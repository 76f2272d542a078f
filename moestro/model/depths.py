"""Mixture-of-depths: blocks that most tokens pass by."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moestro.cost import Cost, Kept, of_products
from moestro.experts import ExpertBank
from moestro.layers.base import Layer
from moestro.model.attention import Attention
from moestro.model.block import Block
from moestro.model.cache import Cache
from moestro.routing import Origin, Trace
from moestro.routing.capacity import rows_allowed


@dataclass(frozen=True)
class Depths:
    """Every `every`-th block, counted from the second where `every` is 2, computes a `share` of each sequence.

    Raises: ValueError for a share that is not above 0 and at most 1, or `every` below 1.
    """

    share: float = 0.125
    every: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}, allowed: above 0, at most 1")
        if self.every < 1:
            raise ValueError(f"every={self.every}, allowed: at least 1")

    def passes_by(self, index: int) -> bool:
        """Whether tokens may pass by block `index`."""
        return index % self.every == self.every - 1


class PassedBlock(Block):
    """x_t + r_t (B(x)_t - x_t) for the tokens of each sequence with the largest r_t = w . x_t, x_t for all others
    (Raposo 2024, arXiv:2404.02258, Eq. 1), where B is the whole block, attention and feed-forward layer, computed on
    the chosen tokens alone: they attend to each other only, at their own positions.

    ceil(share * length) tokens are chosen, ties going to the earlier ones; of a padded sequence that share of the
    tokens that count. Not causal: whether a token is chosen depends on later ones, so there is no generation with a
    cache. The traces are those of the feed-forward layer, on the chosen tokens.

    Raises: ValueError for a feed-forward layer that follows those of other blocks, which saw other tokens.
    """

    causal = False

    def __init__(
        self, d_model: int, attention: Attention, ffn: Layer, norm_eps: float = 1e-5, share: float = 0.125
    ) -> None:
        super().__init__(d_model, attention, ffn, norm_eps)
        if ffn.follows:
            raise ValueError("a block that tokens pass by cannot follow the routing of others: they saw other tokens")
        self.share = share
        self.score = nn.Linear(d_model, 1, bias=False)
        nn.init.normal_(self.score.weight, std=d_model**-0.5)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        positions: Int[Tensor, "#b s"],
        mask: Bool[Tensor, "b 1 s l"] | None = None,
        keep: Bool[Tensor, "b s"] | None = None,
        cache: Cache | None = None,
        index: int = 0,
        earlier: tuple[Trace, ...] = (),
    ) -> tuple[Float[Tensor, "b s d"], tuple[Trace, ...]]:
        if cache is not None:
            raise ValueError("mixture-of-depths chooses among the tokens of a whole sequence: no cache is possible")
        score = self.score(x).squeeze(-1)
        token, kept = self._chosen(score.detach(), keep)
        chosen = x.gather(1, token[..., None].expand(-1, -1, x.shape[-1]))
        there = positions.expand(len(x), -1).gather(1, token)
        y, traces = super().forward(chosen, there, _among(mask, token, kept), kept)
        update = score.gather(1, token)[..., None] * (y - chosen)
        update = update if kept is None else update.masked_fill(~kept[..., None], 0)
        out = x.scatter_add(1, token[..., None].expand_as(update), update.to(x.dtype))
        origin = _origin(token, kept, keep, score.shape)
        return out, tuple(trace.inside(origin) for trace in traces)

    def _chosen(
        self, score: Float[Tensor, "b s"], keep: Bool[Tensor, "b s"] | None
    ) -> tuple[Int[Tensor, "b c"], Bool[Tensor, "b c"] | None]:
        """The chosen tokens of each sequence in their order, and which of them count."""
        rows = self.n_chosen(score.shape[1])
        if keep is None:
            return score.sort(dim=-1, descending=True, stable=True).indices[:, :rows].sort(dim=-1).values, None
        order = score.masked_fill(~keep, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :rows]
        allowed = torch.ceil(self.share * keep.sum(-1, keepdim=True).double())
        counts = torch.arange(rows, device=score.device) < allowed
        token, place = order.sort(dim=-1)
        return token, counts.gather(1, place) & keep.gather(1, token)

    def n_chosen(self, length: int) -> int:
        """Tokens of a sequence that are computed."""
        return rows_allowed(length, 1, self.share)

    def flops(self, batch: int, seq_len: int) -> Cost:
        return of_products(batch * seq_len, self.score.weight) + super().flops(batch, self.n_chosen(seq_len))

    def expected_token_flops(self, seq_len: int) -> float:
        chosen = self.n_chosen(seq_len)
        return 2.0 * self.score.weight.numel() + chosen / seq_len * super().expected_token_flops(chosen)

    def kept_per_token(self) -> Kept:
        return super().kept_per_token() * self.share

    def idle_parameters(self) -> float:
        banks = [bank for bank in self.modules() if isinstance(bank, ExpertBank)]
        own = {*self.parameters()} - {p for bank in banks for p in bank.parameters()} - {self.score.weight}
        return (1 - self.share) * sum(p.numel() for p in own)


def _among(
    mask: Bool[Tensor, "b 1 s s"] | None, token: Int[Tensor, "b c"], kept: Bool[Tensor, "b c"] | None
) -> Bool[Tensor, "b 1 c c"] | None:
    """Which of the chosen tokens see which; None where they see all earlier ones. Those that do not count are seen by
    none but themselves."""
    n = token.shape[1]
    if mask is not None:
        mask = mask.expand(len(token), -1, -1, -1)
        rows = mask.gather(2, token[:, None, :, None].expand(-1, -1, -1, mask.shape[-1]))
        mask = rows.gather(3, token[:, None, None, :].expand(-1, -1, n, -1))
    if kept is None:
        return mask
    mask = torch.ones(n, n, dtype=torch.bool, device=token.device).tril() if mask is None else mask
    return mask & kept[:, None, None, :] | torch.eye(n, dtype=torch.bool, device=token.device)


def _origin(
    token: Int[Tensor, "b c"], kept: Bool[Tensor, "b c"] | None, keep: Bool[Tensor, "b s"] | None, shape: torch.Size
) -> Origin:
    """Where the chosen tokens that count stand among all tokens that count."""
    flat = (torch.arange(shape[0], device=token.device)[:, None] * shape[1] + token).flatten()
    if keep is None or kept is None:
        return Origin(flat, shape.numel())
    place = keep.flatten().cumsum(0) - 1
    return Origin(place[flat[kept.flatten()]], int(keep.sum()))
