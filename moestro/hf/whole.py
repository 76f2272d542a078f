"""A decoder of transformers as it is, called as our own decoder is: for whatever needs its logits and its tensors."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moestro.hf.packed import packed_mask, positions_within
from moestro.hf.view import ROUTERS, places
from moestro.model import Output


class Whole(nn.Module):
    """The decoder with its own blocks, also where these are a folder's own code, of which we have no view (`Hosted`
    has ours in their place, and traces). Positions restart with every packed document.

    Raises: ValueError for a family that is not known.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        super().__init__()
        self.decoder = decoder
        self._places = places(decoder)

    def forward(
        self,
        tokens: Int[Tensor, "b s"],
        *,
        documents: Int[Tensor, "b s"] | None = None,
        keep: Bool[Tensor, "b s"] | None = None,
    ) -> Output:
        """Logits of the next token after each token; no traces. `keep` changes nothing: routers of these families see
        every token by itself."""
        decoder: Any = self.decoder
        positions = None if documents is None else positions_within(documents)
        mask = None if positions is None else packed_mask(self.decoder, tokens, positions)
        found = decoder(input_ids=tokens, use_cache=False, position_ids=positions, attention_mask=mask)
        return Output(found.logits, ())

    def decoder_layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return [place.layer for place in self._places.values()]

    def routers(self) -> list[nn.Module]:
        """The modules that score experts, of every layer that has some."""
        blocks = [place.block for place in self._places.values()]
        return [router for block in blocks if hasattr(block, "experts") for router in [_router(block)]]


def _router(block: Any) -> nn.Module:
    return next(getattr(block, name) for name in ROUTERS if hasattr(block, name))


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors under the names, and in the shapes, that a folder of its family keeps them in; tied ones
    under all of their names."""
    with torch.no_grad():
        return revert_weight_conversion(model, model.state_dict())
