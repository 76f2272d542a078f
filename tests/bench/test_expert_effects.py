"""What the study of experts' parameters trains, and its probes on runs and banks made by hand."""

import json
from dataclasses import replace

import pytest
import torch

from bench.effects.command import collect, main
from bench.effects.expert_probes import alike, foreign, mean_cosine, old_text, outputs, purity
from bench.effects.experts import EFFECTS, STUDY, SYSTEMS
from bench.effects.study import Trained, Work
from bench.effects.systems.mpoe import between
from bench.effects.systems.smola import forgets_more, forgotten
from bench.effects.systems.system import parameters as share
from bench.harness import ROOT
from moestro.compare.job import run_job
from moestro.evaluate import evaluate
from moestro.experts import FFNBank, MPOBank
from moestro.layers import adapters_of
from moestro.layers.adapted import Mixture
from moestro.model import Transformer
from moestro.recipe.build import build_model
from moestro.recipe.load import load_recipe
from tests.train.tiny import VOCABULARY, Counting


def model(arm: str) -> Transformer:
    chosen = STUDY.arms[arm]
    keys = {**STUDY.common, **chosen.settings}
    recipe = load_recipe(ROOT / "recipes" / chosen.recipe, [f"{k}={json.dumps(v)}" for k, v in keys.items()])
    return build_model(recipe, 512, "meta")


def parameters(of: Transformer) -> int:
    return sum(p.numel() for p in of.parameters())


def test_effects_speak_of_arms_that_are_trained() -> None:
    assert all(STUDY.arms[name] == arm for system in SYSTEMS for name, arm in system.arms.items())
    assert {arm for effect in EFFECTS for arm in effect.arms} <= set(STUDY.arms)
    assert set(STUDY.arms) - {arm for effect in EFFECTS for arm in effect.arms} == set()
    assert len({effect.id for effect in EFFECTS}) == len(EFFECTS)
    assert all(STUDY.arms[arm.start] and arm.text for arm in STUDY.arms.values() if arm.start)


def test_what_is_called_of_equal_size_is_to_a_unit() -> None:
    """Rivals of muMoE and MPOE in parameters and in FLOPs a token; LoRA below and above SMoLA."""
    assert parameters(model("top-2-132")) == parameters(model("mpoe"))
    for arm in ("dense-535", "top-2-533"):
        assert parameters(model(arm)) == pytest.approx(parameters(model("mumoe-64")), rel=0.001)
    for arm in ("dense-535", "top-2-2132"):
        cost = model(arm).expected_token_flops(128)
        assert cost == pytest.approx(model("mumoe-64").expected_token_flops(128), rel=0.001)
    learning = {
        arm: sum(p.numel() for p in model(arm).parameters() if p.requires_grad)
        for arm in ("lora-17", "smola-4x4", "lora-18")
    }
    assert learning == {"lora-17": 113_472, "smola-4x4": 114_432, "lora-18": 120_000}
    # a router of one expert does nothing
    assert sum(m.router.n_experts == 1 for m in mixtures("lora-17")) == len(mixtures("lora-17")) > 0
    assert sum(p.numel() for m in mixtures("lora-17") for p in m.router.parameters()) == 2496


def mixtures(arm: str) -> list[Mixture]:
    return [m for layer in adapters_of(model(arm)).layers.values() for m in layer.each()]


def test_what_is_called_of_equal_size_is() -> None:
    """SMoLA and LoRA but for the routers, muMoE and a dense layer, a control's rank and the generated one's."""
    adapters = {arm: adapters_of(model(arm)) for arm in ("smola-4x4", "lora-16")}
    small, large = (
        sum(p.numel() for layer in found.layers.values() for m in layer.each() for p in m.bank.parameters())
        for found in adapters.values()
    )
    assert small == large
    for arm in ("mumoe-64", "mumoe-8"):
        assert parameters(model(arm)) == pytest.approx(parameters(model("dense")), rel=0.05)
    tied, free = ([moe.branches[1] for moe in model(arm).moe_layers().values()] for arm in ("hyper", "hyper-free"))
    assert {branch.generator.rank for branch in tied} == {branch.rank for branch in free} == {16}
    assert parameters(model("mpoe")) < 0.7 * parameters(model("top-2"))
    # rows of top-2 cost what the narrow dense layer does
    assert model("dense-128").expected_token_flops(128) == pytest.approx(
        model("mpoe").expected_token_flops(128), rel=0.01
    )


