"""Dense decoder families: where the feed-forward matrices of each layer are stored."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DenseFamily:
    """One `model_type`. Templates take {layer} and name weights; biases, where there are any, end in `.bias` instead.

    `gate` is None for a plain MLP (up, activation, down). `transposed`: matrices are kept [in out].
    """

    model_type: str
    gate: str | None
    up: str
    down: str
    layers_key: str = "num_hidden_layers"
    hidden_key: str = "hidden_size"
    width_key: str = "intermediate_size"
    activation_key: str = "hidden_act"
    transposed: bool = False

    def matrices(self, layer: int) -> dict[str, str]:
        """{"gate" where there is one, "up", "down"} -> the name of its weight."""
        parts = {"gate": self.gate, "up": self.up, "down": self.down}
        return {part: name.format(layer=layer) for part, name in parts.items() if name is not None}


_MLP = "model.layers.{layer}.mlp"
DENSE_FAMILIES: Mapping[str, DenseFamily] = {
    **{
        name: DenseFamily(name, f"{_MLP}.gate_proj.weight", f"{_MLP}.up_proj.weight", f"{_MLP}.down_proj.weight")
        for name in ("llama", "mistral", "qwen2", "qwen3")
    },
    # n_inner is null in most folders: the width is then 4 x n_embd
    "gpt2": DenseFamily(
        "gpt2",
        None,
        "transformer.h.{layer}.mlp.c_fc.weight",
        "transformer.h.{layer}.mlp.c_proj.weight",
        "n_layer",
        "n_embd",
        "n_inner",
        "activation_function",
        transposed=True,
    ),
}
