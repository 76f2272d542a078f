"""Runs whose experts and tables lie on several ranks are those of one process, and go on from one another's
checkpoints, whatever lies where."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro import DenseFFN, FFNBank, LinearScore, MoELayer, ScoredRouter, SharedExpert, TopP
from moestro.experts import SingletonBank
from moestro.parallel.expert_parallel import ExpertParallel
from moestro.parallel.placement import EqualCount, Exact
from moestro.parallel.ranks import joined
from moestro.parallel.row_tables import ColumnParallel, RowParallel
from moestro.parallel.settings import ParallelSettings
from moestro.routers import ProductKeyRouter
from moestro.train import Rule, train
from moestro.train.move_experts import MoveExperts
from moestro.train.settings import OptimSettings
from tests.parallel.models import stacked
from tests.parallel.processes import in_ranks
from tests.parallel.test_runs import adapting, cut_back, losses, require_close, weights
from tests.parallel.test_runs import go as adapted
from tests.train.tiny import WIDTH, Counting, tiny_settings

STEPS, WIDTHS = 6, [9, 1, 6, 2, 12]
SPREAD = {
    "greedy": ParallelSettings(experts=2, timeout_s=60),
    "other": ParallelSettings(experts=2, placement=Exact(), tables="columns", sharding="none", timeout_s=60),
    "unbalanced": ParallelSettings(experts=2, placement=EqualCount(), timeout_s=60),
    "four": ParallelSettings(experts=4, timeout_s=60),
    "copies": ParallelSettings(experts=2, tables="columns", sharding="hybrid", replicas=2, timeout_s=60),
}


def model() -> Any:
    """Experts of unequal widths beside a shared one, and PEER with tables that train by rows."""
    torch.manual_seed(0)
    router = ScoredRouter(LinearScore(WIDTH, 5, init_std=1.0), TopP(0.7))
    unequal = MoELayer(router, [FFNBank(WIDTH, WIDTHS), SharedExpert(WIDTH, 5)])
    keys = ProductKeyRouter(WIDTH, 36, heads=2, top_k=3, d_key=4)
    peer = MoELayer(keys, [SingletonBank(WIDTH, 36, sparse_gradients=True)])
    return stacked([unequal, DenseFFN(WIDTH, 6), peer])


def go(
    rank: int, run: Path, spread: str | None = None, moving: bool = False, fused: bool = False, **plan: Any
) -> dict[str, Any]:
    """Train on the ranks that there are."""
    parallel = SPREAD[spread] if spread else ParallelSettings(timeout_s=60)
    rules: list[Rule] = [MoveExperts(every=2, gain=0.0)] if moving else []
    optim = OptimSettings(lr=1e-2, clip=0.5, fused_rows=fused)
    plan = {"batch_size": 8, "save_every": 2, "eval_every": 3, "keep_last": 9, "optim": optim, **plan}
    settings = tiny_settings(STEPS, parallel=parallel, **plan)
    with joined("cpu", parallel) as ranks:
        net = model()
        result = train(net, Counting(), settings, [], rules, run, ranks=ranks)
        if ranks.main:
            banks = [m for m in net.modules() if isinstance(m, ExpertParallel | RowParallel | ColumnParallel)]
            told: dict[str, Any] = {"banks": [type(bank).__name__ for bank in banks]}
            told["placements"] = [bank.placement.rank for bank in banks if isinstance(bank, ExpertParallel)]
            (run / "spread.json").write_text(json.dumps(told))
        return result


def spread_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "spread.json").read_text())


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    go(0, run)
    return run


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    in_ranks(2, partial(go, run=folder / "run", spread="greedy"), folder / "meeting")
    return folder / "run"


def test_a_run_with_spread_experts_is_that_of_one_process(on_one: Path, on_two: Path) -> None:
    assert spread_of(on_two) == {"banks": ["ExpertParallel", "RowParallel"], "placements": [[1, 0, 1, 0, 0]]}
    require_close(on_two, on_one)
    one, two = (json.loads((run / "done.json").read_text()) for run in (on_one, on_two))
    assert one["params_active"] == pytest.approx(two["params_active"], rel=1e-9)
    assert one["params_total"] == two["params_total"] and one["flops"] == pytest.approx(two["flops"], rel=1e-9)


def test_saved_with_spread_experts_resumed_on_one(on_two: Path, tmp_path: Path) -> None:
    again = cut_back(on_two, tmp_path / "again", 2)
    go(0, again)
    require_close(again, on_two)


def test_saved_on_one_resumed_with_other_places_and_columns(on_one: Path, tmp_path: Path) -> None:
    again = cut_back(on_one, tmp_path / "again", 2)
    in_ranks(2, partial(go, run=again, spread="other", fused=False), tmp_path / "meeting")
    assert spread_of(again)["banks"] == ["ExpertParallel", "ColumnParallel"]
    require_close(again, on_one)


def test_experts_that_move_change_nothing(tmp_path: Path) -> None:
    work = partial(go, moving=True, fused=True)
    work(0, tmp_path / "one")
    in_ranks(2, partial(work, run=tmp_path / "two", spread="unbalanced"), tmp_path / "meeting")
    assert spread_of(tmp_path / "two")["placements"][0] != [0, 0, 0, 1, 1]
    require_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_recomputed_blocks_send_again(on_one: Path, tmp_path: Path, precision: str) -> None:
    work = partial(go, spread="greedy", recompute=True, precision=precision)
    in_ranks(2, partial(work, run=tmp_path / "two"), tmp_path / "meeting")
    if precision == "fp32":
        require_close(tmp_path / "two", on_one)
    else:
        torch.testing.assert_close(losses(tmp_path / "two"), losses(on_one), rtol=0.02, atol=0)


@pytest.mark.slow
def test_runs_whose_experts_moved_go_on_to_the_bit(tmp_path: Path) -> None:
    work = partial(go, moving=True, fused=True, spread="unbalanced")
    in_ranks(2, partial(work, run=tmp_path / "run"), tmp_path / "meeting")
    again = cut_back(tmp_path / "run", tmp_path / "again", 4)
    in_ranks(2, partial(work, run=again), tmp_path / "meeting again")
    mine, theirs = weights(again), weights(tmp_path / "run")
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("policy", ["fresh", pytest.param("mean", marks=pytest.mark.slow)])
def test_experts_that_come_and_go_do_so_on_their_ranks(tmp_path: Path, policy: str) -> None:
    work = partial(adapted, system="dynmoe", rules=partial(adapting, policy))
    in_ranks(2, partial(work, run=tmp_path / "two", parallel=SPREAD["greedy"]), tmp_path / "meeting")
    work(0, run=tmp_path / "one")
    two, one = (torch.load(tmp_path / path / "of-rank-0.pt") for path in ("two", "one"))
    for name, value in one["parameters"].items():
        torch.testing.assert_close(two["parameters"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["four", "copies"])
def test_saved_on_two_resumed_on_four(on_two: Path, tmp_path: Path, spread: str) -> None:
    again = cut_back(on_two, tmp_path / "again", 2)
    in_ranks(4, partial(go, run=again, spread=spread), tmp_path / "meeting")
    require_close(again, on_two)
