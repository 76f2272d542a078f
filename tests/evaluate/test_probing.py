"""Expert probing: a table of losses, each expert serving a layer alone."""

from collections.abc import Iterator

import pytest
import torch

from moestro.data import Batch
from moestro.evaluate import evaluate, expert_probe
from moestro.evaluate.probing import served_by
from moestro.evaluate.scoring import score
from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.model import Transformer
from moestro.routers import LinearScore, ScoredRouter, SlotRouter, TopK
from tests.reference import mode as reference
from tests.tolerances import FLOAT64
from tests.train.test_whole_step import ragged
from tests.train.tiny import WIDTH, Counting, tiny_model


def model() -> Transformer:
    return tiny_model(kinds=("moe", "moe")).double()


def batches() -> Iterator[Batch]:
    yield from Counting().val_batches(4)
    yield ragged(Counting().train_batch(0, 8, seed=0))


def test_one_expert_serves_with_the_weight_of_the_chosen() -> None:
    torch.manual_seed(0)
    layer = MoELayer(ScoredRouter(LinearScore(6, 3, init_std=1.0), TopK(1, renormalize=False)), [FFNBank(6, [2, 4, 6])])
    x = torch.randn(9, 6, dtype=torch.float64)
    layer = layer.double()
    before = layer(x)[0]
    experts = [
        lambda token, e=e: layer.bank.run(token[None], torch.tensor([0] * (e + 1) + [1] * (3 - e)))[0] for e in range(3)
    ]
    for expert in range(3):
        with served_by(layer, expert):
            have = layer(x)[0]
        want = reference.forced(x, experts, layer.router.score.weight, expert)
        torch.testing.assert_close(have, want, **FLOAT64)
    assert torch.equal(layer(x)[0], before) and isinstance(layer.router, ScoredRouter)


def test_the_table_is_that_of_the_definition() -> None:
    probed = model()
    before = {name: value.clone() for name, value in probed.state_dict().items()}
    found = expert_probe(probed, batches)
    assert probed.training and all(torch.equal(value, before[name]) for name, value in probed.state_dict().items())
    assert list(found) == ["blocks.0.ffn", "blocks.1.ffn"]
    figures = evaluate(probed, batches())
    for number, (name, layer) in enumerate(probed.moe_layers().items()):
        sums = [[0.0] * 4 for _ in range(3)]
        count = [0] * 3
        for batch in batches():
            output, losses = score(probed, batch, "fp32")
            group = output.traces[number].routing.dense().argmax(-1)
            served = [losses[batch.keep]]
            for expert in range(3):
                with served_by(layer, expert):
                    served.append(score(probed, batch, "fp32")[1][batch.keep])
            for t, g in enumerate(group.tolist()):
                count[g] += 1
                for column, loss in enumerate(served):
                    sums[g][column] += float(loss[t].detach())
        assert found[name]["tokens"] == count and sum(count) == figures["tokens"]
        for g in range(3):
            row = [found[name]["as_routed"][g], *(found[name]["loss"][g] or [None] * 3)]
            assert row == ([pytest.approx(s / count[g]) for s in sums[g]] if count[g] else [None] * 4)
        assert sum(row[0] for row in sums) / sum(count) == pytest.approx(figures["loss"])
        own = sum(sums[g][g + 1] for g in range(3))
        foreign = sum(sum(row[1:]) for row in sums) - own
        assert found[name]["own"] == pytest.approx(own / sum(count))
        assert found[name]["foreign"] == pytest.approx(foreign / sum(count) / 2)


def test_identical_experts_make_equal_columns() -> None:
    probed = model()
    for layer in probed.moe_layers().values():
        layer.branches[0] = FFNBank(WIDTH, [4] * 3).double()
        with torch.no_grad():
            for weight in layer.bank.parameters():
                blocks = weight.view(3, -1, WIDTH)
                blocks.copy_(blocks[:1].clone().expand_as(blocks))
    for figures in expert_probe(probed, batches).values():
        for served, whole in zip(figures["loss"], figures["as_routed"], strict=True):
            # gates of top-2 sum to 1, and so does the weight of the one that serves
            assert served is None or served == pytest.approx([whole] * 3, rel=1e-9)


def test_what_cannot_be_probed() -> None:
    for probed, message in (
        (tiny_model(kinds=("dense",)), "no mixture layers"),
        (tiny_model(kinds=("rows",)), "256 experts, each a pass"),
    ):
        with pytest.raises(ValueError, match=message):
            expert_probe(probed, batches)
    slots = model()
    next(iter(slots.moe_layers().values())).router = SlotRouter(WIDTH, 3, slots=2).double()
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn does not route the model's tokens one by one"):
        expert_probe(slots, batches)
