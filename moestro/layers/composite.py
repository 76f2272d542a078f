"""Layers made of layers: one after another in a block, and one whose output the input gates."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moestro.cost import NOTHING, Cost, Kept, of_products
from moestro.layers.base import Layer
from moestro.ops.activations import activation
from moestro.routing import Trace


class SequenceLayer(Layer):
    """x + f_1(norm x), then x + f_2(norm x), ...: several feed-forward layers in one block, each with an RMS norm of
    its own. So a mixture is inserted behind the dense layer that it would else replace (an option of PEER, He 2024,
    arXiv:2407.04153, which the paper does not evaluate).

    Raises: ValueError where there is none.
    """

    owns_residual = True

    def __init__(self, d_model: int, sublayers: Sequence[Layer], norm_eps: float = 1e-5) -> None:
        super().__init__()
        if not sublayers:
            raise ValueError("sublayers=[], allowed: at least one layer")
        self.sublayers = nn.ModuleList(sublayers)
        owning = [layer.owns_residual for layer in sublayers]
        self.norms = nn.ModuleList([nn.Identity() if owns else nn.RMSNorm(d_model, eps=norm_eps) for owns in owning])

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return any(layer.follows for layer in self._sublayers())

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None, earlier: tuple[Trace, ...] = ()
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        traces: tuple[Trace, ...] = ()
        for norm, layer in zip(self.norms, self._sublayers(), strict=True):
            y, new = _run(layer, norm(x), keep, (*earlier, *traces))
            x, traces = y if layer.owns_residual else x + y, (*traces, *new)
        return x, traces

    def expected_token_flops(self) -> float:
        return sum(layer.expected_token_flops() for layer in self._sublayers())

    def kept_per_token(self, d_model: int) -> Kept:
        """What the layers leave, and between them the residual stream and its norm, in float32."""
        return sum((f.kept_per_token(d_model) for f in self._sublayers()), Kept(bytes=8.0 * d_model * len(self.norms)))

    def untraced_flops(self, n_tokens: int) -> Cost:
        return sum((layer.untraced_flops(n_tokens) for layer in self._sublayers()), NOTHING)

    def _sublayers(self) -> list[Layer]:
        return list(self.sublayers)  # type: ignore[arg-type]


class InputGatedLayer(Layer):
    """y = W_out (layer(x) * silu(W_gate x)): what a memory returns, gated by what asked for it (Berges 2024, Memory
    Layers at Scale, arXiv:2412.09764, "Memory+").

    W_gate starts with standard deviation d_model^-0.5 and W_out with that divided by E[silu(z)^2]^0.5, so that the
    output starts at the scale of `layer`'s own. No biases.

    Raises: ValueError for a layer that owns its residual.
    """

    def __init__(self, d_model: int, layer: Layer) -> None:
        super().__init__()
        if layer.owns_residual:
            raise ValueError(f"{type(layer).__name__} returns the residual stream, which cannot be gated")
        self.layer = layer
        self.w_gate = nn.Linear(d_model, d_model, bias=False)
        self.w_out = nn.Linear(d_model, d_model, bias=False)
        nn.init.normal_(self.w_gate.weight, std=d_model**-0.5)
        nn.init.normal_(self.w_out.weight, std=(d_model * activation("silu").second_moment) ** -0.5)

    @property
    def follows(self) -> bool:  # type: ignore[override]
        return self.layer.follows

    def forward(
        self, x: Float[Tensor, "*b d"], keep: Bool[Tensor, "*b"] | None = None, earlier: tuple[Trace, ...] = ()
    ) -> tuple[Float[Tensor, "*b d"], tuple[Trace, ...]]:
        y, traces = _run(self.layer, x, keep, earlier)
        return self.w_out(y * F.silu(self.w_gate(x))), traces

    def expected_token_flops(self) -> float:
        return self.layer.expected_token_flops() + float(self._gate_flops(1).useful)

    def untraced_flops(self, n_tokens: int) -> Cost:
        return self.layer.untraced_flops(n_tokens) + self._gate_flops(n_tokens)

    def kept_per_token(self, d_model: int) -> Kept:
        """What the layer leaves; gate, its activation, the layer's output and their product."""
        return self.layer.kept_per_token(d_model) + Kept(4.0 * d_model)

    def _gate_flops(self, n_tokens: int) -> Cost:
        return of_products(n_tokens, self.w_gate.weight, self.w_out.weight)


def _run(layer: Layer, x: Tensor, keep: Tensor | None, earlier: tuple[Trace, ...]) -> tuple[Tensor, tuple[Trace, ...]]:
    return layer(x, keep, earlier) if layer.follows else layer(x, keep)
