"""Feed-forward experts in tiles: `ops.expert_ffn` where `native.expert_tiles` has kernels for it."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moestro.ops import native
from moestro.ops.glu import compiled_experts
from moestro.ops.native import expert_tiles
from moestro.ops.native.expert_tiles import Layout


def multiplies(
    x: Float[Tensor, "t d"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"] | Float[Tensor, "e d w"],
    activation: str,
) -> bool:
    """Whether there are tiles here, and they are for these experts: unit-major ones."""
    alike = w_out.ndim == 2 and x.dtype == w_in.dtype == w_out.dtype
    return alike and native.library().variant in expert_tiles.PIECES and compiled_experts(x, w_in, w_out, activation)


def tiled_ffn(
    x: Float[Tensor, "t d"],
    token: Int[Tensor, "n"],
    weight: Float[Tensor, "n"],
    w_in: Float[Tensor, "gs d"],
    w_out: Float[Tensor, "s d"],
    bounds: Sequence[int],
    widths: Sequence[int],
    gradient: bool,
) -> Float[Tensor, "t d"]:
    """`ops.expert_ffn` where `multiplies` says so. Saves x and the pre-activations, these for up to 31
    rows and units more an expert.

    Tiles of AMX multiply numbers in bfloat16. Numbers in float32 are sums of as many of them there as
    `torch.get_float32_matmul_precision()` asks for in the forward pass: three, the default `highest`, which is as exact
    as products in float32; two with `high`; one with `medium`. Products with infinite numbers are no numbers, and
    parts of numbers below 2^-126 are 0. Without AMX they are multiplied as they are, or with `medium` as one number in
    bfloat16 where the processor multiplies these.

    Raises: ValueError for shapes or tokens that do not go together.
    """
    units, d = sum(widths), x.shape[1]
    if w_in.shape != (2 * units, d) or w_out.shape != (units, d):
        raise ValueError(f"w_in {list(w_in.shape)}, w_out {list(w_out.shape)}, allowed: those of {units} units")
    if weight.shape != token.shape or bounds[-1] != len(token):
        raise ValueError(f"{len(token)} tokens, {len(weight)} weights, allowed: {bounds[-1]} of both")
    if len(token) and not 0 <= int(token.min()) <= int(token.max()) < len(x):
        raise ValueError(f"tokens {int(token.min())} to {int(token.max())}, allowed: 0 to {len(x) - 1}")
    x, weight, w_in, w_out = (v.contiguous() for v in (x, weight, w_in, w_out))
    layout = Layout(x, token, bounds, widths)
    if gradient:
        return _TiledFFN.apply(x, weight, w_in, w_out, layout)  # type: ignore
    return expert_tiles.forward(x, weight, w_in, w_out, layout, keep=False)[0]


class _TiledFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, w_in, w_out, layout):  # type: ignore[override]
        y, z = expert_tiles.forward(x, weight, w_in, w_out, layout, keep=True)
        ctx.save_for_backward(x, weight, w_in, w_out, z)
        ctx.layout = layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):  # type: ignore[override]
        needs_x, _, needs_in, needs_out = ctx.needs_input_grad[:4]
        needs = needs_x, needs_in, needs_out
        return *expert_tiles.backward(dy.contiguous(), ctx.saved_tensors, ctx.layout, needs), None
