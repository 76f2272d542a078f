"""One optimizer step: accumulation, recomputation, objectives, FLOPs, and the end of a diverging run."""

import copy
import math

import pytest
import torch
from torch import Tensor

from moestro import LoadBalance
from moestro.evaluate.scoring import check_precision, nats, score
from moestro.routing import Trace
from moestro.train import Diverged, QueryNormStatistics
from moestro.train.health import require_finite
from moestro.train.optim import clip_gradients
from moestro.train.step import Measured, backward, check_names, measure
from tests.tolerances import FLOAT32, FLOAT64
from tests.train.tiny import SEQUENCE, Counting, tiny_model, tiny_settings


def mean_width(trace: Trace) -> Tensor:
    """An objective that is a mean over tokens, so that averaging micro-batches is exact; differentiable."""
    return (trace.x**2).mean()


def gradients(model, batch, objectives=(), rules=(), **changes) -> tuple[dict[str, Tensor], Measured]:
    """Gradients and figures of one step on a copy of the model."""
    model = copy.deepcopy(model)
    settings = tiny_settings(batch_size=len(batch.tokens), **changes)
    model.recompute = settings.recompute
    sums = backward(model, batch, settings, objectives, rules)
    measured = measure(sums, clip_gradients(model, None), batch, objectives)
    return {name: p.grad for name, p in model.named_parameters()}, measured


def ragged(batch):
    """The batch without some of its targets, unevenly over the rows."""
    targets = batch.targets.clone()
    targets[0, 2:] = -100
    targets[3, 5:] = -100
    return type(batch)(batch.tokens, targets, batch.documents, torch.where(targets == -100, 0, batch.n_bytes))


@pytest.mark.parametrize("accumulate", [2, 4, 8])
@pytest.mark.parametrize("change", [lambda b: b, ragged], ids=["full", "ragged"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(accumulate, change):
    # Without batch norm, whose statistics are those of a micro-batch by definition.
    model = tiny_model(kinds=("moe", "dense")).double()
    batch = change(Counting().train_batch(0, 8, seed=0))
    objectives = [] if change is ragged else [("size", 0.3, mean_width)]
    whole, one = gradients(model, batch, objectives)
    parts, many = gradients(model, batch, objectives, accumulate=accumulate)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], **FLOAT64)
    assert (many.tokens, many.bytes) == (one.tokens, one.bytes)
    assert many.loss == pytest.approx(one.loss, rel=1e-12)
    assert many.total_loss == pytest.approx(one.total_loss, rel=1e-12)
    assert many.objectives == pytest.approx(one.objectives, rel=1e-12)
    assert many.flops == pytest.approx(one.flops, rel=1e-6)


def test_the_loss_is_the_mean_over_all_target_tokens():
    model, batch = tiny_model(kinds=("dense",)), ragged(Counting().train_batch(0, 4, seed=0))
    logits = model(batch.tokens, keep=batch.keep).logits.log_softmax(-1)
    picked = [-logits[b, s, t] for b, row in enumerate(batch.targets) for s, t in enumerate(row) if t != -100]
    _, measured = gradients(model, batch, accumulate=2)
    assert len(picked) == measured.tokens == int(batch.keep.sum()) < batch.tokens.numel()
    assert measured.loss == pytest.approx(torch.stack(picked).mean().item(), rel=1e-6)
    assert measured.bpb == pytest.approx(measured.loss / math.log(2) / 2, rel=1e-12)


def test_recomputation_changes_no_bit_of_loss_and_gradients():
    model, batch = tiny_model(), Counting().train_batch(0, 4, seed=0)
    rule = QueryNormStatistics()
    stored, one = gradients(model, batch, [("size", 0.3, mean_width)], [rule])
    again, two = gradients(model, batch, [("size", 0.3, mean_width)], [rule], recompute=True)
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    assert (two.loss, two.objectives, two.flops) == (one.loss, one.objectives, one.flops)
    assert two.flops_computed > one.flops_computed
    # Recomputed forwards are not observed a second time.
    assert [len(batches) for batches in rule.seen.values()] == [1, 1]


def test_recomputation_costs_the_forward_of_all_but_the_head_again():
    model, batch = tiny_model(), Counting().train_batch(0, 4, seed=0)
    output, _ = score(model, batch, "fp32")
    forward = model.flops(4, SEQUENCE, output.traces).item()
    head = 2 * 4 * SEQUENCE * model.head.weight.numel()
    _, stored = gradients(model, batch)
    _, again = gradients(model, batch, recompute=True)
    assert stored.flops == again.flops == pytest.approx(3 * forward.useful, rel=1e-6)
    assert stored.flops_computed == pytest.approx(3 * forward.computed, rel=1e-6)
    assert again.flops_computed == pytest.approx(4 * forward.computed - head, rel=1e-6)


