"""Product-key retrieval for so few tokens that launching kernels costs more than what they compute: decoding."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moestro.ops import backend
from moestro.ops.ffn import wants_gradient
from moestro.ops.triton_peer import require_kernels

# Tokens; of more the product with the queries' weights is worth a kernel that reads these once for all tokens.
MOST_TOKENS = 16


class FeatureNorm(NamedTuple):
    """(q - mean) / sqrt(variance + eps) * weight + bias by feature, whatever the tokens are."""

    mean: Float[Tensor, "f"]
    variance: Float[Tensor, "f"]
    weight: Float[Tensor, "f"]
    bias: Float[Tensor, "f"]
    eps: float


def retrieves_few(n_tokens: int, *leaves: Tensor) -> bool:
    """Whether `few_queries` and `few_product_keys` are the way for so many tokens: with the backend `triton`, where
    nothing needs a gradient."""
    return backend.active() == "triton" and 0 < n_tokens <= MOST_TOKENS and not wants_gradient(*leaves)


def few_queries(
    x: Float[Tensor, "t d"], weight: Float[Tensor, "f d"], norm: FeatureNorm | None
) -> Float[Tensor, "t f"]:
    """`linear_fp32(x, weight)`, normalised, in one kernel: nothing is widened before it is read.

    Raises: as `triton_peer.singleton_experts`.
    """
    require_kernels(x, weight)
    return _queries(x.contiguous(), weight.contiguous(), norm)  # type: ignore[call-arg]


def few_product_keys(
    query: Float[Tensor, "t h c"], keys: Float[Tensor, "2 g n half"], k: int, gate: str
) -> tuple[Int[Tensor, "thk"], Int[Tensor, "thk"], Float[Tensor, "thk"]]:
    """Token, expert and gate of the k best of every query, token after token, in two kernels: `product_key_topk` and
    the gates (`softmax` over the k of a query, `sigmoid`, `relu`) of its scores.

    Raises: as `triton_peer.singleton_experts`.
    """
    require_kernels(query, keys)
    return _product_keys(query.float().contiguous(), keys.contiguous(), k, gate)  # type: ignore[call-arg]


@torch.compiler.disable
def _queries(x: Tensor, weight: Tensor, norm: FeatureNorm | None) -> Tensor:
    from moestro.ops.triton_peer_keys import queries

    return queries(x, weight, norm)


@torch.compiler.disable
def _product_keys(query: Tensor, keys: Tensor, k: int, gate: str) -> tuple[Tensor, Tensor, Tensor]:
    from moestro.ops.triton_peer_keys import best_pairs

    found = best_pairs(query, keys, k, gate)
    return found.token.flatten(), found.ids.flatten(), found.scores.flatten()
