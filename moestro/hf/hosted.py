"""`Hosted`: a decoder of transformers whose feed-forward blocks are our layers, called as our own decoder is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moestro.cost import NOTHING, Cost, Kept, of_products
from moestro.hf.packed import packed_mask, positions_within
from moestro.hf.view import layer_of, places
from moestro.layers import Layer, MoELayer, adapter_flops
from moestro.model import Output
from moestro.model.active import idle_parameters
from moestro.model.causality import looking_ahead, require_causal
from moestro.routers import BiasedRouter, ScoredRouter
from moestro.routing import Trace

# Families whose decoder layers take what the block returned besides its output.
RETURNS_A_PAIR = {"gpt_oss"}


class HostedBlock(nn.Module):
    """What a decoder layer of another library calls in place of its feed-forward block: `ffn`, any layer of ours that
    returns what is added to the residual stream."""

    causal = True

    def __init__(self, ffn: Layer) -> None:
        super().__init__()
        self.ffn = ffn


class Bridge(nn.Module):
    """Stands where the library's block stood. Its layer belongs to `Hosted`, which tells it what the library does not
    pass on: which tokens count, and where traces go."""

    def __init__(self, host: "Hosted", block: HostedBlock, pair: bool) -> None:
        super().__init__()
        # not as submodules: they are named under `Hosted.blocks`, once
        self.to_host, self.pair = (host, block), pair

    def forward(self, x: Float[Tensor, "b s d"]) -> Any:
        host, block = self.to_host
        ffn: Any = block.ffn
        y, traces = ffn(x, host.keep, tuple(host.traces or ())) if ffn.follows else ffn(x, host.keep)
        if host.traces is not None:
            host.traces.extend(traces)
        return (y, None) if self.pair else y


class Hosted(nn.Module):
    """A decoder of transformers in which every feed-forward block is a layer of ours: over the block's own tensors
    (`hf.view`), or the one that `layers` names by the block's number. Called as `moestro.model.Transformer` is.

    `blocks[i].ffn` is the layer of block i, `decoder` everything else, and generates as ever. Positions restart with
    every packed document, as transformers has it; the layers of a state-space model (Jamba) carry on across them all
    the same.

    Raises: ValueError for a family that is not known, a layer that owns its residual, a number that is no block, and,
    unless `allow_non_causal`, a layer that looks at other tokens.
    """

    def __init__(
        self, decoder: PreTrainedModel, layers: Mapping[int, Layer] | None = None, allow_non_causal: bool = False
    ) -> None:
        super().__init__()
        layers, found = dict(layers or {}), places(decoder)
        if unknown := layers.keys() - found.keys():
            raise ValueError(f"layer {min(unknown)}, allowed: 0 to {len(found) - 1}")
        self.decoder = decoder
        self.stock_blocks = {number: place.block for number, place in found.items()}
        own = {number: layers.get(number) or layer_of(decoder.config, place.block) for number, place in found.items()}
        self.blocks = nn.ModuleList(HostedBlock(own[number]) for number in found)
        for number, block in enumerate(self._blocks()):
            if block.ffn.owns_residual:
                raise ValueError(
                    f"layer {number}: {type(block.ffn).__name__} owns its residual, which transformers adds"
                )
            found[number].put(Bridge(self, block, decoder.config.model_type in RETURNS_A_PAIR))
        self.vocab_size: int = decoder.config.vocab_size
        self.d_model: int = decoder.config.hidden_size
        self.keep: Tensor | None = None
        # of the forward pass that is going on, None between them: what backward computes again leaves none behind
        self.traces: list[Trace] | None = None
        self._recompute, self._collecting = False, False
        decoder.register_forward_pre_hook(self._begin)
        decoder.register_forward_hook(self._end, always_call=True)
        if not allow_non_causal:
            require_causal(self)

    def forward(
        self,
        tokens: Int[Tensor, "b s"],
        *,
        documents: Int[Tensor, "b s"] | None = None,
        keep: Bool[Tensor, "b s"] | None = None,
        cache: Cache | None = None,
    ) -> Output:
        """Logits of the next token after each token, and a trace for every MoE layer; arguments as those of
        `Transformer.forward`, `cache` as from `new_cache`.

        Raises: ValueError where `documents` and `cache` come together.
        """
        if documents is not None and cache is not None:
            raise ValueError("documents (packed training text) and cache (generation) exclude each other")
        positions = None if documents is None else positions_within(documents)
        decoder: Any = self.decoder
        mask = None if positions is None else packed_mask(self.decoder, tokens, positions)
        known = {"position_ids": positions, "attention_mask": mask, "past_key_values": cache}
        self.keep, self._collecting = keep, True
        try:
            found = decoder(input_ids=tokens, use_cache=cache is not None, **known)
            return Output(found.logits, tuple(self.traces or ()))
        finally:
            self.keep, self.traces, self._collecting = None, None, False

    def _begin(self, decoder: nn.Module, _arguments: Any) -> None:
        """The decoder may also be called by itself, to generate: layers that follow others need traces then, too."""
        self.traces = []

    def _end(self, decoder: nn.Module, _arguments: Any, _output: Any) -> None:
        if not self._collecting:
            self.traces = None

    def _told_again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a block's forward pass and of its second one, in backward, which is told what the first was."""
        return nullcontext(), self._keeping(self.keep)

    @contextmanager
    def _keeping(self, keep: Tensor | None) -> Iterator[None]:
        before, self.keep = self.keep, keep
        try:
            yield
        finally:
            self.keep = before

    def new_cache(self) -> Cache:
        """An empty cache of earlier tokens."""
        return DynamicCache(config=self.decoder.config)

    @property
    def head(self) -> nn.Module:
        """What maps hidden states to logits."""
        return self.decoder.get_output_embeddings()  # type: ignore[return-value]

    @property
    def causal(self) -> bool:
        """Whether no token depends on later ones."""
        return not looking_ahead(self)

    @property
    def recompute(self) -> bool:
        """Whether blocks are computed again in the backward pass while training instead of stored."""
        return self._recompute

    @recompute.setter
    def recompute(self, wanted: bool) -> None:
        if wanted and any(block.ffn.follows for block in self._blocks()):
            raise ValueError("recompute: true with a layer that follows others, whose traces are gone by then")
        # the old name, which transformers 6 drops, where there is no new one yet
        name = "activation" if hasattr(self.decoder, "activation_checkpointing_enable") else "gradient"
        if wanted:
            getattr(self.decoder, f"{name}_checkpointing_enable")(
                {"use_reentrant": False, "context_fn": self._told_again}
            )
        elif self._recompute:
            getattr(self.decoder, f"{name}_checkpointing_disable")()
        self._recompute = wanted

    @property
    def longest(self) -> int | None:
        """Most tokens in a row, None where positions are no table of so many (GPT-2's) but computed."""
        table = getattr(self.decoder.base_model, "wpe", None)
        return None if table is None else table.num_embeddings

    def moe_layers(self) -> dict[str, MoELayer]:
        """Every MoE layer by its name in the model, in block order."""
        return {name: module for name, module in self.named_modules() if isinstance(module, MoELayer)}

    def decoder_layers(self) -> list[nn.Module]:
        """What maps one hidden state to the next, in order: called with the state first, the new one comes first."""
        return [place.layer for place in places(self.decoder).values()]

    def n_mixtures(self) -> int:
        """Blocks whose feed-forward layer has experts, however many MoE layers it is made of."""
        return len({name.split(".")[1] for name in self.moe_layers()})

    def flops(self, batch: int, seq_len: int, traces: Sequence[Trace]) -> Cost:
        """Forward FLOPs on `batch` sequences of what the traces show was used: projections, scores and sums of
        attention (sliding windows as if they were none), routers, experts, head. Scans of state-space layers are not
        counted."""
        untraced = sum((block.ffn.untraced_flops(batch * seq_len) for block in self._blocks()), NOTHING)
        return sum((trace.flops() for trace in traces), self._backbone_flops(batch, seq_len) + untraced)

    def expected_token_flops(self, seq_len: int) -> float:
        """Useful forward FLOPs of a token before anything is learned, in sequences of `seq_len` tokens."""
        backbone = float(self._backbone_flops(1, seq_len).useful) / seq_len
        return backbone + sum(block.ffn.expected_token_flops() for block in self._blocks())

    def kept_per_token(self) -> list[Kept]:
        """What a token leaves in each block for backward: what the layers know of themselves; of the rest, what
        every linear map reads and returns, and two norms."""
        blocks, d = self._blocks(), self.decoder.config.get_text_config().hidden_size
        own = {id(module) for block in blocks for module in block.modules()}
        linear = [m for m in self.decoder.modules() if isinstance(m, nn.Linear | Conv1D) and id(m) not in own]
        numbers = sum(sum(m.weight.shape) for m in linear if m is not self.decoder.get_output_embeddings())
        backbone = Kept(numbers / len(blocks) + d, 8.0 * (d + 1))
        return [backbone + block.ffn.kept_per_token(d) for block in blocks]

    def active_parameters(self, traces: Sequence[Trace]) -> Float[Tensor, ""] | float:
        """Mean number of parameters a token touches, as `Transformer.active_parameters` counts."""
        return float(sum(p.numel() for p in self.parameters())) - idle_parameters(traces)

    @contextmanager
    def stock(self) -> Iterator[PreTrainedModel]:
        """Inside, the decoder as transformers has it, with its own blocks over the same tensors: to save or to run.

        Raises: ValueError where a block is no longer one of transformers': replaced, its experts moved or not all
        available.
        """
        found = places(self.decoder)
        for number, block in enumerate(self._blocks()):
            if self._restored(number, block) is None:
                kind = type(self.stock_blocks[number]).__name__
                raise ValueError(
                    f"layer {number} is no longer the {kind} of {self.decoder.config.model_type}: it was replaced, or "
                    "experts were added, removed or switched off"
                )
        bridges = {number: place.block for number, place in found.items()}
        try:
            for number, place in found.items():
                place.put(self.stock_blocks[number].train(self.training))
            yield self.decoder
        finally:
            for number, place in found.items():
                place.put(bridges[number])

    def release(self) -> PreTrainedModel:
        """The decoder as a model of its own, to be moved and to generate: with transformers' own blocks where these are
        what they were, else with our layers as its modules. This host is of no use afterwards."""
        for (number, place), block in zip(places(self.decoder).items(), self._blocks(), strict=True):
            stock = self._restored(number, block)
            if stock is None:
                place.block.layer = block
            else:
                place.put(stock.train(self.training))
        return self.decoder

    def _restored(self, number: int, block: HostedBlock) -> nn.Module | None:
        """transformers' own block with what was learned, None where the layer no longer computes what it does."""
        old, router = self.stock_blocks[number], getattr(block.ffn, "router", None)
        # its parameters are the layer's; the bias is a buffer, of which a model that is moved makes another
        if {id(p) for p in block.parameters()} != {id(p) for p in old.parameters()}:
            return None
        if isinstance(router, ScoredRouter) and not bool(router.available.all()):
            return None
        if isinstance(router, BiasedRouter):
            old.gate.e_score_correction_bias = router.bias
        return old

    def _backbone_flops(self, batch: int, seq_len: int) -> Cost:
        """Linear modules outside of the blocks, adapters, and attention, of which causality needs (s + 1) / 2s."""
        kinds = (nn.Linear, Conv1D)
        weights = (m.weight for m in self.decoder.modules() if isinstance(m, kinds))
        linear = of_products(batch * seq_len, *weights)
        square = 2.0 * batch * seq_len * seq_len * _attended(self.decoder)
        attended = Cost(square * (seq_len + 1) / (2 * seq_len), square)
        return linear + attended + adapter_flops(self, batch, seq_len)

    def _blocks(self) -> list[Any]:
        return list(self.blocks)


def _attended(decoder: PreTrainedModel) -> int:
    """Widths of scores and of sums over values, of all heads and layers that attend."""
    config: Any = decoder.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    latent = getattr(config, "kv_lora_rank", None)
    widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim if latent else 2 * head_dim
    layers = [place.layer for place in places(decoder).values()]
    return sum(heads * widths for layer in layers if hasattr(layer, "self_attn") or hasattr(layer, "attn"))
