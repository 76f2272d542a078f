"""Seconds of a step: what their formulas count is counted beside them, kernel by kernel."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moestro.data import Batch
from moestro.ops import backend
from moestro.parallel import ParallelSettings, Ranks
from moestro.plan import MACHINES, Spread, StepTime, workload
from moestro.plan.imbalance import EVEN
from moestro.plan.timing import KERNELS, Message, kernels, moved_per_token
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.train.step import backward
from tests.plan.kernels import Kernels

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = ["train.batch_size=8", "model.n_layers=2", "data.tokenizer={kind: bytes}"]


@pytest.mark.parametrize(
    ("name", "change", "off"),
    [
        ("dense", "model.d_model=128", 0.15),
        ("dense", "model.d_model=256", 0.15),
        ("dense", "model.ffn.width=2048", 0.15),
        ("dense", "train.precision=bf16", 0.3),
        ("hmoe", "model.ffn.router.select.top_k=2", 0.3),
        ("hmoe", "model.ffn.router.select.top_k=4", 0.3),
    ],
)
def test_kernels_move_what_is_foreseen(name: str, change: str, off: float):
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*SMALL, change])
    settings, objectives, _ = build_training(recipe)
    work = workload(recipe)
    model = build_model(recipe, work.vocab_size)
    text = torch.randint(work.vocab_size, (8, work.seq_len + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    batch = Batch(inputs, targets, torch.zeros_like(inputs), torch.ones_like(inputs))
    # compiled kernels move less than is foreseen, and are not seen by what counts
    with backend.force("fused"), Kernels() as counted:
        backward(model, batch, settings, [(n, float(w), o) for n, w, o in objectives], [], Ranks.alone())  # type: ignore[arg-type]
    assert counted.moved == pytest.approx(work.tokens * moved_per_token(work), rel=off)
    assert 0.5 < counted.calls / (3 * kernels(work)) < 1.5


def test_a_step_is_products_moves_launches_and_messages():
    work = workload(load_recipe(RECIPES / "dense.yaml"))
    slow = replace(MACHINES["h200"], efficiency=1.0, overlap=0.0)

    def time(**changes: float) -> StepTime:
        return StepTime(Spread(work, replace(slow, **changes), 2, ParallelSettings(), 1, False, EVEN))  # type: ignore[arg-type]

    free = {"fp32": 1e30, "memory_bandwidth": 1e30, "launch": 1e-30}
    assert time(**free).compute == pytest.approx(0)
    moved = work.tokens / 2 * moved_per_token(work)
    assert time(**free | {"memory_bandwidth": 1e9}).compute == pytest.approx(moved / 1e9)
    assert time(**free | {"launch": 1e-6}).compute == pytest.approx(4 * 3 * KERNELS * 1e-6)
    both, hidden = time(), time(overlap=1.0)
    assert both.waiting > hidden.waiting and both.compute == hidden.compute
    messages = sum(message.seconds(slow) for message in both.messages())
    assert both.waiting == pytest.approx(messages)


def test_a_share_that_hides_is_a_share():
    with pytest.raises(ValueError, match="overlap=1.5: allowed are 0 to 1"):
        replace(MACHINES["h200"], overlap=1.5)


def test_recomputation_moves_a_forward_pass_more():
    work = workload(load_recipe(RECIPES / "hmoe.yaml"))
    machine = replace(MACHINES["h200"], fp32=1e30, launch=1e-30)
    once, twice = (
        StepTime(Spread(work, machine, 1, ParallelSettings(), 1, recompute, EVEN)).compute
        for recompute in (False, True)
    )
    assert twice == pytest.approx(once * 4 / 3, rel=1e-6)


def test_every_layer_that_meets_tables_sends_for_itself():
    """Also where all tables are of one shape."""
    layers = "model.layers={%s}"
    peer = (
        "{kind: moe, router: {kind: product_key, heads: 2, top_k: 4, d_key: 16}, "
        "branches: [{kind: singleton, n_experts: 256, sparse_gradients: true}]}"
    )
    for tables in ("rows", "columns"):
        sent = []
        for places in ((1,), (1, 2)):
            change = layers % ", ".join(f"{place}: {peer}" for place in places)
            work = workload(load_recipe(RECIPES / "dense.yaml", [change]))
            spread = Spread(work, MACHINES["h200"], 4, ParallelSettings(tables=tables), 1, False, EVEN)  # type: ignore[arg-type]
            sent.append(StepTime(spread).sent["rows of tables"])
        assert sent[1] == pytest.approx(2 * sent[0])


@pytest.mark.parametrize(("stride", "ranks", "link"), [(1, 8, True), (2, 4, True), (4, 4, False), (8, 2, False)])
def test_ranks_that_are_neighbours_of_none_cross_hosts(stride: int, ranks: int, link: bool):
    """16 ranks on two hosts: every 4th of them is two on each host, however few they are."""
    machine = replace(MACHINES["h200"], latency=1e-30, network_latency=1e-30)
    seconds = Message("", 1e9, 1, ranks, stride).seconds(machine)
    cards = max(1, 8 // stride)
    rate = machine.link if link else min(machine.link, machine.network * cards)
    assert seconds == pytest.approx(1e9 / rate)
