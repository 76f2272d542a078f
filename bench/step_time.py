"""Seconds of a training step as `moestro plan` foresees them on this machine, beside those that it takes.

The machine is measured first (`bench.this_machine`: products, memory, launches, messages between processes), then every
case is planned on it and trained: whole optimizer steps on random text, one thread a rank, ranks as processes of this
host that talk by gloo. `ours` is foreseen, `theirs` measured; ratio: measured over foreseen, the median of the steps,
and their 10th and 90th percentile. Not more ranks than cores: what shares a core waits for what it shares it with.
`--threads` changes nothing.

`--describe` writes the measured machine as the YAML that `moestro plan RECIPE --gpu FILE` reads.

    python -m bench.step_time [--quick] [--json PATH] [--describe]
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.distributed as dist

from bench.harness import ROOT, Row, arguments, report
from bench.parallel import tokens
from bench.processes import run_ranks
from bench.this_machine import as_yaml, measured_machine
from moestro.ops.cores import own_cores
from moestro.parallel import ParallelSettings, Ranks
from moestro.parallel.parallelize import parallelize
from moestro.plan import Machine, Spread, StepTime, workload
from moestro.plan.imbalance import EVEN
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import Recipe, load_recipe
from moestro.train.memory import keep_freed_memory
from moestro.train.optim import build_optimizer, clip_gradients
from moestro.train.schedules import weight_at
from moestro.train.step import backward
from moestro.train.tables import prepare_tables

VOCABULARY, STEPS = 2048, 12
TABLES = "model.layers={2: {kind: moe, router: {kind: product_key, heads: 4, top_k: 8, d_key: 64, query_norm: batch}, "
TABLES += "branches: [{kind: singleton, n_experts: 16384, sparse_gradients: true}]}}"
WHOLE, ONCE = ParallelSettings(sharding="none"), ParallelSettings(reshard=False)


@dataclass(frozen=True)
class Case:
    """A recipe on so many ranks."""

    name: str
    recipe: str
    world: int = 1
    settings: ParallelSettings = ParallelSettings()
    changes: Sequence[str] = ()

    @cached_property
    def loaded(self) -> Recipe:
        """The recipe."""
        return load_recipe(ROOT / "recipes" / f"{self.recipe}.yaml", self.changes)

    def foreseen(self, machine: Machine) -> StepTime:
        """The plan of a step."""
        work = workload(self.loaded, VOCABULARY)
        return StepTime(Spread(work, machine, self.world, self.settings, work.settings.accumulate, False, EVEN))


CASES = [
    Case("dense, 1 rank", "dense"),
    Case("dense, 1 rank, 4 micro-batches", "dense", changes=("train.accumulate=4",)),
    Case("dense, 2 ranks, sharded", "dense", 2),
    Case("dense, 2 ranks, gathered once", "dense", 2, ONCE),
    Case("dense, 2 ranks, whole copies", "dense", 2, WHOLE),
    Case("HMoE, 1 rank", "hmoe"),
    Case("HMoE, 2 ranks, sharded", "hmoe", 2),
    Case("HMoE, 2 ranks, experts on 2", "hmoe", 2, ParallelSettings(experts=2)),
    Case("HMoE, 2 ranks, experts on 2, rest whole", "hmoe", 2, replace(WHOLE, experts=2)),
    Case("PEER, 1 rank", "peer", changes=(TABLES,)),
    Case("PEER, 2 ranks, tables by rows", "peer", 2, ParallelSettings(tables="rows"), (TABLES,)),
    Case("PEER, 2 ranks, tables by columns", "peer", 2, ParallelSettings(tables="columns"), (TABLES,)),
    Case("PEER, 2 ranks, by rows, rest whole", "peer", 2, WHOLE, (TABLES,)),
]


def measured(case: Case, steps: int) -> list[float]:
    """Seconds of every step, the slowest rank's.

    Raises: RuntimeError where a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(case.name, case.world, _rank, case, Path(folder), steps)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(case.world)]
    return [max(each) for each in zip(*found, strict=True)]


def _rank(rank: int, case: Case, folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    if case.world > 1:
        meeting = f"file://{folder / 'meeting'}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=case.world)
    ranks = Ranks.grouped(torch.device("cpu"), case.settings) if case.world > 1 else Ranks.alone()
    (folder / f"{rank}.json").write_text(json.dumps(_steps(case, ranks, steps)))
    if case.world > 1:
        dist.destroy_process_group()


def _steps(case: Case, ranks: Ranks, steps: int) -> list[float]:
    """Seconds of each step but two that warm up: what `moestro.train.loop` does, without rules and records."""
    settings, objectives, _ = build_training(case.loaded)
    model = build_model(case.loaded, VOCABULARY)
    prepare_tables(model, settings)
    parallelize(model, ranks, case.settings)
    optimizer = build_optimizer(model, settings.optim)
    now = [(name, weight_at(weight, 0.5, 1), part) for name, weight, part in objectives]
    seconds = []
    for number in range(steps + 2):
        torch.manual_seed(number)
        batch = tokens(settings.batch_size, case.loaded.data.value("seq_len"), VOCABULARY)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        backward(model, batch, settings, now, [], ranks)
        clip_gradients(model, settings.optim.clip, ranks)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def row(case: Case, machine: Machine, steps: int) -> Row:
    """One case, in milliseconds."""
    foreseen = 1e3 * case.foreseen(machine).total
    each = [1e3 * seconds for seconds in measured(case, steps)]
    tenths = [value / foreseen for value in quantiles(each, n=10, method="inclusive")]
    middle = median(each)
    return Row(
        case.name, "seconds a step", "ms", foreseen, "measured", middle, middle / foreseen, (tenths[0], tenths[-1])
    )


def main() -> None:
    options = arguments(__doc__ or "", describe="print this machine as YAML, and nothing else")
    # of each rank, and of what the machine is measured with
    options.threads = 1
    torch.set_num_threads(1)
    machine = measured_machine()
    if options.describe:
        sys.stdout.write(as_yaml(machine))
        return
    cases = [case for case in CASES if case.world <= own_cores()]
    rows = [row(case, machine, 3 if options.quick else STEPS) for case in (cases[:3] if options.quick else cases)]
    report("bench/step_time.py", rows, options, [as_yaml(machine)], "ratio: measured over foreseen")


if __name__ == "__main__":
    main()
