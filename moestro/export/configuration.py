"""The configuration of a moestro model in transformers."""

from typing import Any

from transformers import PreTrainedConfig


class MoestroConfig(PreTrainedConfig):
    """`construction` says what the decoder is made of (`moestro.export.construction`) and decides everything below it;
    the other sizes repeat what other programs ask for. `recipe` is for readers: model, data and training as they were,
    every default written out. `max_position_embeddings` is the length of the training sequences, in tokens; rotary
    positions have no end. `format_version` counts changes of what `construction` and the tensors mean.
    """

    model_type = "moestro"

    def __init__(
        self,
        construction: dict[str, Any] | None = None,
        recipe: dict[str, Any] | None = None,
        moestro_version: str = "",
        max_position_embeddings: int = 2048,
        format_version: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.construction, self.recipe, self.moestro_version = construction, recipe, moestro_version
        self.max_position_embeddings, self.format_version = max_position_embeddings, format_version
        # transformers makes one without arguments to see what differs from it
        super().__init__(**(kwargs | (sizes(construction) if construction else {})))


def sizes(construction: dict[str, Any]) -> dict[str, Any]:
    """What other programs ask a configuration for, under their names."""
    # what is around a decoder has it as its model
    while "model" in construction:
        construction = construction["model"]
    attention = construction["blocks"][0]["attention"]
    heads = attention["n_heads"]
    return {
        "vocab_size": construction["vocab_size"],
        "hidden_size": construction["d_model"],
        "num_hidden_layers": len(construction["blocks"]),
        "num_attention_heads": heads,
        "num_key_value_heads": attention["n_kv_heads"] or heads,
        "head_dim": attention["head_dim"] or construction["d_model"] // heads,
        "rms_norm_eps": construction["norm_eps"],
        "tie_word_embeddings": construction["tie_embeddings"],
    }
