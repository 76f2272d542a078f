"""Keys and values of the tokens seen so far, and looking into them."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def attend(
    heads: Float[Tensor, "b h s c"],
    keys: Float[Tensor, "b g l c"],
    values: Float[Tensor, "b g l c"],
    mask: Bool[Tensor, "b 1 s l"] | None = None,
) -> Float[Tensor, "b h s c"]:
    """softmax(heads @ keys.T / sqrt(c)) @ values, each of the g keys serving h / g heads; causal where there is no
    `mask` (true = may look)."""
    grouped = heads.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(
        heads, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


class Cache:
    """One growing (keys, values) pair a block, [b, kv_heads, s, head_dim] each; `length` is the tokens held."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens held."""
        return self._layers[0][0].shape[2] if 0 in self._layers else 0

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a block's keys and values and return all of them."""
        if block in self._layers:
            old_keys, old_values = self._layers[block]
            keys, values = torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)
        self._layers[block] = keys, values
        return keys, values

    def attend(
        self, block: int, heads: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Float[Tensor, "b h s c"]:
        """`attend` to all keys and values of a block, these appended."""
        return attend(heads, *self.extend(block, keys, values), mask)
