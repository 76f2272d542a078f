"""The study of conversions: a public model read right, arms that say what they are called, figures, a whole run."""

import json
import lzma
import struct

import pytest
import torch

from bench.effects import factorllm
from bench.effects.command import main
from bench.effects.conversion import ConversionWork
from bench.effects.split_probes import Told, split
from bench.effects.stories import model_settings, read_model, write_tokenizer
from bench.effects.width_probes import ACTIVE, SPLITS, Priced, charge, told
from moestro.convert.grouping import Contiguous, Importance, equal_importance
from moestro.convert.plan import load_conversion
from moestro.convert.split import Split
from moestro.data import FileTokenizer
from moestro.layers import MoELayer
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from tests.conftest import ROOT
from tests.convert.networks import seen


def test_a_model_with_an_output_of_its_own_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(struct.pack("7i", 8, 16, 1, 2, 2, -32, 64))
    with pytest.raises(ValueError, match="vocabulary -32: its output does not share the embedding"):
        read_model(tmp_path / "model.bin")


def test_the_public_model_is_read_right(shared_data, tmp_path):
    """Stories that begin with their mark: 1.305 nats a token (the data folder's README); and the text comes back."""
    folder = shared_data / "checkpoints" / "stories260K"
    size, weights = read_model(folder / "stories260K.bin")
    tokenizer = FileTokenizer(write_tokenizer(folder / "tok512.bin", tmp_path), eos="<s>")
    settings = [f"{key}={json.dumps(value)}" for key, value in model_settings(size).items()]
    model = build_model(load_recipe(ROOT / "recipes" / "dense.yaml", settings), tokenizer.vocab_size)
    model.load_state_dict(weights)
    nats = count = 0.0
    with lzma.open(shared_data / "lm" / "tinystories.jsonl.xz", "rt") as lines, torch.no_grad():
        for _, line in zip(range(40), lines, strict=False):
            text = json.loads(line)["text"]
            ids = [tokenizer.eos_id, *tokenizer.encode(text)]
            assert tokenizer.decode(ids) == text
            logits = model(torch.tensor([ids[:256]])).logits[0]
            nats += float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:256]), reduction="sum"))
            count += len(ids[1:256])
    assert nats / count == pytest.approx(1.305, abs=0.02)


def test_arms_are_conversions_that_differ_as_their_names_say():
    conversions = {
        name: load_conversion(None, [f"{key}={json.dumps(value)}" for key, value in arm.settings.items()])
        for name, arm in factorllm.STUDY.arms.items()
        if arm.settings
    }
    eights = {"even-8", "uneven-8"}
    assert {name for name, one in conversions.items() if one.router.steps} == {"pa", "pa-lm"} | eights
    assert {name for name, one in conversions.items() if one.taught} == {"pa-lm"}
    assert {name for name, one in conversions.items() if getattr(one.method, "gate", "") == "hard"} == {
        "frozen",
        "released",
    }
    assert conversions["released"].method.scale == "n/k" and conversions["frozen"].method.scale == "fit"
    assert conversions["drop"].method.drop == 0.5 and conversions["upcycle"].method.drop == 0
    assert {arm for effect in factorllm.EFFECTS for arm in effect.arms} == set(factorllm.STUDY.arms)


def test_experts_that_are_told_are_the_best_ones():
    """The best subset loses least on the layer's output, all experts nothing."""
    of = seen(tokens=200)
    made = split(of, Contiguous())
    wanted = of.network(of.x)

    def error(labels: str, top_k: int = 2) -> float:
        layer = MoELayer(Told(made, of, top_k, labels, 1.0), [made.layer.bank])
        return float((layer(of.x)[0] - wanted).detach().square().mean())

    assert error("subset") < error("projection") < error("random") and error("subset", 4) < 1e-20
    assert error("subset", 3) < error("subset") < error("subset", 1)


