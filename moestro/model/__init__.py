"""Floor 4: the causal decoder. Returns logits and traces; losses are never side state."""

from moestro.model.attention import Attention
from moestro.model.block import Block
from moestro.model.cache import Cache
from moestro.model.depths import Depths, PassedBlock
from moestro.model.transformer import Output, Transformer

__all__ = ["Attention", "Block", "Cache", "Depths", "Output", "PassedBlock", "Transformer"]
