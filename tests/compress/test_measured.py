"""Methods that look at text, from a stock folder to a stock folder, for families that route in different ways."""

import warnings
from dataclasses import replace

import pytest
import torch

from moestro.compress import calibration, measured
from moestro.compress.blocks import block_error, blocks_of
from moestro.compress.feasible import Output
from moestro.compress.masking import without
from moestro.compress.measured import loaded
from moestro.compress.methods import MEASURED, Request
from moestro.compress.plan import PlanError
from moestro.compress.plan_file import read_plan
from moestro.compress.running import compressed, plan_for
from moestro.compress.text import batches_of
from moestro.compress.text_methods import METHODS
from moestro.data import ByteTokenizer
from moestro.formats import Checkpoint
from tests.compress.folders import loaded as plainly_loaded
from tests.compress.folders import masked, saved

pytestmark = pytest.mark.filterwarnings("ignore:.*fewer than 100 tokens", "ignore:.*mean similarity")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            saved(family, made[family], vocab_size=300)
            ByteTokenizer().save(made[family])
        return made[family]

    return folder


@pytest.fixture
def request_for(folders, text_file):
    def make(family, method, ratio=0.25, **more):
        more = {"text": str(text_file), "tokens": 512, "seq_len": 32, **more}
        return Request(folders(family), method, ratio, **more)

    return make


def test_the_registry_names_every_method():
    assert set(MEASURED) == set(METHODS)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "gpt_oss"])
def test_a_pruned_folder_is_the_masked_model(request_for, tmp_path, family):
    request = request_for(family, "reap")
    folder = compressed(request, tmp_path / "dst")
    plan = read_plan(folder / "compression_plan.json")
    assert 480 < plan.calibration.tokens <= 512 and list(plan.layers[0].scores)[0] == "reap"
    original, smaller = plainly_loaded(request.source), plainly_loaded(folder)
    tokens = torch.arange(40)[None]
    with torch.no_grad(), masked(original, {layer.layer: layer.keep for layer in plan.layers}):
        torch.testing.assert_close(smaller(tokens).logits, original(tokens).logits, rtol=1e-4, atol=1e-4)


def test_hosted_decoder_layers_run_in_blocks(request_for):
    """Block errors of a stock model are those of the whole model, masks in place."""
    request = request_for("qwen2_moe", "moe-i2")
    model, batches = loaded(request), batches_of(request)[:1]
    (block,) = blocks_of(model, batches)
    layers = model.moe_layers()
    assert block_error(block, layers, [(), ()])[0] == 0
    error, states = block_error(block, layers, [(0, 5), (1,)])
    head = model.decoder
    with torch.no_grad():
        one, two = layers.values()
        with without(one, (0, 5)), without(two, (1,)):
            expected = model(batches[0].tokens, documents=batches[0].documents).logits
        found = head.lm_head(head.model.norm(states[0]))
    assert error > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["recon", "moe-i2", "merge", "hc-smoe", "auto", "random"])
def test_every_method_makes_a_plan_that_can_be_written(request_for, tmp_path, method):
    folder = compressed(request_for("mixtral", method, tokens=1024), tmp_path / "dst")
    plan = read_plan(folder / "compression_plan.json")
    assert plan.method == method and all(layer.n_kept == 6 for layer in plan.layers)
    plainly_loaded(folder)
    if method == "auto":
        assert {"loss of frequency", "loss of reap", "loss of recon"} <= set(plan.layers[0].scores)


def test_unequal_counts_and_skipping_are_written_by_custom_code(request_for, tmp_path):
    request = request_for("mixtral", "moe-i2", per_layer=True, output=Output("custom"), options={"skip": True})
    folder = compressed(request, tmp_path / "dst")
    plan = read_plan(folder / "compression_plan.json")
    assert sum(layer.n_kept for layer in plan.layers) == 12
    assert all(0 < layer.skip_below < 1 for layer in plan.layers)
    plainly_loaded(folder, trust=True)


def test_low_ranks_are_whitened_by_moments_beside_the_plan(request_for, tmp_path):
    options = {"fraction": 0.5, "whiten": True}
    request = request_for("mixtral", "svd", 0.0, options=options, output=Output(densify=True), tokens=2048)
    whitened = plan_for(request, tmp_path / "plan" / "plan.json")
    assert whitened.tensors is not None and all(layer.factors for layer in whitened.layers)
    error, tokens = {}, torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plainly_loaded(request.source)(tokens).logits
        for name, given in (("white", request), ("plain", replace(request, options={"fraction": 0.5}))):
            found = plainly_loaded(compressed(given, tmp_path / name))(tokens).logits
            error[name] = float((found - expected).norm())
    assert error["white"] != error["plain"] and error["white"] < 2 * error["plain"]
    with pytest.raises(PlanError, match="svd removes no experts"):
        plan_for(replace(request, ratio=0.25), tmp_path / "other.json")


