"""Sparse probabilities: entmax with alpha = 1.5."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from moestro.ops import backend, reference
from moestro.ops.precision import at_least_fp32


def entmax15(logits: Float[Tensor, "*b e"]) -> Float[Tensor, "*b e"]:
    """argmax over probabilities p of p . z + H(p), H the Tsallis entropy of alpha 1.5 (Peters 2019, arXiv:1905.05702):
    p_e = max(z_e / 2 - tau, 0)^2, tau such that they sum to 1; between softmax and sparsemax, with exact zeros.

    Exact, by sorting (their Algorithm 2), in float32 at least and of that dtype. A logit of -inf gets 0; at least one
    must be finite. Backward is its Jacobian in closed form, s (v - <s, v> / sum s) with s = sqrt(p).
    """
    logits = at_least_fp32(logits)
    return reference.entmax15(logits) if backend.active() == "reference" else _Entmax15.apply(logits)


class _Entmax15(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor) -> Tensor:
        p = reference.entmax15(logits)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors  # type: ignore[attr-defined]
        s = p.sqrt()
        return s * (grad - (s * grad).sum(-1, keepdim=True) / s.sum(-1, keepdim=True))
