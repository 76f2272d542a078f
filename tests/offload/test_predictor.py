"""The routers of the layers ahead: one stacked product, the same choices as each by itself and as the model's own."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moestro.formats import Checkpoint
from moestro.hf import intercepted
from moestro.offload.predictor import StackedGates, gates_of
from tests.hf.families import MOE, some_tokens, tiny


@pytest.mark.parametrize("family", [name for name in MOE if name != "phimoe"])
def test_choices_are_those_of_the_model_s_routers(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    seen: dict[int, tuple] = {}
    with torch.no_grad(), intercepted(model, lambda layer, module, *call: seen.__setitem__(layer, call)):
        model(some_tokens())
    gates = gates_of(checkpoint)
    assert sorted(seen) == list(checkpoint.moe_layers)
    for gate, layer in zip(gates, checkpoint.moe_layers, strict=True):
        hidden, ids, weights = seen[layer]
        chosen, scores = gate.choose(F.linear(hidden.float(), gate.weight.float()))
        assert torch.equal(chosen.sort(-1).values, ids.sort(-1).values)
        # the same order of importance, and the same shares where the family gives scores as gates
        own = weights.gather(-1, ids.argsort(-1)) / weights.sum(-1, keepdim=True)
        mine = scores.gather(-1, chosen.argsort(-1)) / scores.sum(-1, keepdim=True)
        assert torch.allclose(own.float(), mine, atol=1e-4)


def test_the_stacked_product_is_that_of_every_layer_by_itself(tmp_path: Path) -> None:
    tiny("mixtral", num_hidden_layers=4, num_local_experts=6).save_pretrained(tmp_path)
    gates = gates_of(Checkpoint(tmp_path))
    stacked = StackedGates(gates)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for layer in range(4):
        for depth in (0, 1, 2, 5):
            found = stacked.ahead(layer, hidden, depth)
            assert len(found) == min(depth, 3 - layer)
            for (ids, weights), gate in zip(found, gates[layer + 1 :], strict=False):
                alone_ids, alone = gate.choose(F.linear(hidden, gate.weight))
                assert torch.equal(ids, alone_ids) and torch.allclose(weights, alone, atol=1e-6)
    assert stacked.size == 4 * 6 * 32 * 4