def test_objectives_are_averaged_over_layers_and_weighted():
    model, batch = tiny_model(kinds=("moe", "moe")), Counting().train_batch(0, 4, seed=0)
    balance = LoadBalance()
    _, traces = (output := score(model, batch, "fp32")[0]).logits, output.traces
    expected = sum(balance(trace).item() for trace in traces) / 2
    plain, without = gradients(model, batch)
    pushed, measured = gradients(model, batch, [("balance", 0.5, balance)])
    assert len(traces) == 2
    assert measured.objectives == {"balance": pytest.approx(expected, rel=1e-6)}
    assert measured.loss == pytest.approx(without.loss, rel=1e-6)
    assert measured.total_loss == pytest.approx(without.loss + 0.5 * expected, rel=1e-6)
    score_of = "blocks.0.ffn.router.score.weight"
    assert not torch.equal(plain[score_of], pushed[score_of])


def test_active_parameters_are_those_of_the_model():
    model, batch = tiny_model(), Counting().train_batch(0, 4, seed=0)
    output, _ = score(model, batch, "fp32")
    _, measured = gradients(model, batch)
    assert measured.active_params == pytest.approx(model.active_parameters(output.traces))
    assert measured.active_params < sum(p.numel() for p in model.parameters())


def test_objectives_without_a_mixture_layer_are_refused():
    with pytest.raises(ValueError, match="objective 'balance' needs a mixture-of-experts layer, the model has none"):
        gradients(tiny_model(kinds=("dense",)), Counting().train_batch(0, 4, 0), [("balance", 1.0, LoadBalance())])


def test_two_objectives_of_one_name_are_refused():
    with pytest.raises(ValueError, match="objectives .*'a' is there twice; names must differ"):
        check_names([("a", 1.0, mean_width), ("b", 1.0, mean_width), ("a", 2.0, mean_width)])


def test_a_batch_without_targets_is_refused():
    batch = Counting().train_batch(0, 4, 0)
    empty = type(batch)(batch.tokens, torch.full_like(batch.targets, -100), batch.documents, batch.n_bytes * 0)
    with pytest.raises(ValueError, match="a training batch has no target tokens"):
        gradients(tiny_model(), empty)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"loss": math.nan}, "loss = nan"),
        ({"grad_norm": math.inf}, "gradient norm = inf"),
        ({"objectives": {"balance": math.inf}}, "balance = inf"),
    ],
)
def test_a_non_finite_step_is_an_error_that_says_what_to_try(changes, culprit):
    fine = {"loss": 1.0, "total_loss": 1.0, "objectives": {}, "grad_norm": 1.0, "flops": 1.0, "flops_computed": 1.0}
    measured = Measured(**{**fine, "active_params": 1.0, "tokens": 1, "bytes": 1, **changes})
    with pytest.raises(Diverged, match=rf"step 7: {culprit} \(learning rate 0\.01\)\. Try, .* a lower optim\.lr"):
        require_finite(measured.signs_of_health, 7, 0.01)


def test_bf16_computes_products_in_bfloat16_and_the_loss_in_fp32():
    model, batch = tiny_model(), Counting().train_batch(0, 4, seed=0)
    output, losses = score(model, batch, "bf16")
    exact = score(model, batch, "fp32")[1]
    assert output.logits.dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=0.1, atol=0.1)
    found, _ = gradients(model, batch, precision="bf16")
    assert {grad.dtype for grad in found.values()} == {torch.float32}


def test_bf16_on_a_device_without_it_is_refused():
    with pytest.raises(ValueError, match="precision='bf16': meta has no bfloat16 autocast; use precision: fp32"):
        check_precision(torch.device("meta"), "bf16")
    check_precision(torch.device("meta"), "fp32")


def test_nats_are_minus_log_probabilities():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 4, -100], [1, -100, 2]])
    found = nats(logits, targets)
    for b in range(2):
        for s in range(3):
            t = targets[b, s]
            expected = 0.0 if t == -100 else -math.log(logits[b, s].softmax(-1)[t])
            assert found[b, s].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(nats(logits.float(), targets).double(), found, **FLOAT32)
