"""Our own models: experts of unequal widths out of slots."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.experts import SingletonBank
from moestro.export import open_model
from moestro.export.folder import Choices, export_run
from moestro.offload.codecs import CODECS
from moestro.offload.files import Files, OffloadError
from moestro.offload.rows import RowCache, Table, _forward, least_size
from moestro.offload.running import generate
from moestro.offload.scorer import Precision, Thresholds
from moestro.offload.session import Plan, Session
from moestro.offload.trace import read_trace
from moestro.recipe.build import run_training
from moestro.recipe.load import load_recipe
from moestro.routing import SparseRouting
from tests.conftest import ROOT
from tests.tolerances import FLOAT32


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> Callable[..., Path]:
    """The folder of a recipe's run of two steps."""

    def run(name: str, *overrides: str) -> Path:
        path = tmp_path_factory.mktemp("runs") / name
        steps = ["train.budget.steps=2", "train.eval_tokens=256", *overrides]
        run_training(
            load_recipe(ROOT / "recipes" / f"{name}.yaml", [*small_data, *steps]), path, show_preparation=False
        )
        return path

    return run


def opened(folder: Path) -> Any:
    return open_model(folder)


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))


def test_experts_of_unequal_widths(run_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_of("hmoe")
    model, tokenizer = opened(folder)
    with torch.no_grad():
        want = model(tokens(20)).logits
    continued = model.generate(tokens(5), max_new_tokens=6, do_sample=False)[0, 5:]
    with Session(folder, Plan(1 << 40)) as session:
        sizes = [[stored.blob.size for stored in layer] for layer in session.host.experts]
        least = session.resident + 2 * max(max(layer) for layer in sizes)
    # widths 36 to 92 and such: no two experts of a layer are alike
    assert len(set(sizes[0])) == len(sizes[0]) == 8
    with Session(folder, Plan(least + 3000, depth=1), poison=True) as session:
        with session.running():
            assert torch.allclose(session.model(tokens(20)).logits, want, **FLOAT32)
        with session.recording(tmp_path / "t.jsonl"):
            assert torch.equal(generate(session, tokens(5)[0], 6).tokens, continued)
        used = session.memory.peak - max(max(layer) for layer in sizes)
        assert used <= session.capacity[Precision.HIGH] and session.loader.counts.misses_high > 8
        assert session.host.tokenizer().encode("a") == tokenizer.encode("a")
        assert not any(p.is_meta for n, p in session.model.named_parameters() if ".w_" not in n)
    plan = Plan(least + 100_000, CODECS["int8"], 0.3, Thresholds(0.3, 1.0))
    with Session(folder, plan, store=tmp_path / "low") as session:
        calibration = session.calibrate(tokens(60)[0])
    assert set(calibration.importance((0, 0))) == {"w_in"} and calibration.n_experts == len(sizes) * 8
    with Session(folder, plan, store=tmp_path / "low", calibration=calibration) as session, session.running():
        assert session.low is not None and session.low.calibrated
        mixed = session.model(tokens(1)).logits
        assert session.loader.counts.misses_low > 0
        assert torch.allclose(mixed, want[:, :1], atol=0.05) and not torch.equal(mixed, want[:, :1])


def test_an_export_is_run_as_the_model_that_it_is(run_of: Callable[..., Path], tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        export_run(run_of("hmoe"), folder, Choices(dtype=dtype, shard_bytes=200_000))
        model, tokenizer = opened(folder)
        continued = model.generate(tokens(5), max_new_tokens=6, do_sample=False)[0, 5:]
        with Session(folder, Plan(least(folder) + 3000), poison=True) as session:
            assert torch.equal(generate(session, tokens(5)[0], 6).tokens, continued)
            assert session.model.dtype == model.dtype and session.counts.misses_high > 8
            assert session.host.tokenizer().encode("a") == tokenizer.encode("a")
            assert session.memory.peak < session.figures()["memory"]["experts_bytes"]["high"] / 3


def least(folder: Path) -> int:
    """Bytes for what is no expert and two slots of the largest."""
    with Session(folder, Plan(1 << 40)) as session:
        return session.resident + 2 * max(stored.blob.size for layer in session.host.experts for stored in layer)


def test_tokens_may_differ_in_the_number_of_their_experts(run_of: Callable[..., Path]) -> None:
    folder = run_of("dynamic_routing")
    model: Any = open_model(folder).model
    with torch.no_grad():
        want = model(tokens(20)).logits
    plan = Plan(least(folder), depth=1)
    with Session(folder, plan, poison=True) as session, session.running():
        assert torch.allclose(session.model(tokens(20)).logits, want, **FLOAT32)
        assert len({len(trace.routing.token) for trace in model.decoder(tokens(7)).traces}) > 1


def test_what_layers_record_in_training_asks_for_no_expert(run_of: Callable[..., Path]) -> None:
    """A layer that records is computed past its bank's forward pass, which here would be with weights of no memory."""
    folder = run_of("mutual_distillation", "model.n_layers=2")
    with torch.no_grad():
        want = opened(folder).model(tokens(12)).logits
    with Session(folder, Plan(least(folder)), poison=True) as session, session.running():
        assert torch.allclose(session.model(tokens(12)).logits, want, **FLOAT32)
        assert session.counts.misses_high > 8


def test_routers_that_follow_are_traced_without_predictions(run_of: Callable[..., Path], tmp_path: Path) -> None:
    router = "{kind: residual, score: {kind: linear}, select: {kind: top_k, top_k: 2}}"
    folder = run_of("moe", "model.n_layers=2", f"model.ffn.router={router}")
    with Session(folder, Plan(least(folder))) as session, session.recording(tmp_path / "t.jsonl"):
        generate(session, tokens(5)[0], 4)
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.complete and len(trace.steps) == 2 * 4 and not any(step.ahead for step in trace.steps)
    with pytest.raises(OffloadError, match="cannot be asked ahead of time: prefetch 0"):
        Session(folder, Plan(1 << 40, depth=1))


def test_tokens_may_differ_in_the_number_of_their_rows(tmp_path: Path) -> None:
    """As many tokens at a time as the cached rows do for, however the routing's rows are ordered."""
    seed = torch.Generator().manual_seed(0)
    bank, tables = SingletonBank(8, 40), {}
    for name, table in bank.tables().items():
        (tmp_path / name).write_bytes(table.detach().numpy().tobytes())
        tables[name] = Table(tmp_path / name, 0, *table.shape, table.dtype, table.dtype)
    every = SparseRouting.from_topk(torch.rand(12, 40, generator=seed).topk(6).indices, torch.ones(12, 6), 40)
    # from 0 to 5 of the 6
    routing = every.keep(torch.arange(6).repeat(12) < every.token % 6)
    x, device = torch.randn(12, 8, generator=seed), torch.device("cpu")
    with torch.no_grad():
        want = bank(x, routing)
        for some, capacity in itertools.product((routing, routing.grouped()), (5, 11, 40)):
            cache = RowCache(tables, capacity, Files(), device)
            torch.testing.assert_close(_forward(bank, cache)(x, some), want, **FLOAT32)
        with pytest.raises(OffloadError, match="a token meets 5 rows of a bank, and memory holds 4"):
            _forward(bank, RowCache(tables, 4, Files(), device))(x, routing)


@pytest.mark.parametrize(
    "recipe", ["peer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("peer_glu", "memory_plus"))]
)
def test_rows_of_tables_are_brought_as_tokens_meet_them(
    run_of: Callable[..., Path], tmp_path: Path, recipe: str
) -> None:
    """The same bits as in memory, with a fraction of the rows there; the largest cache brings every row once."""
    folder = run_of(recipe)
    model: Any = open_model(folder).model
    with torch.no_grad():
        want = model(tokens(30)).logits
    continued = model.generate(tokens(5), max_new_tokens=6, do_sample=False)[0, 5:]
    with Session(folder, Plan(1 << 40)) as session:
        assert session.rows is not None
        everything, tables = session.rows.size, session.host.tables
        resident = session.resident
        assert resident + sum(t.row_bytes * t.rows for bank in tables.values() for t in bank.values()) >= sum(
            p.nbytes for p in model.parameters()
        )
        with session.running():
            assert torch.equal(session.model(tokens(30)).logits, want)
            first = session.counts
            session.model(tokens(30))
            assert session.counts.moved == first.moved > 0 and session.counts.passes == 2
    small = resident + sum(least_size(bank, session.host.top_k) for bank in tables.values()) + 200_000
    for host in (False, True):
        with Session(folder, Plan(small, host=host)) as session:
            assert session.rows and session.resident + session.rows.size <= small < resident + everything / 2
            with session.running():
                assert torch.equal(session.model(tokens(30)).logits, want)
            found = generate(session, tokens(5)[0], 6)
            assert torch.equal(found.tokens, continued)
            rows = [table.row_bytes for bank in tables.values() for table in bank.values()]
            assert found.decode.misses_high * sum(rows) == len(tables) * found.decode.moved > 0
            assert (session.figures()["memory"]["host_bytes"] > 0) == host
    with pytest.raises(OffloadError, match="for the rows that a token meets are the least"):
        Session(folder, Plan(resident + 1000))
    with Session(folder, Plan(1 << 40)) as session, pytest.raises(OffloadError, match="not traced while generating"):
        with session.recording(tmp_path / "t.jsonl"):
            pass


def test_a_table_that_is_cut_while_running_ends_the_run(run_of: Callable[..., Path]) -> None:
    folder = run_of("peer")
    file = next((folder / "checkpoints").glob("*/model.safetensors"))
    with Session(folder, Plan(1 << 40)) as session, session.running():
        session.model(tokens(2))
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 2)
        with pytest.raises(OffloadError, match="changed while the model was running"):
            session.model(tokens(30))
        assert session.rows is not None
        cache = next(iter(session.rows.caches.values()))
        held = cache._row[cache._row >= 0]
        assert (cache._slot[held] >= 0).all() and int((cache._slot >= 0).sum()) == len(held)


@pytest.mark.slow
def test_what_cannot_be_offloaded_is_refused(run_of: Callable[..., Path]) -> None:
    with pytest.raises(OffloadError, match="no mixture of this model"):
        Session(run_of("dense"), Plan(1 << 40))
    with Session(run_of("remoe"), Plan(1 << 40)) as session, session.running():
        with pytest.raises(OffloadError, match="at least one for every token"):
            session.model(tokens(300))
