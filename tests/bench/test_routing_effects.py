"""What the study of routing systems trains, and its probe of clusters on layers made by hand."""

import json

import pytest
import torch

from bench.effects.cluster_probes import cosines, relatives, same_cluster, summary
from bench.effects.loss_probes import gap
from bench.effects.pool_probes import pool
from bench.effects.routing import EFFECTS, STUDY, SYSTEMS
from bench.effects.routing_probes import depth, difficulty, routing_history
from bench.effects.systems.moec import TOKENS, alikeness, evener, gains_more, stand_in, tighter
from bench.effects.systems.multi_head import busier, wider
from bench.effects.systems.stratified import depth_of, frequent_less_rare
from bench.effects.systems.xmoe import idler
from bench.effects.unit_probes import NEAR, hidden_units, near_zero
from bench.harness import ROOT
from moestro.experts import FFNBank
from moestro.layers import MoELayer
from moestro.recipe.build import build_model, build_training
from moestro.recipe.load import load_recipe
from moestro.routers import LinearScore, ScoredRouter, TopK
from tests.train.tiny import SEQUENCE, VOCABULARY, Counting


class Untrained:
    """Stands for a run of no steps on text that counts."""

    final_tokens = 72

    def __init__(self, arm: str) -> None:
        self.recipe = model(arm)[2]

    @property
    def dataset(self) -> Counting:
        dataset = Counting()
        dataset.seq_len = SEQUENCE  # type: ignore[attr-defined]
        return dataset

    def checkpoints(self) -> dict:
        return {}

    def model(self, step: int | None = None):
        torch.manual_seed(0)
        return build_model(self.recipe, VOCABULARY).eval()

    def held_out(self, tokens: int | None = None):
        return Counting().val_batches(4)


def experts(model) -> int:
    return sum(
        p.numel()
        for p in {p for moe in model.moe_layers().values() for b in moe.banks() for p in b.owner()[0].parameters()}
    )


def model(arm: str):
    chosen = STUDY.arms[arm]
    keys = {**STUDY.common, **chosen.settings}
    recipe = load_recipe(ROOT / "recipes" / chosen.recipe, [f"{k}={json.dumps(v)}" for k, v in keys.items()])
    return build_model(recipe, 512, "meta"), build_training(recipe), recipe


