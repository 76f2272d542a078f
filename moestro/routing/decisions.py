"""What routers decide: `Routing` and its three kinds."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moestro.ops.order import by_expert


def present(logits: Float[Tensor, "t e"]) -> Bool[Tensor, "e"]:
    """Which experts take part: those that are neither unavailable nor resting, whose logits are not -inf."""
    return (logits > -torch.inf).any(0)


class Routing:
    """Which rows each expert computes, and how rows become tokens again. Immutable; the family is closed:
    `SparseRouting`, `SoftRouting`, `SlotRouting`. Rows are grouped by expert: expert e computes rows
    `offsets[e]:offsets[e+1]`. The softmax of `logits` are the experts' probabilities; `raw` are the router's own
    numbers where they are others (gates that are no softmax)."""

    n_tokens: int
    n_experts: int
    logits: Float[Tensor, "t e"] | None
    raw: Float[Tensor, "t e"] | None = None

    @property
    def n_rows(self) -> int:
        """Rows that experts compute, over all tokens."""
        raise NotImplementedError

    @property
    def offsets(self) -> Int[Tensor, "e1"]:
        """Row bounds of the experts, [n_experts + 1]."""
        raise NotImplementedError

    def grouped(self) -> "Routing":
        """The same decision with rows in expert order."""
        return self

    def gather(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "n d"]:
        """The input row of every (token, expert) pair."""
        raise NotImplementedError

    def combine(self, rows: Float[Tensor, "n o"]) -> Float[Tensor, "t o"]:
        """Weighted sum of each token's rows; a token without rows gets zeros."""
        raise NotImplementedError

    def dense(self) -> Float[Tensor, "t e"]:
        """Weight of every expert for every token, zeros included."""
        raise NotImplementedError

    def scaled(self, factor: Float[Tensor, "e"]) -> "Routing":
        """The same rows, the weights of each expert times its factor."""
        raise NotImplementedError

    def load(self) -> Float[Tensor, "e"]:
        """Rows each expert computes (tokens)."""
        return self.grouped().offsets.diff().to(torch.float32)

    def importance(self) -> Float[Tensor, "e"]:
        """Sum of the weights each expert got (Shazeer 2017, arXiv:1701.06538, Eq. 6)."""
        return self.dense().sum(0)

    def per_token(self, value: Float[Tensor, "e"] | float) -> Float[Tensor, "t"]:
        """Sum over each token's rows of `value[expert]`: 1 counts experts, a width gives the active width."""
        raise NotImplementedError

    def meetings(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]] | None:
        """Token and expert of every row; None where rows are mixtures of tokens."""
        return None

    def raw_logits(self) -> Float[Tensor, "t e"] | None:
        """What the router's score gave; None where no such matrix exists."""
        return self.logits if self.raw is None else self.raw

    def as_wanted(self) -> "Routing":
        """What tokens chose, those rows included that a capacity dropped."""
        return self

    def first_choice(self) -> Int[Tensor, "t"]:
        """The expert of each token's greatest weight, of equal ones that of the greatest logit, then the lowest; 0 for
        a token without experts."""
        weight = self.dense().detach()
        if self.logits is None:
            return weight.argmax(-1)
        best = (weight == weight.amax(-1, keepdim=True)) & (weight > 0)
        return self.logits.detach().masked_fill(~best, -torch.inf).argmax(-1)


