"""Experts and tables that ranks hold for each other."""

from torch import nn

from moestro.experts import ExpertBank
from moestro.parallel.ranks import Ranks
from moestro.parallel.settings import ParallelSettings


def distribute_experts(model: nn.Module, ranks: Ranks, settings: ParallelSettings) -> None:
    """Put in place of banks of experts those that hold a rank's own experts or its part of a table; `lay_out` tells of
    each such parameter where it lies in the whole one, under the name that it has in one process.

    Raises: ValueError where a model or settings ask for what there is not.
    """
    if settings.experts > 1 or settings.placement is not None:
        raise ValueError(f"parallel experts={settings.experts}: expert parallelism is not there")
    for name, module in model.named_modules():
        if isinstance(module, ExpertBank) and module.row_parameters():
            raise ValueError(f"{name} trains by rows (sparse_gradients: true), which works in one process only")
