"""This machine as a plan has it (`moestro.plan.Machine`), measured: one thread of its processor as one accelerator.

Medians of several tries. Products: matrices of the shapes that small models multiply, forward and backward. Memory:
products, sums, SiLUs and softmaxes of activations into new tensors. Launch: steps of a model whose blocks have next to
nothing to compute. Links: all-reduces of one number and all-gathers of 8 MB between two processes (gloo). Sharded unit:
FSDP around small linear layers, less its messages.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from bench.harness import ROOT
from bench.processes import run_ranks
from moestro.cost import TRAINING_FLOPS
from moestro.data import Batch
from moestro.ops.cores import own_cores
from moestro.ops.machine_memory import machine_memory
from moestro.parallel import Ranks
from moestro.plan import Machine, workload
from moestro.plan.timing import kernels
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import dump_yaml
from moestro.train.step import backward

TRIES, UNITS = 9, 8
SMALL = ("model.d_model=8", "model.n_layers=8", "model.ffn.width=8", "train.batch_size=1")
# tokens, inputs, outputs
SHAPES = [(1024, 128, 512), (1024, 512, 128), (1024, 128, 128), (256, 128, 128), (1024, 128, 2048)]
SHAPES += [(512, 128, 64), (512, 64, 128)]


def typical(run: Callable[[], object], times: int = 1) -> float:
    """Seconds of one call: the median of `TRIES` tries, each of so many calls."""
    found = []
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        for _ in range(times):
            run()
        found.append((time.perf_counter() - start) / times)
    return median(found[1:])


def products() -> float:
    """FLOP/s of the three products of a linear layer, all shapes together, of matrices that lie in no near cache."""
    flops = seconds = 0.0
    for tokens, n_in, n_out in SHAPES:
        sizes = (tokens, n_in), (n_out, n_in), (tokens, n_out)
        layers = [tuple(torch.randn(*size) for size in sizes) for _ in range(8)]
        each = (lambda x, w, y: x @ w.T, lambda x, w, y: y @ w, lambda x, w, y: y.T @ x)
        seconds += sum(typical(partial(_of_all, product, layers)) for product in each)
        flops += 8 * 3 * 2.0 * tokens * n_in * n_out
    return flops / seconds


def _of_all(product: Callable[..., Tensor], layers: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    return [product(*layer) for layer in layers]


def memory_bandwidth() -> float:
    """Bytes a second that elementwise kernels read and write."""
    pairs = [(torch.randn(2048, 512), torch.randn(2048, 512)) for _ in range(8)]
    whole = sum(a.nbytes for a, _ in pairs)
    kernels: list[tuple[int, Callable[..., Tensor]]] = [(3, torch.mul), (3, torch.add), (2, lambda a, _: F.silu(a))]
    kernels.append((2, lambda a, _: a.log_softmax(-1)))
    seconds = sum(typical(partial(_of_all, kernel, pairs)) for _, kernel in kernels)
    return whole * sum(arrays for arrays, _ in kernels) / seconds


def launch() -> float:
    """Seconds that a kernel costs however small: of a step of a model of 8 blocks of width 8 on 8 tokens."""
    recipe = load_recipe(ROOT / "recipes" / "dense.yaml", SMALL)
    settings, model, work = build_training(recipe)[0], build_model(recipe, 256), workload(recipe, 256)
    text = torch.zeros(1, 8, dtype=torch.int64)
    batch = Batch(text, text, torch.zeros_like(text), torch.ones_like(text))
    step = typical(lambda: backward(model, batch, settings, [], [], Ranks.alone()), 3)
    return step / (TRAINING_FLOPS * kernels(work))


def links() -> tuple[float, float, float]:
    """(seconds of a small message, bytes a second one way, seconds that a sharded unit costs besides) between two
    processes."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks("messages between two processes", 2, _end, Path(folder))
        latency, bandwidth, unit = json.loads((Path(folder) / "found.json").read_text())
    return latency, bandwidth, unit


def _end(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    one, part, whole = torch.ones(1), torch.ones(2**21), torch.ones(2**22)
    latency = typical(lambda: dist.all_reduce(one), 50)
    bandwidth = part.nbytes / typical(lambda: dist.all_gather_single(whole, part))
    unit = max(1e-9, sharded_unit() - 3 * latency)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps([latency, bandwidth, unit]))
    dist.destroy_process_group()


def sharded_unit() -> float:
    """Seconds by which FSDP makes a forward and a backward pass of a small linear layer longer."""
    plain, sharded = (nn.Sequential(*(nn.Linear(8, 8) for _ in range(UNITS))) for _ in range(2))
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")  # type: ignore[arg-type]
    for layer in sharded:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x = torch.ones(4, 8)
    alone, together = (typical(lambda: model(x).sum().backward()) for model in (plain, sharded))  # noqa: B023 (at once)
    return (together - alone) / UNITS


def measured_machine() -> Machine:
    """All of it. Processes of one host are its ranks; nothing hides behind computation, which the same core does."""
    latency, bandwidth, unit = links()
    speed = products()
    return Machine(
        "CPU",
        memory=float(machine_memory() or 1),
        memory_bandwidth=memory_bandwidth(),
        bf16=speed,
        fp32=speed,
        per_host=own_cores(),
        link=bandwidth,
        network=bandwidth,
        latency=latency,
        network_latency=latency,
        launch=launch(),
        efficiency=1.0,
        overlap=0.0,
        sharded_unit=unit,
    )


def as_yaml(machine: Machine) -> str:
    """What `moestro plan --gpu FILE` reads."""
    return dump_yaml(vars(machine))
