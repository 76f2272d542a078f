"""Routings of our own models as ids and weights of every token."""

import torch
from torch import Tensor

from moestro.offload.files import OffloadError
from moestro.routing import Routing, SparseRouting

Chosen = tuple[Tensor, Tensor]


def chosen(routing: Routing) -> Chosen:
    """Ids and weights [t, k]; where tokens differ in the number of their experts (top-p), k is the largest, and others
    are filled up with their first expert at weight 0.

    Raises: OffloadError for routings in which every expert takes part, and where a token has none.
    """
    if not isinstance(routing, SparseRouting):
        raise OffloadError(f"{type(routing).__name__}: every token uses every expert, so there is none to leave away")
    if routing.fixed is not None:
        return routing.matrix()
    counts = torch.bincount(routing.token, minlength=routing.n_tokens)
    if int(counts.min()) < 1:
        raise OffloadError("a token has no expert: offloading needs at least one for every token")
    order = routing.token.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.arange(int(counts.max()), device=order.device)[None].expand(routing.n_tokens, -1)
    inside = place < counts[:, None]
    at = order[starts[:, None] + torch.where(inside, place, 0)]
    return routing.expert[at], routing.weight[at] * inside
