"""Attention of a moestro model inside transformers: its caches, its masks, its other implementations."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moestro.model import Attention
from moestro.model.cache import Cache, attend

# What the model computes by itself, with torch's scaled_dot_product_attention.
OWN = ("sdpa", "eager")


class HostedCache(Cache):
    """A cache of transformers as the model's own, and its implementation of attention as the model's attention."""

    def __init__(self, past: Any, implementation: str, modules: list[Attention], told: dict[str, Any]) -> None:
        super().__init__()
        self.past, self.implementation, self.modules, self.told = past, implementation, modules, told

    @property
    def length(self) -> int:
        return 0 if self.past is None else self.past.get_seq_length()

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return (keys, values) if self.past is None else self.past.update(keys, values, block)

    def attend(self, block: int, heads: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        keys, values = self.extend(block, keys, values)
        if self.implementation in OWN:
            return attend(heads, keys, values, mask)
        module = self.modules[block]
        function = ALL_ATTENTION_FUNCTIONS[self.implementation]
        out, _ = function(
            module, heads, keys, values, mask, dropout=0.0, scaling=module.head_dim**-0.5, is_causal=True, **self.told
        )
        # tokens first, however many dimensions say so: servers run sequences into one
        return out.reshape(len(heads), heads.shape[2], module.n_heads, -1).transpose(1, 2)


def host(modules: list[Attention]) -> None:
    """Give attention modules the names under which implementations of transformers look for what they need."""
    for index, module in enumerate(modules):
        groups = module.n_heads // module.n_kv_heads
        module.__dict__.update(layer_idx=index, is_causal=True, num_key_value_groups=groups)


def visible(
    present: Bool[Tensor, "b l"] | None, length: int, past: int, like: Tensor
) -> Bool[Tensor, "b 1 s l"] | None:
    """Which of `past` + `length` tokens each of the last `length` may look at: earlier ones that are `present`, and
    itself. None where plain causality says the same."""
    if past == 0 and present is None:
        return None
    causal = torch.ones(length, past + length, dtype=torch.bool, device=like.device).tril(past)
    if present is None:
        return causal.expand(len(like), 1, -1, -1)
    # padding looks at itself: a softmax over nothing is not a number, and zero times that is none either
    itself = torch.eye(past + length, dtype=torch.bool, device=like.device)[past:]
    return (causal & (present[:, None, :] | itself))[:, None]


def positions_of(present: Bool[Tensor, "b l"] | None, length: int, past: int, like: Tensor) -> Int[Tensor, "#b s"]:
    """Positions of the last `length` tokens: those present are counted, from 0."""
    if present is None:
        return torch.arange(past, past + length, device=like.device)[None]
    return (present.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
