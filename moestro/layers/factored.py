"""A feed-forward layer whose two linear maps are mixtures of experts under one routing."""

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.experts.factored import FactoredBank
from moestro.layers.moe import MoELayer
from moestro.ops.activations import activation as find
from moestro.routers.base import Router
from moestro.routing import Trace


class FactoredLayer(MoELayer):
    """mu_2(act(mu_1(norm(x), a)), a): one routing a = router(x) mixes the *matrices* of both layers, before and behind
    the activation (Oldfield 2024, muMoE, arXiv:2402.12550, section 4).

    `branches` are both banks, or the first alone, from d_model to the hidden width: then the second has its format,
    modes and ranks, and factors of its own. Because activations lie between, y is no weighted sum of what experts
    compute, unless one has all the weight.

    As in the authors' code the router reads the residual stream itself, and the banks its RMS norm: the layer owns its
    residual. With `reads_stream: false` its block has norm and residual, as for other layers, and the router reads what
    the experts read.

    Raises: ValueError where banks do not fit one another.
    """

    def __init__(
        self,
        d_model: int,
        router: Router,
        branches: Sequence[FactoredBank],
        activation: str = "gelu",
        reads_stream: bool = True,
        norm_eps: float = 1e-5,
        clusters: int | Sequence[int] | None = None,
    ) -> None:
        find(activation)
        if not 1 <= len(branches) <= 2 or not all(isinstance(bank, FactoredBank) for bank in branches):
            raise ValueError(f"branches={[type(b).__name__ for b in branches]}, allowed: one or two factored banks")
        first = branches[0]
        second = branches[1] if len(branches) == 2 else first.mirrored()
        maps = [(first.d_in, first.d_out), (second.d_in, second.d_out)]
        if maps != [(d_model, first.d_out), (first.d_out, d_model)]:
            raise ValueError(f"branches={maps} (d_in, d_out), allowed: from d_model={d_model} to any width and back")
        super().__init__(router, [first, second], clusters=clusters)
        self.activation, self.width, self.reads_stream = activation, first.d_out, reads_stream
        self.norm = nn.RMSNorm(d_model, eps=norm_eps) if reads_stream else nn.Identity()

    @property
    def owns_residual(self) -> bool:  # type: ignore[override]
        return self.reads_stream

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None, earlier: tuple[Trace, ...] = ()
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        y, traces = super().forward(x, keep, earlier)
        return (x + y if self.owns_residual else y), traces

    def tokens(
        self, x: Float[Tensor, "t d"], earlier: tuple[Trace, ...] = ()
    ) -> tuple[Float[Tensor, "t d"], tuple[Trace, ...]]:
        routing = self.route(x, earlier)
        first, second = self.banks()
        hidden = find(self.activation).forward(first(self.norm(x), routing))
        return second(hidden, routing), (Trace(self, x, routing),)

    def expert_widths(self) -> float:
        """Hidden units of an expert that serves alone; of a mixture of experts they are as many, not their sum."""
        return float(self.width)
