"""Keys and values of the tokens seen so far."""

import torch
from torch import Tensor


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