class Untrained:
    """Stands for a run of no steps on text that counts."""

    final_tokens = 72

    def __init__(self, arm: str) -> None:
        chosen = STUDY.arms[arm]
        keys = {**STUDY.common, **chosen.settings}
        self.recipe = load_recipe(ROOT / "recipes" / chosen.recipe, [f"{k}={json.dumps(v)}" for k, v in keys.items()])

    def model(self, step: int | None = None) -> Transformer:
        torch.manual_seed(0)
        return build_model(self.recipe, VOCABULARY).eval()

    def held_out(self, tokens: int | None = None):
        return Counting().val_batches(4)


def test_probes_answer_for_the_layers_that_they_are_about() -> None:
    for arm, feed_forward, mixture in (("mpoe", True, True), ("mumoe-8", False, True), ("dense", False, False)):
        run = Untrained(arm)
        assert (alike(run) is not None) == (foreign(run) is not None) == feed_forward
        assert (purity(run) is not None) == mixture and old_text(run) is None
    found = purity(Untrained("mumoe-8"))
    # gates start alike: every expert has weight, and is as pure as the text
    assert found["active_start"] == found["active_end"] == 8 and 0 < found["mean_purity_end"] < 0.5


@pytest.mark.parametrize("kind", ["ffn", "mpo"])
def test_outputs_are_every_expert_on_every_token(kind: str) -> None:
    torch.manual_seed(0)
    bank = FFNBank(6, [4] * 3) if kind == "ffn" else MPOBank(6, 3, 4)
    x = torch.randn(5, 6)
    rows = outputs(bank, x).detach()
    for e in range(3):
        offsets = torch.tensor([0] * (e + 1) + [5] * (3 - e))
        torch.testing.assert_close(rows[e], bank.run(x, offsets))
    pairs = [torch.nn.functional.cosine_similarity(rows[a], rows[b]).mean() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert mean_cosine(rows) == pytest.approx(float(sum(pairs)) / 3, abs=1e-6)
    assert mean_cosine(rows[:1].expand(3, -1, -1)) == pytest.approx(1)


def test_figures() -> None:
    def run(bpb: float, before: float = 2.0, after: float = 2.0, total: int = 1) -> dict:
        return {"final": {"bpb": bpb}, "old_text": {"before": before, "after": after}, "params_total": total}

    assert between(run(2.5), run(3.0), run(2.0)) == 0.5
    assert share(run(1, total=2), run(1, total=8)) == 0.25
    assert forgotten(run(1, after=2.5)) == 0.25
    assert forgets_more(run(1, after=2.5), run(1, after=3.0)) == -0.25


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    """A study of two arms, one of which goes on from the other."""
    arms = {name: STUDY.arms[name] for name in ("smola-4x4", "dense")}
    small = {"model.d_model": 8, "model.attention.n_heads": 2, "train.batch_size": 2, "model.n_layers": 1}
    study = replace(STUDY.quick(), arms=arms, common=small, budget=2e7)
    study = replace(study, arms={name: replace(arm, text=arm.text and "pages") for name, arm in arms.items()})
    made = Work(study, tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("nothing"))
    # in this process: workers of their own take longer to start than to train
    for job in sorted(made.jobs, key=lambda job: bool(arms[job.arm].start)):
        run_job(job)
    return made


@pytest.mark.slow
def test_an_arm_goes_on_from_another_s_run(work: Work) -> None:
    for seed in work.study.seeds:
        (base, adapted) = (work.run("pages", arm, seed) for arm in ("dense", "smola-4x4"))
        recipe = load_recipe(adapted / "recipe.yaml")
        assert str(recipe.adapt.build().start) == str(base)
        (job,) = (job for job in work.jobs if (job.arm, job.seed) == ("smola-4x4", seed))
        final = json.loads((base / "summary.json").read_text())["final"]["bpb"]
        assert job.summary["old_text"]["before"] == pytest.approx(final)
        assert job.summary["old_text"]["after"] != job.summary["old_text"]["before"]
        trained = Trained(recipe, work.datasets["pages"], adapted, 2048)
        start = evaluate(trained.model(0), trained.held_out())["bpb"]
        assert start == pytest.approx(final)
    described = collect(work, [])["study"]["arms"]
    assert described["smola-4x4"]["start"] == "dense" and "start" not in described["dense"]


@pytest.mark.slow
def test_the_quick_study_of_experts_measures_every_effect(tmp_path) -> None:
    results = main(STUDY, EFFECTS, "What shows", ["--quick", "--workers", "1", "--json", f"{tmp_path}/x.json"])
    assert [row["effect"] for row in results["rows"]] == [effect.id for effect in EFFECTS]