@dataclass(frozen=True)
class SparseRouting(Routing):
    """Any number of experts a token, none included: row n sends token[n] to expert[n] with weight[n].

    `bounds` are the expert offsets, present once rows lie in expert order. `fixed` is k where rows lie token after
    token, exactly k to each (top-k, product keys), so that they are a view of [t, k]. `query_stats` are mean, variance
    and count of a batch-normalised router's queries, for the rule that keeps running statistics. `wanted` is the
    routing before a capacity dropped some of its rows (`moestro.routing.capacity`).
    """

    token: Int[Tensor, "n"]
    expert: Int[Tensor, "n"]
    weight: Float[Tensor, "n"]
    n_tokens: int
    n_experts: int
    logits: Float[Tensor, "t e"] | None = None
    bounds: Int[Tensor, "e1"] | None = None
    fixed: int | None = None
    query_stats: tuple[Tensor, Tensor, int] | None = None
    wanted: "SparseRouting | None" = None
    raw: Float[Tensor, "t e"] | None = None

    @staticmethod
    def from_topk(
        expert: Int[Tensor, "t k"],
        weight: Float[Tensor, "t k"],
        n_experts: int,
        logits: Float[Tensor, "t e"] | None = None,
        query_stats: tuple[Tensor, Tensor, int] | None = None,
        raw: Float[Tensor, "t e"] | None = None,
    ) -> "SparseRouting":
        """Exactly k experts for every token."""
        t, k = expert.shape
        token = torch.arange(t, device=expert.device).repeat_interleave(k)
        flat = token, expert.flatten(), weight.flatten()
        return SparseRouting(*flat, t, n_experts, logits, fixed=k, query_stats=query_stats, raw=raw)

    @property
    def n_rows(self) -> int:
        return len(self.token)

    @property
    def offsets(self) -> Int[Tensor, "e1"]:
        bounds = self.grouped().bounds
        if bounds is None:
            raise RuntimeError("grouped() returned rows without bounds")
        return bounds

    def grouped(self) -> "SparseRouting":
        if self.bounds is not None:
            return self
        order, bounds = by_expert(self.expert, self.n_experts)
        return replace(
            self,
            token=self.token[order],
            expert=self.expert[order],
            weight=self.weight[order],
            bounds=bounds,
            fixed=None,
        )

    def load(self) -> Float[Tensor, "e"]:
        # a sum of ones, exact up to 2^24, because bincount makes the host wait for the device
        ones = torch.ones(self.n_rows, device=self.expert.device)
        return ones.new_zeros(self.n_experts).index_add(0, self.expert, ones)

    def scaled(self, factor: Float[Tensor, "e"]) -> "SparseRouting":
        return replace(self, weight=self.weight * factor.to(self.weight)[self.expert])

    def importance(self) -> Float[Tensor, "e"]:
        return self.weight.new_zeros(self.n_experts).index_add(0, self.expert, self.weight)

    def gather(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "n d"]:
        return x[self.token]

    def combine(self, rows: Float[Tensor, "n o"]) -> Float[Tensor, "t o"]:
        weighted = rows * self.weight[:, None].to(rows.dtype)
        return rows.new_zeros(self.n_tokens, rows.shape[-1]).index_add(0, self.token, weighted)

    def dense(self) -> Float[Tensor, "t e"]:
        zeros = self.weight.new_zeros(self.n_tokens, self.n_experts)
        return zeros.index_put((self.token, self.expert), self.weight, accumulate=True)

    def per_token(self, value: Float[Tensor, "e"] | float) -> Float[Tensor, "t"]:
        each = value[self.expert] if isinstance(value, Tensor) else self.weight.new_full((self.n_rows,), value)
        return each.new_zeros(self.n_tokens).index_add(0, self.token, each)

    def meetings(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
        return self.token, self.expert

    def as_wanted(self) -> "SparseRouting":
        return self if self.wanted is None else self.wanted

    def keep(self, mask: Bool[Tensor, "n"]) -> "SparseRouting":
        """The rows where `mask` is true; the rest are dropped."""
        token, expert, weight = self.token[mask], self.expert[mask], self.weight[mask]
        return replace(self, token=token, expert=expert, weight=weight, bounds=None, fixed=None)

    def matrix(self) -> tuple[Int[Tensor, "t k"], Float[Tensor, "t k"]]:
        """Experts and weights as [t, k].

        Raises: ValueError where tokens have different numbers of experts.
        """
        if self.fixed is None:
            raise ValueError("this routing has no fixed number of rows a token, in token order")
        return self.expert.view(-1, self.fixed), self.weight.view(-1, self.fixed)


@dataclass(frozen=True)
class SoftRouting(Routing):
    """Every expert on every token: weight[t, e1 e2 ...] is the product of the modes' weights [t, e_m]."""

    modes: tuple[Float[Tensor, "t _"], ...]
    logits: Float[Tensor, "t e"] | None = None
    raw: Float[Tensor, "t e"] | None = None

    @property
    def n_tokens(self) -> int:  # type: ignore[override]
        return self.modes[0].shape[0]

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return math.prod(mode.shape[1] for mode in self.modes)

    @property
    def n_rows(self) -> int:
        return self.n_tokens * self.n_experts

    @property
    def offsets(self) -> Int[Tensor, "e1"]:
        return torch.arange(self.n_experts + 1, device=self.modes[0].device) * self.n_tokens

    def gather(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "n d"]:
        return x.repeat(self.n_experts, 1)

    def combine(self, rows: Float[Tensor, "n o"]) -> Float[Tensor, "t o"]:
        by_expert = rows.unflatten(0, (self.n_experts, self.n_tokens))
        return torch.einsum("eto,te->to", by_expert, self.dense().to(rows.dtype))

    def dense(self) -> Float[Tensor, "t e"]:
        out = self.modes[0]
        for mode in self.modes[1:]:
            out = torch.einsum("ti,tj->tij", out, mode).flatten(1)
        return out

    def scaled(self, factor: Float[Tensor, "e"]) -> "SoftRouting":
        """One mode, because factors of experts are no products of factors of modes."""
        weight = self.dense()
        return SoftRouting((weight * factor.to(weight),), self.logits, self.raw)

    def per_token(self, value: Float[Tensor, "e"] | float) -> Float[Tensor, "t"]:
        total = value.sum() if isinstance(value, Tensor) else torch.tensor(value * self.n_experts)
        return total.to(self.modes[0]).expand(self.n_tokens)

    def meetings(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
        row = torch.arange(self.n_rows, device=self.modes[0].device)
        return row % self.n_tokens, row // self.n_tokens


@dataclass(frozen=True)
class SlotRouting(Routing):
    """Rows are mixtures of tokens: expert e computes its s slots; `dispatch` mixes tokens into slots, `merge` slots
    into tokens. Looks at the whole batch, so it is not causal."""

    dispatch: Float[Tensor, "t e s"]
    merge: Float[Tensor, "t e s"]
    logits: Float[Tensor, "t e"] | None = None

    @property
    def n_tokens(self) -> int:  # type: ignore[override]
        return self.dispatch.shape[0]

    @property
    def n_experts(self) -> int:  # type: ignore[override]
        return self.dispatch.shape[1]

    @property
    def n_rows(self) -> int:
        return self.dispatch.shape[1] * self.dispatch.shape[2]

    @property
    def offsets(self) -> Int[Tensor, "e1"]:
        return torch.arange(self.n_experts + 1, device=self.dispatch.device) * self.dispatch.shape[2]

    def gather(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "n d"]:
        return torch.einsum("tes,td->esd", self.dispatch.to(x.dtype), x).flatten(0, 1)

    def combine(self, rows: Float[Tensor, "n o"]) -> Float[Tensor, "t o"]:
        return self.merge.flatten(1).to(rows.dtype) @ rows

    def dense(self) -> Float[Tensor, "t e"]:
        return self.merge.sum(-1)

    def scaled(self, factor: Float[Tensor, "e"]) -> "SlotRouting":
        return replace(self, merge=self.merge * factor.to(self.merge)[:, None])

    def per_token(self, value: Float[Tensor, "e"] | float) -> Float[Tensor, "t"]:
        """A slot's cost is shared by the tokens in proportion to what they put into it."""
        share = self.dispatch.sum(-1)
        return share @ value.to(share) if isinstance(value, Tensor) else share.sum(-1) * value
