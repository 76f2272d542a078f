"""Several ranks on this host, started by torchrun's own agent."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from moestro.ops.cores import own_cores


def launch(n_ranks: int, words: Sequence[str], max_restarts: int = 0) -> int:
    """Run `python -m moestro WORDS` on `n_ranks` ranks of this host; returns the exit code. After a rank is lost all
    are started anew, up to `max_restarts` times, and continue from the last checkpoint. The ranks print for themselves.

    Each rank gets its share of the cores that this process has, unless OMP_NUM_THREADS is set.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, own_cores() // n_ranks)))
    # its reports repeat what the failed rank has said
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = ["--standalone", f"--nproc-per-node={n_ranks}", f"--max-restarts={max_restarts}", "-m", "moestro"]
    try:
        torchrun.run(torchrun.parse_args([*options, *words]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(
                f"moestro: rank {rank} of {n_ranks} was ended by {name}; the same command continues from the last "
                "checkpoint",
                file=sys.stderr,
            )
            return 1
        return failure.exitcode
    except SignalException:
        return 0  # the ranks have saved, and said so
    return 0
