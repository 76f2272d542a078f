"""Traces of our own routers: unequal experts, rows of tables, tokens with different numbers of experts."""

from pathlib import Path

import pytest
import torch

from moestro.offload.policies import SINGLE
from moestro.offload.replay import Setting, replay
from moestro.offload.routing_traces import trace_of
from moestro.offload.scorer import Precision
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from moestro.routers.query_norm import BatchQueryNorm
from tests.conftest import ROOT

TINY = ["model.d_model=16", "model.attention.n_heads=2", "data.tokenizer={kind: bytes}"]


def model_of(name: str, *overrides: str):
    return build_model(load_recipe(ROOT / "recipes" / f"{name}.yaml", [*TINY, *overrides]), 257).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top", ["{kind: top_k, top_k: 2}", "{kind: top_p, threshold: 0.5}"])
def test_experts_of_unequal_widths(top: str, tmp_path: Path) -> None:
    model = model_of("hmoe", "model.n_layers=2", f"model.ffn.router.select={top}")
    trace = trace_of(model, tokens(), tmp_path / "t.jsonl")
    widths = model.moe_layers()["blocks.0.ffn"].bank.widths
    assert trace.header.high[0] == [3 * 16 * width * 4 for width in widths] and trace.header.n_layers == 2
    assert len(trace.steps) == 2 * 6 * 2 and trace.complete and len(list(trace.sequences())) == 2
    routing = model(tokens()[:1]).traces[1].routing
    for position in range(6):
        mine = trace.steps[2 * position + 1]
        want = routing.expert[routing.token == position].tolist()
        assert sorted(set(mine.ids[0].tolist())) == sorted(want)
        gates = float(routing.weight[routing.token == position].sum().detach())
        assert float(mine.weights.sum()) == pytest.approx(gates, abs=1e-6)


def test_rows_of_tables(tmp_path: Path) -> None:
    model = model_of("peer")
    for module in model.modules():
        if isinstance(module, BatchQueryNorm):
            module.updates.fill_(1)
    trace = trace_of(model, tokens(), tmp_path / "t.jsonl")
    experts = next(iter(model.moe_layers().values())).bank.n_experts
    # a row of `up` and one of `down` in float32
    assert trace.header.high[0] == [2 * 16 * 4] * experts
    everything = replay(trace, Setting({Precision.HIGH: 1 << 30}, SINGLE["lru"])).counts
    cold = replay(trace, Setting({Precision.HIGH: 64 * 128}, SINGLE["lru"])).counts
    met = {(s.layer, i) for s in trace.steps for i in s.ids.flatten().tolist()}
    assert everything.misses_high == len(met) < cold.misses_high and everything.demanded == len(met) * 128


def test_a_step_has_every_part_of_its_token(tmp_path: Path) -> None:
    model = model_of("multi_head", "model.n_layers=1")
    trace = trace_of(model, tokens(), tmp_path / "t.jsonl")
    routed = model(tokens()[:1]).traces[0]
    ids, _ = routed.routing.matrix()
    assert len(trace.steps) == 2 * 6 and len(ids) > 6
    for position in range(6):
        assert torch.equal(trace.steps[position].ids, ids[routed.origin.token == position])


def test_a_token_has_no_step_in_strata_that_it_passes_by(tmp_path: Path) -> None:
    model = model_of("stratified")
    trace = trace_of(model, tokens(), tmp_path / "t.jsonl")
    assert trace.header.n_layers == len(model.moe_layers()) > model.n_mixtures() and trace.complete
    routed = model(tokens()[:1]).traces
    assert sum(len(step.ids) for step in trace.steps if step.sequence == 0) == sum(
        one.routing.n_tokens for one in routed
    )


def test_experts_of_no_width_have_no_bytes(tmp_path: Path) -> None:
    trace = trace_of(model_of("moe_plus_plus"), tokens(), tmp_path / "t.jsonl")
    assert 0 in trace.header.high[0] and any(trace.header.high[0])
    moved = replay(trace, Setting({Precision.HIGH: 1 << 30})).counts.moved
    met = {(s.layer, i) for s in trace.steps for i in s.ids.flatten().tolist()}
    assert moved == sum(trace.header.high[layer][expert] for layer, expert in met)


def test_what_has_no_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no mixtures"):
        trace_of(model_of("dense"), tokens(), tmp_path / "t.jsonl")
