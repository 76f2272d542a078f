"""Calibration of whole models: what is collected, from which text, and continued where it stopped."""

import hashlib

import pytest
import torch

from moestro.compress.calibration import Ask, calibrate, save
from moestro.compress.feed_forward import FeedForward
from moestro.compress.observed import Observed
from moestro.layers import MoELayer
from moestro.routers import SlotRouter
from tests.compress.models import D, E, decoder, mixture, text
from tests.tolerances import FLOAT64


def equal(one: Observed, other: Observed) -> bool:
    a, b = one.state(), other.state()
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_every_layer_is_observed_on_every_token_that_counts():
    model, batches = decoder("mdm"), text()
    collected = calibrate(model, batches, Ask(sample=7, everywhere=True, moments=True))
    assert list(collected.layers) == ["blocks.0.ffn", "blocks.2.ffn"]
    assert (collected.batches, collected.tokens) == (3, 3 * 2 * 8)
    ids = torch.cat([batch.tokens[batch.keep] for batch in batches])
    source = collected.source("words")
    assert source.sha256 == hashlib.sha256(ids.numpy().tobytes()).hexdigest() and source.tokens == 48
    expected = {name: Observed(E) for name in collected.layers}
    for batch in batches:
        with torch.no_grad():
            traces = model(batch.tokens, documents=batch.documents, keep=batch.keep).traces
        for trace, seen in zip(traces, expected.values(), strict=True):
            seen.observe(trace.layer, trace.x, trace.routing, everywhere=True)
    for name, seen in expected.items():
        found = collected.layers[name]
        assert all(torch.equal(found.sums[key], value) for key, value in seen.sums.items())
        assert found.tokens == 48 and found.rows.sum() == 96 and found.inputs.shape == (7, D)


def test_moments_are_of_the_inputs_of_every_expert_s_matrices():
    model, batches = decoder("m"), text(1)
    seen = calibrate(model, batches, Ask(moments=True)).layers["blocks.0.ffn"]
    with torch.no_grad():
        (trace,) = model(batches[0].tokens, documents=batches[0].documents, keep=batches[0].keep).traces
        for expert in range(E):
            x = trace.x[trace.routing.dense()[:, expert] > 0]
            torch.testing.assert_close(getattr(seen, f"input_moments_{expert}"), x.T @ x, **FLOAT64)
            gate, up = (x @ trace.layer.bank.w_in.matrices()[expert].T).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up
            bank = FeedForward.of(trace.layer)
            torch.testing.assert_close(bank.hidden(bank.matrices(expert)[0], x), hidden, **FLOAT64)
            torch.testing.assert_close(getattr(seen, f"hidden_moments_{expert}"), hidden.T @ hidden, **FLOAT64)


def test_the_sample_is_of_the_same_tokens_in_every_layer_and_depends_on_the_seed():
    model, batches = decoder("mm"), text()
    one, same, other = (calibrate(model, batches, Ask(sample=5, seed=seed)) for seed in (1, 1, 2))
    a, b = one.layers.values()
    assert torch.equal(a.keys, b.keys) and not torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.inputs, same.layers["blocks.0.ffn"].inputs)
    assert not torch.equal(a.inputs, other.layers["blocks.0.ffn"].inputs)
    assert calibrate(model, batches, Ask(sample=500)).layers["blocks.0.ffn"].inputs.shape == (48, D)
    assert calibrate(model, batches, Ask(sample=0)).layers["blocks.0.ffn"].inputs is None


def test_a_stopped_calibration_continues_to_the_same_bits(tmp_path):
    model, batches, ask = decoder("mm"), text(5), Ask(sample=6, everywhere=True)
    whole = calibrate(model, batches, ask)

    def broken():
        yield from batches[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, broken(), ask, tmp_path / "kept", save_every=2)
    continued = calibrate(model, batches, ask, tmp_path / "kept", save_every=2)
    again = calibrate(model, batches, ask, tmp_path / "kept")
    for found in (continued, again):
        assert found.source("") == whole.source("") and found.batches == 5
        assert all(equal(found.layers[name], whole.layers[name]) for name in whole.layers)


def test_statistics_of_something_else_are_refused(tmp_path):
    model, batches = decoder("mm"), text()
    kept = tmp_path / "kept"
    save(calibrate(model, batches, Ask()), kept)
    with pytest.raises(ValueError, match="another text"):
        calibrate(model, text(seed=1), Ask(), kept)
    with pytest.raises(ValueError, match="another model"):
        calibrate(decoder("mm", seed=1), batches, Ask(), kept)
    with pytest.raises(ValueError, match="other ones"):
        calibrate(model, batches, Ask(sample=3), kept)
    with pytest.raises(ValueError, match="has 2 batches"):
        calibrate(model, batches[:2], Ask(), kept)


def test_experts_that_few_tokens_met_are_named():
    collected = calibrate(decoder("m"), text(), Ask())
    rows = collected.layers["blocks.0.ffn"].rows
    (line,) = collected.warnings(int(rows.min()) + 1)
    assert f"{int(rows.argmin())} ({int(rows.min())})" in line
    assert collected.warnings(0) == []


def test_models_without_experts_of_their_own_tokens_are_refused():
    with pytest.raises(ValueError, match="no mixture layers"):
        calibrate(decoder("d"), text(), Ask())
    with pytest.raises(ValueError, match="0 batches"):
        calibrate(decoder("m"), [], Ask())
    with pytest.raises(ValueError, match="sample=-1"):
        Ask(sample=-1)
    model = decoder("m")
    model.blocks[0].ffn = MoELayer(SlotRouter(D, E, 1), [mixture().bank]).double()
    with pytest.raises(ValueError, match="mixes tokens"):
        calibrate(model, text(), Ask())


def test_calibration_leaves_the_model_as_it_was():
    model = decoder("mm").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, text(), Ask(everywhere=True, moments=True))
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
