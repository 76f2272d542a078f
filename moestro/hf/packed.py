"""Packed documents for decoders of transformers: positions that restart, masks that stay inside a document."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

# Families whose attention masks do not look at the positions, from which documents are known (transformers 5.23).
MASKS_WITHOUT_POSITIONS = {"gpt_oss"}


def positions_within(documents: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """Each token's place in its document."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return place - torch.where(begins, place, 0).cummax(dim=1).values


def packed_mask(decoder: PreTrainedModel, tokens: Tensor, positions: Tensor) -> dict[str, Any] | None:
    """Attention masks for packed documents, for families that do not derive them from the positions."""
    if decoder.config.model_type not in MASKS_WITHOUT_POSITIONS:
        return None
    embedded = decoder.get_input_embeddings()(tokens)
    known: dict[str, Any] = {"attention_mask": None, "past_key_values": None, "position_ids": positions}
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    return {kind: make(decoder.config, embedded, **known) for kind, make in makers.items()}