def layer(copies: int = 1) -> MoELayer:
    torch.manual_seed(0)
    bank = FFNBank(6, [4] * 6)
    with torch.no_grad():
        for weight, rows in ((bank.w_in.weight, 8), (bank.w_out.weight, 4)):
            for e in range(6):
                weight[e * rows : (e + 1) * rows] = weight[e // copies * copies * rows :][:rows]
    return MoELayer(ScoredRouter(LinearScore(6, 6, init_std=1.0), TopK(1)), [bank], clusters=3)


def test_effects_speak_of_arms_that_are_trained() -> None:
    # systems that share an arm agree on what it is
    assert all(STUDY.arms[name] == arm for system in SYSTEMS for name, arm in system.arms.items())
    assert {arm for effect in EFFECTS for arm in effect.arms} == set(STUDY.arms)
    assert len({effect.id for effect in EFFECTS}) == len(EFFECTS)


def test_fine_and_coarse_experts_have_as_many_parameters() -> None:
    stored = {
        sum(p.numel() for moe in model(arm)[0].moe_layers().values() for p in moe.bank.parameters())
        for arm in STUDY.arms
        if arm.startswith("xmoe")
    }
    assert stored == {3 * 2 * 64 * 1024}


@pytest.mark.parametrize("n", [16, 64])
def test_plain_arms_are_without_cluster_loss_and_dropout(n: int) -> None:
    (with_clusters, training, _), (plain, other, _) = model(f"moec-{n}"), model(f"moec-plain-{n}")
    assert sum(p.numel() for p in with_clusters.parameters()) == sum(p.numel() for p in plain.parameters())
    assert [name for name, _, _ in training[1]] == ["load_balance", "cluster_variance"] and len(training[2]) == 1
    assert [name for name, _, _ in other[1]] == ["load_balance"] and not other[2]


def test_the_weight_of_clusters_is_that_of_the_paper_s_code_for_the_batch() -> None:
    recipe = model("moec-64")[2]
    batch, length = recipe.train.value("batch_size"), recipe.data.value("seq_len")
    assert batch * length == TOKENS
    assert [weight for _, weight, _ in model("moec-64")[1][1]] == [0.01, pytest.approx(0.16)]


def test_layers_made_of_layers_cost_what_flat_ones_do() -> None:
    """Expert parameters of strata are those of the flat mixture; heads match parameters and FLOPs but for rounding."""
    flat, strata = model("top-2")[0], model("stratified")[0]
    assert experts(flat) == experts(strata)
    for arm in ("heads-2", "heads-4"):
        split = model(arm)[0]
        projections = sum(p.numel() for n, p in split.named_parameters() if ".head." in n or ".merge." in n)
        assert experts(split) + projections == pytest.approx(experts(flat), rel=0.02)


def test_second_choices_are_compared_with_first() -> None:
    moe = layer()
    _, (trace,) = moe(torch.randn(40, 6))
    order = trace.routing.logits.argsort(dim=-1, descending=True)[:, :2] // 2
    assert same_cluster(trace, moe.cluster).tolist() == (order[:, 0] == order[:, 1]).tolist()
    found = summary([trace, trace])
    assert found["second_choice"] == pytest.approx(float((order[:, 0] == order[:, 1]).double().mean()))
    assert found["chance"] == pytest.approx(1 / 5)


def test_siblings_that_are_copies_are_alike() -> None:
    x = torch.randn(30, 6)
    alike = cosines(layer(copies=2).bank, x)
    same = torch.arange(6)[:, None] // 2 == torch.arange(6)[None] // 2
    torch.testing.assert_close(alike[same], torch.ones(12, dtype=torch.float64))
    assert alike[~same].abs().max() < 0.9
    _, (trace,) = layer(copies=2)(x)
    found = summary([trace])
    assert found["siblings"] == pytest.approx(1) and found["strangers"] < 0.9


def test_probes_read_layers_made_of_layers() -> None:
    for arm, layers in (("stratified", 6), ("heads-2", 3)):
        run = Untrained(arm)
        (history,) = routing_history(run)
        assert len(history["layers"]) == layers and len(pool(run)) == layers
        assert relatives(run) is None
        # parts of tokens all have as many experts of one width; passes differ
        assert (difficulty(run)["reading"]["correlation"] is None) == (arm == "heads-2")
        assert all(figures["unserved"] == 0 for figures in pool(run))
        assert len(depth(run)) == (3 if arm == "stratified" else 0)


@pytest.mark.parametrize("glu", [True, False])
def test_units_are_those_of_the_chosen_experts(glu: bool) -> None:
    torch.manual_seed(0)
    moe = MoELayer(ScoredRouter(LinearScore(6, 3), TopK(2)), [FFNBank(6, [2, 4, 5], activation="relu", glu=glu)])
    _, (trace,) = moe(torch.randn(7, 6))
    want = []
    for token, expert in zip(trace.routing.token.tolist(), trace.routing.expert.tolist(), strict=True):
        matrix = list(moe.bank.w_in.matrices())[expert]
        h = matrix @ trace.x[token]
        width = moe.bank.widths[expert]
        want.append(h[:width].relu() * h[width:] if glu else h.relu())
    torch.testing.assert_close(hidden_units(trace).sort().values, torch.cat(want).sort().values)


def test_probes_of_units_and_of_losses_read_a_run() -> None:
    run = Untrained("xmoe-0.9")
    share = near_zero(run)
    assert share is not None and 0 < share < 4 * NEAR
    assert near_zero(Untrained("stratified")) is None
    assert abs(gap(run)) < 1
    assert idler({"near_zero": 0.25}, {"near_zero": 0.5}) == -0.25 and tighter({"gap": 1.0}, {"gap": 0.5}) == 0.5


def test_figures_are_differences() -> None:
    def run(bpb: float, **relatives: float) -> dict:
        return {"final": {"bpb": bpb}, "relatives": relatives}

    assert gains_more(run(2.0), run(4.0), run(3.0), run(4.0)) == pytest.approx(-0.25)
    assert evener(run(1, variance=0.25), run(1, variance=1.0)) == -0.75
    assert stand_in(run(1, second_choice=0.5, chance=0.25)) == 0.25
    deep = {"depth": [{"mean": 1.5, "by_frequency": [2.0, 1.5, 1.25]}, {"mean": 1.0, "by_frequency": [1.0]}]}
    assert (depth_of(deep), frequent_less_rare(deep)) == (1.25, -0.375)
    few, many = (
        {"history": [{"layers": [{"different": n, "load": load}]}]}
        for n, load in ((2, [1, 1, 6, 0]), (3, [2, 2, 2, 2]))
    )
    assert (wider(many, few), busier(many, few)) == (1, 0.25)
    assert alikeness(run(1, siblings=0.5, strangers=-0.25)) == 0.75
