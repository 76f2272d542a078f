"""`Trace`: the record of one layer's forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.cost import Cost
from moestro.routing.decisions import Routing, present


@runtime_checkable
class TracedLayer(Protocol):
    """What a trace knows of its layer: its experts' widths and clusters, its banks (`ExpertBank`s), and what a routing
    cost."""

    cluster: Tensor | None

    def expert_widths(self) -> Tensor | float: ...

    def banks(self) -> Sequence[Any]: ...

    def flops(self, routing: Routing) -> Cost: ...


@dataclass(frozen=True)
class StepTraffic:
    """What one layer routed in all micro-batches of an optimizer step: rows of every expert, tokens, and those of the
    tokens on which two experts or more were recorded."""

    load: Float[Tensor, "e"]
    n_tokens: int
    micro_batches: int
    n_paired: int = 0


@dataclass(frozen=True)
class Origin:
    """Which of `n_tokens` tokens of the model each routed token is, or is a part of: where a layer routes some of the
    tokens again (passes over strata), or splits each into several (heads)."""

    token: Int[Tensor, "t"]
    n_tokens: int

    def within(self, outer: "Origin | None") -> "Origin":
        """The same tokens, where this origin's tokens are themselves routed tokens of `outer`."""
        return self if outer is None else Origin(outer.token[self.token], outer.n_tokens)

    def total(self, value: Float[Tensor, "t"]) -> Float[Tensor, "m"]:
        """Sum of `value` over what became of each token of the model."""
        return value.new_zeros(self.n_tokens).index_add(0, self.token, value)


@dataclass(frozen=True)
class Overheard:
    """Outputs of experts on tokens that did not choose them, computed to be recorded: no part of the layer's output."""

    routing: Routing
    rows: Float[Tensor, "n o"]


@dataclass(frozen=True)
class Trace:
    """What one `MoELayer` did in one forward: its input tokens, its routing and, where the layer records them, the
    experts' outputs before they are combined, `overheard` those on tokens that chose others. `step` is there where
    training knows the whole step's traffic, which it finds out for objectives that ask for it. `origin` is there where
    the routed tokens are not the model's tokens one by one. `target` is what a teacher says that the outputs of each
    token's experts should add up to, where the layer has one."""

    layer: TracedLayer
    x: Float[Tensor, "t d"]
    routing: Routing
    rows: Float[Tensor, "n o"] | None = None
    step: StepTraffic | None = None
    origin: Origin | None = None
    overheard: Overheard | None = None
    target: Float[Tensor, "t o"] | None = None
    everyone: Callable[[Tensor], Tensor] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of the model of which this layer routed some, all, or the parts."""
        return self.routing.n_tokens if self.origin is None else self.origin.n_tokens

    def summed(self, own: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The sum of every process's `own` where several share the micro-batch, which all must come here; else `own`.
        An objective that is one function of such sums has the value and the gradients of a single process."""
        return own if self.everyone is None else self.everyone(own)

    def flops(self) -> Cost:
        """Forward FLOPs of what the layer did, with what it only recorded."""
        if self.overheard is None:
            return self.layer.flops(self.routing)
        bank = self.layer.banks()[0]
        return self.layer.flops(self.routing) + bank.flops(self.overheard.routing).of_weights(bank.parameters())

    def inside(self, outer: Origin) -> "Trace":
        """The trace of a layer inside another, whose tokens were routed tokens of `outer`."""
        return replace(self, origin=outer if self.origin is None else self.origin.within(outer))

    def recorded_per_token(self) -> Float[Tensor, "t"]:
        """Number of recorded outputs on every routed token, chosen experts' and others'; not of experts that take no
        part, whose rows a soft selection computes for weights of 0."""
        logits = self.routing.logits
        chosen = self.routing.per_token(1.0 if logits is None else present(logits).float())
        return chosen if self.overheard is None else chosen + self.overheard.routing.per_token(1.0).to(chosen)

    def experts_per_token(self) -> Float[Tensor, "m"]:
        """Number of routed experts each token of the model used, those that several of its parts used as often."""
        return self._of_the_model(self.routing.per_token(1.0))

    def active_width(self) -> Float[Tensor, "m"]:
        """Sum of the widths (hidden units) of the routed experts each token of the model used."""
        return self._of_the_model(self.routing.per_token(self.layer.expert_widths()))

    def different_experts(self) -> Float[Tensor, "m"]:
        """Number of different routed experts each token of the model used; rows that mix tokens count as they are."""
        pairs = self.pairs(self.routing.n_experts)
        if pairs is None:
            return self.experts_per_token()
        token = pairs.unique() // self.routing.n_experts
        return torch.bincount(token, minlength=self.n_tokens).to(torch.float32)

    def pairs(self, n_experts: int, first: int = 0) -> Int[Tensor, "n"] | None:
        """One number, token * n_experts + expert, for every row's token of the model and its expert, counted from
        `first`; None where rows are mixtures of tokens."""
        meetings = self.routing.meetings()
        if meetings is None:
            return None
        token, expert = meetings
        token = token if self.origin is None else self.origin.token[token]
        return token * n_experts + expert + first

    def _of_the_model(self, value: Float[Tensor, "t"]) -> Float[Tensor, "m"]:
        return value if self.origin is None else self.origin.total(value)
