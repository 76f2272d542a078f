"""Bits per byte and perplexity against their definitions."""

import math

import pytest
import torch

from moestro.data import Batch
from moestro.evaluate import evaluate
from moestro.evaluate.perplexity import evaluating, perplexity
from moestro.routers.query_norm import BatchQueryNorm
from tests.train.tiny import VOCABULARY, Counting, tiny_model


def ready_model(**changes):
    """A tiny model whose batch norm has statistics."""
    model = tiny_model(**changes)
    for module in model.modules():
        if isinstance(module, BatchQueryNorm):
            module.update(torch.zeros(module.features), torch.ones(module.features))
    return model


def padded(batch: Batch) -> Batch:
    """The batch with the end of its last row made padding."""
    targets, n_bytes = batch.targets.clone(), batch.n_bytes.clone()
    targets[-1, 2:], n_bytes[-1, 2:] = -100, 0
    return Batch(batch.tokens, targets, batch.documents, n_bytes)


def test_figures_follow_their_definitions_over_all_batches():
    model = ready_model().double()
    batches = [Counting().train_batch(0, 3, 0), padded(Counting().train_batch(1, 2, 0))]
    found = evaluate(model, batches)
    model.eval()
    total, tokens, n_bytes = 0.0, 0, 0
    for batch in batches:
        probabilities = model(batch.tokens, documents=batch.documents).logits.softmax(-1).detach()
        for b, s in (batch.targets != -100).nonzero().tolist():
            total -= math.log(probabilities[b, s, batch.targets[b, s]])
            tokens += 1
            n_bytes += int(batch.n_bytes[b, s])
    assert (found["tokens"], found["bytes"]) == (tokens, n_bytes) == (26, 52)
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-12)
    assert found["bpb"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-12)


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity():
    model = ready_model()
    torch.nn.init.zeros_(model.head.weight)
    found = evaluate(model, Counting().val_batches(4))
    assert found["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert found["bpb"] == pytest.approx(math.log2(VOCABULARY) / 2, rel=1e-6)


def test_figures_do_not_depend_on_how_text_is_cut_into_batches():
    model, batch = ready_model(), padded(Counting().train_batch(0, 6, 0))
    one = evaluate(model, [batch])
    many = evaluate(model, [batch.rows(0, 1), batch.rows(1, 5), batch.rows(5, 6)])
    assert one.keys() == many.keys()
    assert all(one[name] == pytest.approx(many[name], rel=1e-6) for name in one)


def test_modes_come_back_as_they_were_also_after_an_error():
    model = ready_model()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, Counting().val_batches(2))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_evaluation_changes_no_state():
    model = ready_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, Counting().val_batches(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate: the batches hold 0 target tokens, 0 bytes"):
        evaluate(ready_model(), [])


def test_perplexity_of_a_hopeless_model_is_finite():
    assert perplexity(1000.0) == math.exp(709.0) < math.inf
