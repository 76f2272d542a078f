"""What two processes that train the same model agree on: statistics of queries, balance losses, what rules do."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from moestro import FFNBank, LinearScore, MoELayer, ParameterPenalty, ScoredRouter
from moestro.routers import BiasedRouter, SteeredTopP
from moestro.routers.query_norm import BatchQueryNorm
from moestro.train import BiasBalance, ExpertDropout, QueryNormStatistics, SteerThreshold
from moestro.train.optim import build_optimizer
from moestro.train.settings import OptimSettings
from moestro.train.step import backward
from tests.tolerances import FLOAT32, FLOAT64
from tests.train.tiny import WIDTH, Counting, peer, tiny_model, tiny_settings

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


def penalty_gradients(rows: slice, statistics: str) -> dict[str, torch.Tensor]:
    """Router gradients of the penalty alone, of some sequences of a batch of 8, in micro-batches of 2."""
    batch = Counting().train_batch(0, 8, seed=0).rows(rows.start, rows.stop)
    model = tiny_model(kinds=("moe", "moe")).double()
    settings = tiny_settings(batch_size=len(batch.tokens), accumulate=len(batch.tokens) // 2)
    gradients = []
    for weight in (0.0, 1.0):
        model.zero_grad()
        backward(model, batch, settings, [("it", weight, ParameterPenalty(statistics=statistics))], [])
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if "router" in name})
    return {name: gradients[1][name] - gradients[0][name] for name in gradients[0]}


def balance_on(rank: int, meeting_point: Path, output: Path) -> None:
    """One process: the penalty's gradients of its half of the batch."""
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    saved = {
        f"{statistics} {name}": gradient
        for statistics in ("step", "micro_batch")
        for name, gradient in penalty_gradients(slice(4 * rank, 4 * rank + 4), statistics).items()
    }
    save_file(saved, output)
    dist.destroy_process_group()


def steered(shares: list[int]) -> dict[str, torch.Tensor]:
    """Biases, threshold and resting experts after three steps with these shares (of 2) of every step's tokens."""
    torch.manual_seed(0)
    layers = (
        MoELayer(BiasedRouter(LinearScore(WIDTH, 4, init_std=1.0), top_k=2), [FFNBank(WIDTH, [4] * 4)]),
        MoELayer(
            ScoredRouter(LinearScore(WIDTH, 4, init_std=0.3), SteeredTopP(0.6)), [FFNBank(WIDTH, [4] * 4)], clusters=2
        ),
    )
    model = nn.ModuleList(layers)
    rules = (BiasBalance(0.1), SteerThreshold(2.5), ExpertDropout(0.5, interval=2))
    optimizer = build_optimizer(model, OptimSettings())
    for rule in rules:
        rule.start(model, optimizer)
    for step in (1, 2, 3):
        tokens = torch.randn(2, 31, WIDTH, generator=torch.Generator().manual_seed(step))
        # the second half lies elsewhere, so that what one rank sees is not what both see
        for x in (tokens[share] + share for share in shares):
            for rule in rules:
                for layer in layers:
                    rule.observe(layer(x)[1][0])
        for rule in rules:
            rule.apply(step)
    biased, scored = (layer.router for layer in layers)
    threshold = scored.get_submodule("select").get_extra_state()
    return {"bias": biased.get_buffer("bias"), "threshold": threshold, "resting": scored.get_buffer("resting")}


def steer_on(rank: int, meeting_point: Path, output: Path) -> None:
    """One process: the rules' three steps on its own half of the tokens."""
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    save_file(steered([rank]), output)
    dist.destroy_process_group()


def on_two_ranks(work: Callable[[int, Path, Path], None], folder: Path) -> list[dict[str, torch.Tensor]]:
    """What each of two processes wrote."""
    outputs = [folder / f"{rank}.safetensors" for rank in (0, 1)]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=work, args=(r, folder / "meeting", o)) for r, o in enumerate(outputs)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [load_file(output) for output in outputs]


def test_balance_losses_of_the_step_are_those_of_all_ranks(tmp_path):
    """HMoE's specification leaves it open: local by default, global with `statistics: step`. Averaged over ranks, the
    gradients of the latter are those of all sequences as one batch; those of the former are not."""
    ranks = on_two_ranks(balance_on, tmp_path)
    whole = penalty_gradients(slice(0, 8), "step")
    for name, gradient in whole.items():
        averaged = {
            kind: (ranks[0][f"{kind} {name}"] + ranks[1][f"{kind} {name}"]) / 2 for kind in ("step", "micro_batch")
        }
        torch.testing.assert_close(averaged["step"], gradient, **FLOAT64)
        assert float((averaged["micro_batch"] - gradient).abs().max()) > 1e-6


def test_rules_do_on_every_rank_what_they_do_with_all_tokens(tmp_path):
    ranks, whole = on_two_ranks(steer_on, tmp_path), steered([0, 1])
    for name, value in whole.items():
        assert torch.equal(ranks[0][name], value) and torch.equal(ranks[1][name], value), name
    alone = steered([0])
    assert not torch.equal(alone["bias"], whole["bias"]) and alone["threshold"] != whole["threshold"]
    assert whole["resting"].sum() == 2


def test_ranks_keep_the_statistics_of_all_their_tokens(tmp_path):
    first, second = on_two_ranks(train_on, tmp_path)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    queries = torch.cat([*micro_batches(0), *micro_batches(1)]).double() @ first["query"].double().T
    torch.testing.assert_close(first["mean"].double(), queries.mean(0), **FLOAT32)
    torch.testing.assert_close(first["variance"].double(), queries.var(0, correction=0), **FLOAT32)
    # a rank of nothing but padding keeps pace; a step of nothing else moves nothing
    assert first["updates"] == 2
    moved = 0.9 * first["mean"] + 0.1 * (torch.ones(1, WIDTH) @ first["query"].T)[0]
    torch.testing.assert_close(first["last"], moved, **FLOAT32)
