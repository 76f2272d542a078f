"""`ExpertBank`: a set of experts that compute rows."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moestro.cost import Cost, Kept
from moestro.experts.norms import ExpertNorms
from moestro.routing import Routing


class ExpertBank(nn.Module):
    """Experts as a function of rows sorted by expert. `run` is the definition, all an author must write; overriding
    `forward` makes a fast path and never changes the meaning."""

    n_experts: int

    def run(self, z: Float[Tensor, "n d"], offsets: Int[Tensor, "e1"]) -> Float[Tensor, "n o"]:
        """Output of every row; expert e computes rows `offsets[e]:offsets[e+1]`."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "t d"], routing: Routing) -> Float[Tensor, "t o"]:
        """y_t = sum over the rows of token t of weight * expert(row)."""
        routing = routing.grouped()
        return routing.combine(self.run(routing.gather(x), routing.offsets))

    def begin(self, x: Float[Tensor, "t d"], routing: Routing) -> Callable[[], Float[Tensor, "t o"]]:
        """Start what others can work beside, such as sending tokens to experts elsewhere; the call that is returned
        does the rest of `forward`."""
        return partial(self, x, routing)

    def expert_of_rows(self, offsets: Int[Tensor, "e1"], n_rows: int) -> Int[Tensor, "n"]:
        """The expert that computes each row."""
        every = torch.arange(self.n_experts, device=offsets.device)
        return every.repeat_interleave(offsets.diff(), output_size=n_rows)

    def reindex(self, index: Int[Tensor, "m"]) -> None:
        """Make new expert j the old expert `index[j]`; -1 makes a fresh one."""
        raise NotImplementedError

    def weights_of(self, expert: int) -> tuple[tuple[nn.Parameter, slice], ...]:
        """Where one expert's weights lie: parameters, and the rows of each (first dimension) that are its own."""
        raise NotImplementedError

    def owner(self) -> "tuple[ExpertBank, int]":
        """The bank whose weights these are, and the number that this one's first expert has there."""
        return self, 0

    def row_parameters(self) -> tuple[Tensor, ...]:
        """Tables whose gradients are sparse, rows of experts, for an optimizer that updates rows: parameters, or
        buffers of codes."""
        return ()

    def n_parameters(self) -> int:
        """How many numbers all its parameters hold."""
        return sum(parameter.numel() for parameter in self.parameters())

    def own_parameters(self) -> Float[Tensor, "e"] | float:
        """Parameters that serve one expert alone, for every expert, or one number where all are equal."""
        return self.row_flops() / 2

    def shared_parameters(self) -> float:
        """Parameters that serve several experts: a token that meets any touches them once."""
        return 0.0

    def norms(self) -> ExpertNorms | None:
        """Norms of every expert's matrices; None where the experts are no feed-forward networks."""
        return None

    def row_flops(self) -> Float[Tensor, "e"] | float:
        """Forward FLOPs of one row, for every expert, or one number where all are equal."""
        raise NotImplementedError

    def row_widths(self) -> Float[Tensor, "e"] | float:
        """Hidden units of every expert, or one number where all are equal."""
        raise NotImplementedError

    def flops(self, routing: Routing) -> Cost:
        """Forward FLOPs of the rows in `routing`."""
        each = self.row_flops()
        if isinstance(each, Tensor):
            return Cost.exact((routing.load().to(each) * each).sum())
        return Cost.exact(each * routing.n_rows)

    def expected_token_flops(self, rows_per_token: float) -> float:
        """Forward FLOPs of a token that meets `rows_per_token` experts, each equally likely."""
        each = self.row_flops()
        return rows_per_token * (float(each.mean()) if isinstance(each, Tensor) else each)

    def kept_per_token(self, rows_per_token: float, d_model: int) -> Kept:
        """What a token that meets so many experts, each equally likely, leaves for backward: of every row three
        numbers a hidden unit, its input and its output, where experts run as `run` defines them."""
        widths = self.row_widths()
        mean = float(widths.mean()) if isinstance(widths, Tensor) else widths
        return Kept(rows_per_token * (3 * mean + 2 * d_model))


def real_device(device: torch.device) -> torch.device:
    """Sizes are plain numbers and stay countable while the weights are on the meta device."""
    return torch.device("cpu") if device.type == "meta" else device
