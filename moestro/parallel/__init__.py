"""Floor 7: one model trained by several processes, on PyTorch's own stack. The only home of torch.distributed."""

from moestro.parallel.ranks import RankLost, Ranks, joined
from moestro.parallel.settings import ParallelSettings
from moestro.parallel.sums import n_ranks, several_ranks, summed_over_ranks

__all__ = [
    "ParallelSettings", "RankLost", "Ranks", "joined", "n_ranks", "several_ranks", "summed_over_ranks",
]  # fmt: skip
