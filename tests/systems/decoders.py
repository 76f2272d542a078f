"""Small decoders in float64 with every kind of feed-forward layer, and the reference run on copies of their weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from moestro.experts import FFNBank, SharedExpert, SingletonBank
from moestro.layers import DenseFFN, MoELayer
from moestro.model import Attention, Block, Transformer
from moestro.routers import LinearScore, ProductKeyRouter, ScoredRouter, TopK, TopP
from tests.reference import hmoe, peer, transformer
from tests.systems.hmoe_layers import triples

V, D, LAYERS = 11, 8, 3
WIDTHS = [1, 3, 4, 8]
NAMES = {
    "attention_norm.weight": "attention_norm",
    "attention.query.weight": "q",
    "attention.key.weight": "k",
    "attention.value.weight": "v",
    "attention.out.weight": "o",
    "ffn_norm.weight": "ffn_norm",
    "ffn.expert.w_out.weight": "down",
}


def dense() -> DenseFFN:
    return DenseFFN(D, 12)


def hmoe_top2() -> MoELayer:
    return MoELayer(ScoredRouter(LinearScore(D, 4, init_std=1.0), TopK(2)), [FFNBank(D, WIDTHS)])


def hmoe_top_p() -> MoELayer:
    return MoELayer(ScoredRouter(LinearScore(D, 4, init_std=1.0), TopP(0.6)), [FFNBank(D, WIDTHS)])


def peer_batch_norm() -> MoELayer:
    return MoELayer(ProductKeyRouter(D, 16, heads=2, top_k=3, d_key=4), [SingletonBank(D, 16, heads=2, top_k=3)])


def hmoe_with_shared() -> MoELayer:
    router = ScoredRouter(LinearScore(D, 4, init_std=1.0), TopK(2))
    return MoELayer(router, [FFNBank(D, WIDTHS), SharedExpert(D, 5)])


KINDS: dict[str, Callable[[], DenseFFN | MoELayer]] = {
    "dense": dense,
    "top2": hmoe_top2,
    "top_p": hmoe_top_p,
    "shared": hmoe_with_shared,
    "peer": peer_batch_norm,
}


def decoder(kind: str = "dense", n_kv_heads: int = 2, head_dim: int = 2, tied: bool = False) -> Transformer:
    """Three blocks of which the middle one has the feed-forward layer asked for; norms away from one."""
    blocks = [
        Block(D, Attention(D, 4, n_kv_heads, head_dim, rope_theta=100.0), KINDS[kind if i == 1 else "dense"]())
        for i in range(LAYERS)
    ]
    model = Transformer(V, D, blocks, tie_embeddings=tied).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(V, (batch, length))


class Twin:
    """Leaves with the weights of a decoder, by its own names, and the reference decoder on them."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def forward(self, sequence: list[int], documents: list[int] | None = None) -> Tensor:
        attention = self.model.get_submodule("blocks.0.attention")
        assert isinstance(attention, Attention)
        return transformer.forward(
            sequence,
            self._weights(),
            n_layers=len(self.model.blocks),
            n_heads=attention.n_heads,
            n_kv_heads=attention.n_kv_heads,
            theta=attention.rope_theta,
            documents=documents,
            ffns={int(name.split(".")[1]): Mixture(self, name) for name in self.model.moe_layers()},
        )

    def _weights(self) -> dict[str, Tensor]:
        out = {"embed": self.leaves["embedding.weight"], "norm": self.leaves["norm.weight"]}
        if "head.weight" in self.leaves:
            out["head"] = self.leaves["head.weight"]
        for name, leaf in self.leaves.items():
            block, _, rest = name.removeprefix("blocks.").partition(".")
            if rest in NAMES:
                out[f"blocks.{block}.{NAMES[rest]}"] = leaf
            elif rest == "ffn.expert.w_in.weight":
                out[f"blocks.{block}.gate"], out[f"blocks.{block}.up"] = leaf.chunk(2)
        return out


class Mixture:
    """One MoE layer of a decoder, as the reference computes it: x[s, d] -> y[s, d]."""

    def __init__(self, twin: Twin, name: str) -> None:
        self.layer = twin.model.moe_layers()[name]
        self.weights = {key.removeprefix(f"{name}."): leaf for key, leaf in twin.leaves.items() if key.startswith(name)}

    def __call__(self, x: Tensor) -> Tensor:
        router = self.layer.router
        return self._peer(x, router) if isinstance(router, ProductKeyRouter) else self._hmoe(x)

    def _hmoe(self, x: Tensor) -> Tensor:
        router, bank, w = self.layer.router, self.layer.bank, self.weights
        assert isinstance(router, ScoredRouter) and isinstance(bank, FFNBank)
        experts = triples(w["branches.0.w_in.weight"], w["branches.0.w_out.weight"], list(bank.widths))
        k = router.select.top_k if isinstance(router.select, TopK) else None
        threshold = router.select.threshold if isinstance(router.select, TopP) else None
        y, _, _ = hmoe.layer(x, w["router.score.weight"], experts, k=k, threshold=threshold)
        if "branches.1.w_in.weight" in w:
            gate, up = w["branches.1.w_in.weight"].chunk(2)
            down = w["branches.1.w_out.weight"]
            y = y + torch.stack([hmoe.swiglu_expert(x_t, (gate, up, down)) for x_t in x])
        return y

    def _peer(self, x: Tensor, router: ProductKeyRouter) -> Tensor:
        w, norm = self.weights, router.query_norm
        q = peer.queries(x, w["router.query"])
        moments = peer.batch_moments(q) if norm.training else (norm.get_buffer("mean"), norm.get_buffer("variance"))
        q = peer.normalized(q, *moments, w["router.query_norm.weight"], w["router.query_norm.bias"], 1e-5)
        first, second = w["router.keys"].squeeze(1)
        up, down = w["branches.0.up"], w["branches.0.down"]
        return peer.layer(x, q, first, second, up, down, heads=router.heads, k=router.top_k)[0]
