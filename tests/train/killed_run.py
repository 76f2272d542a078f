"""Training processes to be killed. For every line `RUN_DIR fast|slow` on standard input one is forked, so that the
imports are paid once; its pid is printed when it starts, its exit status when it has ended."""

import os
import sys
import time
from pathlib import Path

import torch

from moestro.train import train
from tests.train.tiny import Counting, tiny_model, tiny_settings

STEPS = 80


class Leisurely(Counting):
    """Batches that leave time to be killed in."""

    def train_batch(self, step, batch_size, seed):
        time.sleep(0.005)
        return super().train_batch(step, batch_size, seed)


def slow_disk(handle: int, fsync=os.fsync) -> None:
    time.sleep(0.02)
    fsync(handle)


def train_in(run: str, disk: str) -> None:
    if disk == "slow":
        os.fsync = slow_disk
    train(tiny_model(), Leisurely(), tiny_settings(STEPS), [], [], Path(run))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            train_in(*line.split())
            os._exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
