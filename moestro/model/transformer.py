"""A Llama-style causal decoder whose every block may have another feed-forward layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro.cost import TRAINING_FLOPS, Cost, Kept, of_products
from moestro.layers.adapted import adapter_flops
from moestro.layers.moe import MoELayer
from moestro.model.active import idle_parameters
from moestro.model.block import Block
from moestro.model.cache import Cache
from moestro.model.causality import looking_ahead, require_causal
from moestro.routing import Trace


@dataclass(frozen=True)
class Output:
    """Next-token logits, and one trace for every MoE layer in block order, those inside other layers included."""

    logits: Float[Tensor, "b s v"]
    traces: tuple[Trace, ...]


class Transformer(nn.Module):
    """Embedding, blocks, RMS norm, output head (Touvron 2023, arXiv:2302.13971, without biases).

    `recompute = True` recomputes each block in the backward pass instead of storing it (activation checkpointing);
    losses and gradients are the same. Embeddings start with standard deviation 0.02 where they are tied to the head and
    1 where they are not; the head with 0.02 or d_model^-0.5.

    Raises: ValueError for parts that look at other tokens (slots, expert choice, mixture-of-depths) unless
    `allow_non_causal`: their predictions would leak the future.
    """

    recompute: bool = False

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        blocks: Sequence[Block],
        tie_embeddings: bool = False,
        norm_eps: float = 1e-5,
        allow_non_causal: bool = False,
    ) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("blocks=[], allowed: at least one block")
        self.vocab_size, self.d_model, self.tie_embeddings = vocab_size, d_model, tie_embeddings
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02 if tie_embeddings else 1.0)
        nn.init.normal_(self.head.weight, std=d_model**-0.5)
        if tie_embeddings:
            self.head.weight = self.embedding.weight
        if not allow_non_causal:
            require_causal(self)

    @property
    def causal(self) -> bool:
        """Whether no token depends on later ones, so that a cache of earlier ones can be continued."""
        return not looking_ahead(self)

    def forward(
        self,
        tokens: Int[Tensor, "b s"],
        *,
        documents: Int[Tensor, "b s"] | None = None,
        keep: Bool[Tensor, "b s"] | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits of the next token after each token.

        `documents` numbers the packed documents: attention stays inside one, positions keep counting. keep=False marks
        padding on the right: it reaches no router and its logits mean nothing. `cache` holds earlier tokens and is
        extended by these.

        Raises: ValueError where `documents` and `cache` come together.
        """
        if documents is not None and cache is not None:
            raise ValueError("documents (packed training text) and cache (generation) exclude each other")
        past = 0 if cache is None else cache.length
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        mask = _attention_mask(tokens, documents, past)
        x, traces = self.hidden(self.embedding(tokens), positions, mask, keep, cache)
        return Output(self.head(x), traces)

    def hidden(
        self,
        x: Float[Tensor, "b s d"],
        positions: Int[Tensor, "#b s"],
        mask: Bool[Tensor, "b 1 s l"] | None = None,
        keep: Bool[Tensor, "b s"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Tensor, "b s d"], tuple[Trace, ...]]:
        """What the head reads, of embedded tokens, and the traces; `mask` (true = may look) and `positions` are what
        `forward` derives for tokens without padding on the left."""
        traces: list[Trace] = []
        for index, block in enumerate(self.blocks):
            earlier = tuple(traces)
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x, new = checkpoint(block, x, positions, mask, keep, None, index, earlier, use_reentrant=False)
            else:
                x, new = block(x, positions, mask, keep, cache, index, earlier)
            traces.extend(new)
        return self.norm(x), tuple(traces)

    def moe_layers(self) -> dict[str, MoELayer]:
        """Every MoE layer by its name in the model, in block order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoELayer)}

    def decoder_layers(self) -> list[nn.Module]:
        """What maps one hidden state to the next, in order: called with the state first, the new one comes first."""
        return list(self.blocks)

    def n_mixtures(self) -> int:
        """Blocks whose feed-forward layer has experts, however many MoE layers it is made of."""
        return len({name.split(".")[1] for name in self.moe_layers()})

    def flops(self, batch: int, seq_len: int, traces: Sequence[Trace]) -> Cost:
        """Forward FLOPs on `batch` sequences of what the traces show was used; attention, routers, head counted."""
        head = of_products(batch * seq_len, self.head.weight)
        backbone = sum((block.flops(batch, seq_len) for block in self._blocks()), head)
        backbone += adapter_flops(self, batch, seq_len)
        return sum((trace.flops() for trace in traces), backbone)

    def expected_token_flops(self, seq_len: int) -> float:
        """Useful forward FLOPs of a token before anything is learned, in sequences of `seq_len` tokens."""
        adapters = float(adapter_flops(self, 1, seq_len).useful) / seq_len
        head = 2.0 * self.head.weight.numel()
        return head + adapters + sum(block.expected_token_flops(seq_len) for block in self._blocks())

    def expected_training_flops(self, seq_len: int) -> float:
        """Useful training FLOPs of a token before anything is learned: three times the forward pass's, less what is
        spared where weights are frozen (experts count as if they learned)."""
        return TRAINING_FLOPS * self.expected_token_flops(seq_len) - float(self.flops(1, seq_len, ()).spared) / seq_len

    def kept_per_token(self) -> list[Kept]:
        """What a token leaves in each block for the backward pass, before anything is learned."""
        return [block.kept_per_token() for block in self._blocks()]

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # type: ignore[arg-type]

    def active_parameters(self, traces: Sequence[Trace]) -> Float[Tensor, ""] | float:
        """Mean number of parameters a token touches: everything but the experts' weights, of which those it used. A 0-d
        tensor where the traces are on a device, so that counting does not wait for it.

        Counts as Wang 2024, arXiv:2408.10681, Table 1 does: embedding, head, attention, norms, router, experts used.
        """
        total = float(sum(p.numel() for p in self.parameters()))
        return total - sum(block.idle_parameters() for block in self._blocks()) - idle_parameters(traces)


def _attention_mask(tokens: Tensor, documents: Tensor | None, past: int) -> Bool[Tensor, "b 1 s l"] | None:
    """None where plain causality is enough."""
    length = tokens.shape[1]
    if documents is None and past == 0:
        return None
    causal = torch.ones(length, past + length, dtype=torch.bool, device=tokens.device).tril(past)
    if documents is None:
        return causal.expand(len(tokens), 1, -1, -1)
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]
