"""A moestro model as transformers know models: loading, saving, caches, generation."""

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from moestro.export.assembly import assembled
from moestro.export.attention import OWN, HostedCache, host, positions_of, visible
from moestro.export.beside import write_code
from moestro.export.configuration import MoestroConfig
from moestro.export.vocabulary import vocabulary
from moestro.model import Attention, Transformer


class MoestroPreTrainedModel(PreTrainedModel):
    """What both models share. Weights are those of a checkpoint: nothing is ever initialised in their place."""

    config_class = MoestroConfig
    config: MoestroConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # one after another, with whatever layers they hold
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *arguments: Any, output_loading_info: bool = False, **keywords: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`.

        Raises: ValueError where a tensor is missing, which transformers would draw at random.
        """
        loaded: Any = super().from_pretrained(*arguments, output_loading_info=True, **keywords)
        model, found = loaded
        if found["missing_keys"]:
            raise ValueError(f"{arguments[0] if arguments else cls.__name__} lacks tensors: {found['missing_keys']}")
        return (model, found) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *arguments: Any, **keywords: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, with the code that others load the folder with."""
        write_code(self, save_directory)
        super().save_pretrained(save_directory, *arguments, **keywords)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """{name: the name under which the same tensor is stored}: what the construction ties, embeddings or not."""
        return super().get_expanded_tied_weights_keys(True) if all_submodels else dict(self._tied_weights_keys or {})

    def _note_tensors(self) -> None:
        """Remember ties, routers' weights, which stay in float32, and constants, which no file holds."""
        first: dict[int, str] = {}
        named = self.state_dict(keep_vars=True)
        stored = {name: first.setdefault(id(tensor), name) for name, tensor in named.items()}
        self._tied_weights_keys = {name: source for name, source in stored.items() if name != source}
        self._keep_in_fp32_modules_strict = {name for name, tensor in named.items() if stays_wide(name, tensor)}
        for module in self.modules():
            names = module._non_persistent_buffers_set
            module.__dict__["_constants"] = {name: module.get_buffer(name).detach().clone() for name in names}

    def _init_weights(self, module: nn.Module) -> None:
        """Constructors have drawn weights; constants, which transformers empties, get their values back."""
        for name, value in getattr(module, "_constants", {}).items():
            module.get_buffer(name).copy_(value)


def stays_wide(name: str, tensor: Tensor) -> bool:
    """Whether a tensor keeps float32 in a model of a narrower dtype: routers are small, and decide discrete choices."""
    return tensor.is_floating_point() and "router" in name.split(".")


class MoestroModel(MoestroPreTrainedModel):
    """Embedding, blocks and norm of the decoder that `config.construction` describes."""

    def __init__(self, config: MoestroConfig) -> None:
        super().__init__(config)
        decoder: Transformer = assembled(config.construction, vocabulary())
        self.embedding, self.blocks, self.norm = decoder.embedding, decoder.blocks, decoder.norm
        # in a tuple: its modules are registered above, but for the head, which is not this model's
        self._decoder = (decoder,)
        self.gradient_checkpointing = False
        host(_attentions(decoder))
        self._note_tensors()
        self.post_init()

    @property
    def decoder(self) -> Transformer:
        """The decoder, as the package has it; its parameters are this model's."""
        return self._decoder[0]

    def get_decoder(self) -> "MoestroModel":
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = self.decoder.embedding = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """What the head reads. `attention_mask` [b, earlier and these tokens] is 0 for padding, on either side.

        Raises: ValueError for a mask of another form, and for a cache where tokens depend on later ones.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cache = self._cache(past_key_values, kwargs)
        length, past = x.shape[1], 0 if cache is None else cache.length
        present = _present(attention_mask, len(x), past + length)
        positions = positions_of(present, length, past, x) if position_ids is None else position_ids
        keep = None if present is None else present[:, past:]
        self.decoder.recompute = self.gradient_checkpointing and self.training
        x, _ = self.decoder.hidden(x, positions, visible(present, length, past, x), keep, cache)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)

    def _cache(self, past: Any, told: dict[str, Any]) -> HostedCache | None:
        """What attention looks into; None where that is these tokens alone, in the model's own way."""
        implementation = self.config._attn_implementation or OWN[0]
        if past is None and implementation in OWN:
            return None
        if past is not None and not self.decoder.causal:
            raise ValueError("tokens of this model depend on later ones, so nothing can be cached: use_cache=False")
        if past is not None and getattr(past, "is_compileable", False):
            raise ValueError(f"{type(past).__name__} has a fixed size; allowed: caches that grow, such as DynamicCache")
        return HostedCache(past, implementation, _attentions(self.decoder), told)


def _attentions(decoder: Transformer) -> list[Attention]:
    return [block.attention for block in decoder.blocks]  # type: ignore[misc]


def _present(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Which tokens are no padding; None where all are."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask {list(attention_mask.shape)}, allowed: [{batch}, {length}], earlier tokens too"
        )
    present = attention_mask.bool()
    return None if bool(present.all()) else present


class MoestroForCausalLM(MoestroPreTrainedModel, GenerationMixin):
    """The decoder with its head, for next-token logits and generation."""

    def __init__(self, config: MoestroConfig) -> None:
        super().__init__(config)
        self.model = MoestroModel(config)
        self.lm_head = self.model.decoder.head
        self._note_tensors()
        self.post_init()

    @property
    def decoder(self) -> Transformer:
        """The decoder, as the package has it; its parameters are this model's."""
        return self.model.decoder

    def get_decoder(self) -> MoestroModel:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = self.decoder.head = new_embeddings  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token after each, or after the last `logits_to_keep`; with `labels` (-100: none) the mean
        cross entropy in nats. The rest as for `MoestroModel`."""
        count = {name: kwargs.pop(name) for name in ("num_items_in_batch",) if name in kwargs}
        found = self.model(input_ids, attention_mask, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.vocab_size, **count)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=found.past_key_values)

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return self.config.vocab_size
