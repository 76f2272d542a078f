"""PEER's study: what its arms are, what its figures say, and that it runs."""

import json

import pytest
import torch

from bench.effects import figures, peer
from bench.effects.command import main
from bench.effects.routing_probes import final_routing
from bench.effects.study import Trained, Work
from moestro.experts import ValueBank
from moestro.recipe.build import build_model
from moestro.routers.query_norm import BatchQueryNorm
from tests.train.tiny import Counting, tiny_model


def test_arms_say_what_they_are_called(tmp_path):
    work = Work(peer.STUDY.quick(), tmp_path, tmp_path)
    models = {arm: build_model(work.recipe("pages", arm, {}), 64, "meta") for arm in work.study.arms}
    assert not models.pop("dense").moe_layers()
    layers = {arm: model.moe_layers()["blocks.2.ffn"] for arm, model in models.items()}
    plain = layers["peer"]
    for arm, layer in layers.items():
        router, where = layer.router, {"n-256": 256, "n-1024": 1024, "n-16384": 16_384}
        assert router.n_experts == where.get(arm, 4096)
        assert router.top_k == {"k-2": 2, "k-32": 32, "pkm": 16}.get(arm, 8)
        assert isinstance(router.query_norm, BatchQueryNorm) == (arm != "no-norm")
        assert len(router.keys[0]) == (4 if arm == "own-keys" else 1)
        assert (router.heads, router.keys.shape[-1]) == (4, 16)
        assert isinstance(layer.bank, ValueBank) == (arm == "pkm")
    assert layers["pkm"].expected_token_flops() == plain.expected_token_flops()
    assert torch.bincount(layers["uneven"].bank.widths).tolist() == [0, 2048, 1024, 0, 1024]
    assert [name for name, *_ in work.recipe("pages", "uneven", {}).objectives] == ["retrieved_parameter_penalty"]
    assert {arm for effect in peer.EFFECTS for arm in effect.arms} == set(work.study.arms)


def test_final_routing_is_that_of_the_last_state(monkeypatch):
    model = tiny_model(kinds=("dense", "peer", "moe"))
    model.moe_layers()["blocks.1.ffn"].router.query_norm.update(torch.zeros(8), torch.ones(8))
    monkeypatch.setattr(Trained, "model", lambda self, step=None: model)
    trained = Trained(recipe=None, dataset=None, folder=None, final_tokens=72)  # type: ignore[arg-type]
    monkeypatch.setattr(Trained, "held_out", lambda self, tokens=None: Counting().val_batches(4))
    one, two = final_routing(trained)
    assert one["tokens"] == two["tokens"] == 72
    assert (one["experts"], one["width"], one["mean_width"]) == (6.0, 6.0, 1.0)
    assert two["experts"] == 2.0 and two["mean_width"] == 4.0 and 4 < two["width"] < 10
    assert 0 < one["usage"] <= 1 and one["unevenness"] > 0


def run(bpb, *layers):
    return {
        "final": {"bpb": bpb},
        "routing": [dict(zip(("unevenness", "width"), layer, strict=True)) for layer in layers],
    }


def test_figures():
    a, b = run(2.0, (1.0, 6.0), (2.0, 6.0)), run(2.5, (2.0, 6.0), (3.0, 6.0))
    assert figures.kl(a) == 1.5
    assert figures.more_even(a, b) == pytest.approx(0.4) and figures.less_even(a, b) == -1.0
    # 2.5 -> 2.0 gains a fifth, 2.0 -> 1.9 a twentieth
    assert figures.diminishing(b, a, run(1.9)) == pytest.approx(0.2 - 0.05)
    for layer in a["routing"]:
        layer |= {"experts": 4.0, "mean_width": 2.0}
    assert figures.leanness(a) == pytest.approx(0.75)


@pytest.mark.slow
def test_the_quick_study_measures_every_effect(tmp_path):
    results = main(
        peer.STUDY, peer.EFFECTS, peer.__doc__, ["--quick", "--workers", "1", "--json", f"{tmp_path}/x.json"]
    )
    assert [row["effect"] for row in results["rows"]] == [effect.id for effect in peer.EFFECTS]
    assert json.loads((tmp_path / "x.json").read_text()) == results
