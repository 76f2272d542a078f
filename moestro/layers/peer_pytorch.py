"""Weights from the public package PEER-pytorch (`PEER_pytorch.PEER`), which need not be installed: its modules are only
read."""

from typing import Any

import torch
from torch import Tensor, nn

from moestro.experts import SingletonBank
from moestro.layers.moe import MoELayer
from moestro.routers import ProductKeyRouter

_ACTIVATIONS: dict[type[nn.Module], str] = {nn.GELU: "gelu", nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "none"}
_GATES: dict[type[nn.Module], str] = {nn.Softmax: "softmax", nn.ReLU: "relu"}


def from_peer_pytorch(peer: nn.Module) -> tuple[MoELayer, nn.RMSNorm | None]:
    """A layer that computes what a `PEER_pytorch.PEER` (version 0.2.2) computes, in copies of its weights, and the norm
    of its input: None, or with `pre_rmsnorm` the one that stands before the layer (in a `Block`: `ffn_norm`).

    ```python
    layer, norm = from_peer_pytorch(peer)
    y, traces = layer(x if norm is None else norm(x))  # == peer(x)
    ```

    The package's default, `non_competing_scores=True`, means ReLU gates and one expert a head, whatever
    `num_experts_per_head` says: the layer then has `gate="relu"`, `top_k=1`. Dropout and `train_mem_mask`, which belong
    to training, are not carried over.

    Raises: ValueError for anything else than a `PEER`, for tables of their own for each head
    (`separate_embed_per_head`), for fewer candidates a side than experts a head (`product_key_topk`; its retrieval is
    then not exact), and for activations that are not ours.
    """
    _check(peer)
    p: Any = peer
    heads, side, _, half = p.keys.shape
    n_experts, d_model = p.weight_down_embed.weight.shape
    top_k, gate = p.num_experts_per_head_topk, _GATES[type(p.score_activation)]
    router = ProductKeyRouter(
        d_model, n_experts, heads, top_k, 2 * half, shared_keys=False, query_norm="none", gate=gate  # type: ignore
    )  # fmt: skip
    layer = MoELayer(router, [SingletonBank(d_model, n_experts, _ACTIVATIONS[type(p.activation)])])
    # there: side, head, feature; here a head's two halves lie together
    query = p.to_queries[0].weight.view(2, heads, half, d_model).transpose(0, 1)
    weights = {
        "router.query": query.reshape(heads * 2 * half, d_model),
        "router.keys": p.keys.permute(2, 0, 1, 3),
        "branches.0.up": p.weight_down_embed.weight,
        "branches.0.down": p.weight_up_embed.weight,
    }
    layer = layer.to(p.keys.device, p.keys.dtype)
    layer.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return layer, _norm(p)


def _check(peer: nn.Module) -> None:
    if not isinstance(getattr(peer, "keys", None), Tensor) or not hasattr(peer, "weight_down_embed"):
        raise ValueError(f"{type(peer).__name__} is no PEER of PEER-pytorch (allowed: PEER_pytorch.PEER)")
    p: Any = peer
    if p.separate_embed_per_head:
        raise ValueError("separate_embed_per_head=True, allowed: False (heads share one pool of experts here)")
    if p.product_key_topk < p.num_experts_per_head_topk:
        raise ValueError(
            f"product_key_topk={p.product_key_topk}, allowed: at least {p.num_experts_per_head_topk} (the experts of a "
            "head): retrieval is exact here"
        )
    activation = p.activation
    if type(activation) not in _ACTIVATIONS or getattr(activation, "approximate", "none") != "none":
        raise ValueError(f"activation={activation}, allowed: GELU (exact), ReLU, SiLU, Identity")


def _norm(peer: Any) -> nn.RMSNorm | None:
    """x / rms(x) * (gamma + 1); the package adds nothing to the mean square but keeps it above 1e-24."""
    if isinstance(peer.norm, nn.Identity):
        return None
    gamma = peer.norm.gamma.detach()
    norm = nn.RMSNorm(len(gamma), eps=1e-24, device=gamma.device, dtype=gamma.dtype)
    with torch.no_grad():
        norm.weight.copy_(gamma + 1)
    return norm