def test_an_interrupted_measurement_continues(request_for, tmp_path, monkeypatch):
    request = request_for("mixtral", "reap")
    expected = plan_for(request, tmp_path / "whole" / "plan.json")
    whole, calls = calibration.score, []

    def broken(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    few = lambda *a: whole_calibrate(*a, save_every=1)  # noqa: E731
    whole_calibrate = measured.calibrate
    monkeypatch.setattr(measured, "calibrate", few)
    monkeypatch.setattr(calibration, "score", broken)
    with pytest.raises(KeyboardInterrupt):
        compressed(request, tmp_path / "dst")
    folder = compressed(request, tmp_path / "dst")
    assert len(calls) == 3  # two batches, one of them twice
    assert read_plan(folder / "compression_plan.json").layers == expected.layers


def test_impossible_requests_are_refused(request_for, tmp_path):
    plan = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="say which"):
        plan_for(request_for("mixtral", "reap", text=None), plan)
    with pytest.raises(PlanError, match="no such file or folder"):
        plan_for(request_for("mixtral", "reap", text="/nowhere"), plan)
    with pytest.raises(PlanError, match="no option 'sampel'"):
        plan_for(request_for("mixtral", "reap", options={"sampel": 3}), plan)
    with pytest.raises(PlanError, match="70 subsets of 4 of 8"):
        plan_for(request_for("mixtral", "recon", 0.5, options={"enumerable": 10}), plan)
    with pytest.raises(PlanError, match="too few to hold one out"):
        plan_for(request_for("mixtral", "auto", tokens=256), plan)
    bare = tmp_path / "bare"
    saved("mixtral", bare, vocab_size=300)
    with pytest.raises(PlanError, match="no tokenizer"):
        plan_for(replace(request_for("mixtral", "reap"), source=bare), plan)
    assert not plan.exists()


def test_few_tokens_are_warned_of(request_for, tmp_path):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        plan_for(request_for("mixtral", "reap", tokens=64), tmp_path / "plan.json")
    assert any("fewer than 100 tokens" in str(warning.message) for warning in found)


def test_what_cannot_be_stored_or_merged_is_refused_before_anything_is_measured(request_for, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "loaded", lambda request: pytest.fail("measured"))
    for family, options, said in (
        ("mixtral", {"quantise": "int3"}, "scheme='int3', allowed: int8, int4, fp8"),
        ("mixtral", {"quantise": "fp8", "calibrated": True}, "not fp8"),
        ("mixtral", {"quantise": "int4", "group_size": 7}, "group_size=7, allowed: 0, or a divisor"),
        ("mixtral", {"group_size": 32}, "give quantise="),
        ("gpt_oss", {"quantise": "int8"}, "keeps the experts of a layer in one tensor"),
    ):
        with pytest.raises(PlanError, match=said):
            plan_for(request_for(family, "reap", options=options), tmp_path / "plan.json")
    for method, options, said in (
        ("merge", {"merge": "mean"}, "merge: merge='mean', allowed: uniform, frequency, learned, prune"),
        ("moe-i2", {"importance": "rekon"}, "moe-i2: importance='rekon', allowed: recon, loss"),
        ("moe-i2", {"temperature": 0.0}, "temperature=0.0, allowed: .* above 0"),
        ("moe-i2", {"block": 0}, "block=0, temperature=1.0, allowed: from 1"),
        ("recon", {"genetic": True, "population": 1}, "population from 2"),
        ("svd", {}, "svd removes no experts"),
        ("auto", {"criteria": "best"}, "criteria='best', allowed: frequency, "),
        ("auto", {"criteria": "reap,svd"}, "svd removes no experts"),
    ):
        with pytest.raises(PlanError, match=said):
            plan_for(request_for("mixtral", method, tokens=2048, options=options), tmp_path / "plan.json")


def test_merging_leaves_every_layer_as_many_experts_as_a_token_takes(request_for, tmp_path):
    request = request_for("olmoe", "merge", 0.5, per_layer=True, output=Output("custom"))
    plan = plan_for(request, tmp_path / "plan.json")
    assert min(layer.n_kept for layer in plan.layers) >= Checkpoint(request.source).top_k
