"""How much experts belong to single tokens of the vocabulary."""

import pytest
import torch

from moestro.evaluate import expert_purity
from moestro.evaluate.scoring import score
from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.routers import ScoredRouter, SlotRouter, Soft
from moestro.routers.scores import LinearScore
from tests.train.test_whole_step import ragged
from tests.train.tiny import VOCABULARY, WIDTH, Counting, tiny_model


def batches():
    yield from Counting().val_batches(4)
    yield ragged(Counting().train_batch(0, 8, seed=0))


def test_purity_is_that_of_the_definition() -> None:
    model = tiny_model(kinds=("moe", "moe")).double()
    found = expert_purity(model, batches())
    assert model.training and list(found) == ["blocks.0.ffn", "blocks.1.ffn"]
    for number, figures in enumerate(found.values()):
        weight = torch.zeros(3, VOCABULARY, dtype=torch.float64)
        seen, active = torch.zeros(VOCABULARY), 0
        for batch in batches():
            gates = score(model, batch, "fp32")[0].traces[number].routing.dense().detach()
            for gate, token in zip(gates, batch.tokens[batch.keep].tolist(), strict=True):
                weight[:, token] += gate
                seen[token] += 1
                active += int((gate > 0).sum())
        assert figures["purity"] == pytest.approx([float(row.max() / row.sum()) for row in weight])
        assert figures["mean_purity"] == pytest.approx(float(weight.max(1).values.sum() / weight.sum()))
        assert figures["text_purity"] == pytest.approx(float(seen.max() / seen.sum()))
        assert figures["active"] == active / float(seen.sum()) == 2


def test_experts_of_single_words_are_pure_and_those_of_all_are_as_the_text() -> None:
    model = tiny_model(kinds=("moe",)).double()
    (layer,) = model.moe_layers().values()
    layer.branches[0] = FFNBank(WIDTH, [2] * 4).double()
    layer.router = ScoredRouter(LinearScore(WIDTH, 4, init_std=0.0), Soft()).double()
    (figures,) = expert_purity(model, batches()).values()
    assert figures["purity"] == pytest.approx([figures["text_purity"]] * 4) and figures["active"] == 4


def test_what_has_no_purity() -> None:
    model = tiny_model(kinds=("moe",))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        expert_purity(model, [])
    layer = next(iter(model.moe_layers().values()))
    assert isinstance(layer, MoELayer)
    layer.router = SlotRouter(WIDTH, 3)
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn does not route the model's tokens one by one"):
        expert_purity(model, batches())


def test_a_layer_of_too_many_experts_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("moestro.evaluate.purity.MOST", 2)
    with pytest.raises(ValueError, match="3 experts, allowed: 2"):
        expert_purity(tiny_model(kinds=("moe",)), batches())
