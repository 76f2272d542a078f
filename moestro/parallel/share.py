"""The part of a batch that a rank reads."""

from dataclasses import replace

import torch

from moestro.data import IGNORE, Batch
from moestro.parallel.ranks import Ranks


def own_share(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's rows of a batch that all ranks have, in order of ranks. Where it has fewer rows than there are ranks,
    some get a row without targets, which counts nothing: all ranks call the model as often."""
    own = ranks.own_rows(len(batch.tokens))
    if own.start < own.stop or not ranks.several:
        return batch.rows(own.start, own.stop)
    row = batch.rows(0, 1)
    return replace(row, targets=torch.full_like(row.targets, IGNORE), n_bytes=torch.zeros_like(row.n_bytes))