@torch.no_grad()
def test_prices_make_half_of_the_units_active_and_cost_nothing_where_experts_are_alike():
    """Told routers of equal and unequal splits, and trained ones, whose equal experts are chosen as before."""
    of = seen(tokens=200)
    n_units = of.network.width
    for rule in (equal_importance, SPLITS["equal"][0]):
        made = Split(told(rule), 1, Importance())(of)
        priced = Priced(made, of.network, of.x)
        chosen = priced(of.x).dense() > 0
        shares = chosen.double() @ priced.units.double() / n_units
        assert float(shares.mean()) == pytest.approx(ACTIVE, abs=0.02)
        # at that price no other set is cheaper
        sets, errors = priced.choices(of.x)
        costs = errors + priced.price * (sets.float() @ priced.units)
        own = ((sets[None] == chosen[:, None]).all(-1)).nonzero()[:, 1]
        torch.testing.assert_close(costs.gather(1, own[:, None])[:, 0], costs.min(1).values)
    unequal = Split(told(equal_importance), 4, Importance())(of).layer
    unequal.router.score.weight.copy_(torch.randn_like(unequal.router.score.weight))
    charge(unequal, of.x)
    units = unequal.expert_widths()
    routing = unequal.router(of.x)
    assert float((routing.dense() != 0).float().sum(1).unique()) == 4
    assert float(((routing.dense() != 0).float() @ units.float()).mean() / n_units) == pytest.approx(ACTIVE, abs=0.02)


def test_figures_of_runs():
    run = {"splits": {"k1": 3.0, "k2": 2.0, "k3": 1.9, "k4": 1.5}, "final": {"loss": 2.0}}
    run["start"] = {"loss": {"converted": 3.0, "dense": 1.0}, "layers": [{"agreement": 0.5}, {"agreement": 0.7}]}
    other = {"final": {"loss": 1.5}, "start": {"loss": {"converted": 2.5, "dense": 2.5}}}
    assert factorllm.least_step(run) == pytest.approx(0.1) and factorllm.agreement(run) == pytest.approx(0.6)
    assert factorllm.recovered(run, other) == pytest.approx(1 / 1.5) and factorllm.worse(run, other) == 0.5
    assert factorllm.cheaper(run, other) == 0.5 and factorllm.kept(run) == 2.0 and factorllm.kept(other) == 0
    named = {effect.id: effect for effect in factorllm.EFFECTS}
    told_ = {"equal": {"loss": 2.0, "active": 0.5}, "equal_importance": {"loss": 1.5, "active": 0.47}}
    assert named["W2"].value({"widths": told_}) == 0.5
    assert factorllm.furthest({"widths": told_}) == pytest.approx(0.03)
    trained = {"as_trained": {"active": 0.6}, "half": {"loss": 2.0}}
    even = {"as_trained": {"active": 0.5}, "half": {"loss": 2.25}}
    assert factorllm.active({"routed": trained}, {"routed": even}) == pytest.approx(1.2)
    assert factorllm.worse_at_half({"routed": even}, {"routed": trained}) == 0.25
    assert named["S4"].value({"splits": {"random": 3.0, "projection": 2.5}}) == 0.5


@pytest.mark.slow
def test_the_quick_study_measures_every_effect(tmp_path):
    words = ["--quick", "--workers", "1", "--out", f"{tmp_path}/work", "--json", f"{tmp_path}/x.json"]
    results = main(factorllm.STUDY, factorllm.EFFECTS, factorllm.__doc__, words, ConversionWork)
    assert [row["effect"] for row in results["rows"]] == [effect.id for effect in factorllm.EFFECTS]
    rows = {row["effect"]: row for row in results["rows"]}
    assert rows["S1"]["holds"] == "yes" and rows["U1"]["holds"] == "yes" and rows["W1"]["holds"] == "yes"
    again = main(factorllm.STUDY, factorllm.EFFECTS, factorllm.__doc__, words, ConversionWork)
    assert again["rows"] == results["rows"]
