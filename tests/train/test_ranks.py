"""Query statistics where two processes train the same model."""

import multiprocessing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from moestro.routers.query_norm import BatchQueryNorm
from moestro.train import QueryNormStatistics
from tests.tolerances import FLOAT32
from tests.train.tiny import WIDTH, peer

TOKENS = {0: (7, 20), 1: (5,)}


def micro_batches(rank: int) -> list[torch.Tensor]:
    """What a rank sees in the first step: other tokens and another spread than the other one."""
    generator = torch.Generator().manual_seed(rank)
    return [3 * rank + (1 + rank) * torch.randn(n, WIDTH, generator=generator) for n in TOKENS[rank]]


def train_on(rank: int, meeting_point: Path, output: Path) -> None:
    """One process: three steps of one layer, and what its statistics are then."""
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer, rule = peer(), QueryNormStatistics()
    norm = layer.router.get_submodule("query_norm")
    assert isinstance(norm, BatchQueryNorm)
    saved = {"query": layer.router.get_parameter("query").detach()}
    for x in micro_batches(rank):
        rule.observe(layer(x)[1][0])
    rule.apply(1)
    saved |= {"mean": norm.mean.clone(), "variance": norm.variance.clone()}
    # the second step is nothing but padding on rank 1, the third on both
    for step, tokens in ((2, rank == 0), (3, False)):
        rule.observe(layer(torch.ones(4, WIDTH), torch.full((4,), tokens))[1][0])
        rule.apply(step)
    save_file({**saved, "updates": norm.updates, "last": norm.mean}, output)
    dist.destroy_process_group()


def test_ranks_keep_the_statistics_of_all_their_tokens(tmp_path):
    outputs = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=train_on, args=(r, tmp_path / "meeting", o)) for r, o in enumerate(outputs)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0]
    first, second = (load_file(output) for output in outputs)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    queries = torch.cat([*micro_batches(0), *micro_batches(1)]).double() @ first["query"].double().T
    torch.testing.assert_close(first["mean"].double(), queries.mean(0), **FLOAT32)
    torch.testing.assert_close(first["variance"].double(), queries.var(0, correction=0), **FLOAT32)
    # a rank of nothing but padding keeps pace; a step of nothing else moves nothing
    assert first["updates"] == 2
    moved = 0.9 * first["mean"] + 0.1 * (torch.ones(1, WIDTH) @ first["query"].T)[0]
    torch.testing.assert_close(first["last"], moved, **FLOAT32)
