"""The harness of directional effects: equal compute, probes, verdicts, and a study killed and started again."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from bench.effects import figures, hmoe
from bench.effects.command import collect, main
from bench.effects.corpora import corpus_settings
from bench.effects.effect import Effect, interval_of_mean
from bench.effects.routing_probes import difficulty, relation, routing_history, widths_and_losses
from bench.effects.study import Arm, Study, Trained, Work
from bench.effects.table import effects_summary, expected
from moestro.compare.board import Board
from moestro.data import IGNORE
from moestro.recipe.build import build_model
from moestro.recipe.syntax import RecipeError
from tests.train.tiny import Counting, tiny_model

WIDTHS = {"model.ffn.branches.0.widths": [4, 8, 12, 16]}
STUDY = Study(
    name="hmoe",
    arms={
        "unequal": Arm("hmoe.yaml", WIDTHS),
        "top-3": Arm("hmoe.yaml", {**WIDTHS, "model.ffn.router.select.top_k": 3}),
    },
    budget=1e9,
    common={"model.d_model": 8, "model.n_layers": 2, "model.attention.n_heads": 2, "train.batch_size": 2},
    probes={"history": routing_history, "difficulty": difficulty},
    checkpoints=3,
).quick()
MORE = Effect("X", "more", "-", "experts", ("top-3", "unequal"), figures.fewer, low=0.5, high=1.5)
SAVING = Effect("Y", "less", "-", "width", ("unequal",), figures.saving, high=math.inf)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    """A study that has run."""
    made = Work(STUDY, tmp_path_factory.mktemp("study"), tmp_path_factory.mktemp("nothing"))
    made.train(workers=1, board=Board(Console(quiet=True)))
    return made


def test_every_run_used_the_budget_and_was_probed_along_the_way(work):
    assert [(job.seed, job.arm) for job in work.jobs] == [(0, "unequal"), (0, "top-3"), (1, "unequal"), (1, "top-3")]
    for job in work.jobs:
        summary = job.summary
        per_step = summary["flops"] / summary["step"]
        assert STUDY.budget <= summary["flops"] < STUDY.budget + 1.5 * per_step
        steps = [state["step"] for state in summary["history"]]
        assert steps[0] == 0 and steps[-1] == summary["step"] and len(steps) >= 4
        for state in summary["history"]:
            for layer in state["layers"]:
                assert sum(layer["load"]) == pytest.approx(layer["experts"])
                used = sum(w * n for w, n in zip(layer["widths"], layer["load"], strict=True))
                assert used == pytest.approx(layer["width"])


def test_the_first_state_is_the_untrained_model(work):
    job = work.jobs[0]
    trained = Trained(work.recipe("pages", "unequal", {"train.seed": 0}), work.datasets["pages"], job.folder, 64)
    fresh = build_model(trained.recipe, trained.dataset.vocab_size).state_dict()
    assert all(value.equal(fresh[name]) for name, value in trained.model(0).state_dict().items())
    assert not trained.model().embedding.weight.equal(fresh["embedding.weight"])


def test_a_second_start_trains_nothing_and_says_the_same(work, monkeypatch):
    before = collect(work, [MORE, SAVING])
    monkeypatch.setattr("moestro.compare.run.ProcessPoolExecutor", None)
    again = Work(STUDY, work.folder, work.data)
    again.train(workers=1, board=Board(Console(quiet=True)))
    after = collect(again, [MORE, SAVING])
    for result in (before, after):
        del result["machine"]
    assert after == before


def test_a_folder_of_another_study_is_refused(work):
    other = Study(**{**vars(STUDY), "common": {**STUDY.common, "optim.lr": 1e-5}})
    with pytest.raises(
        RecipeError, match=r"holds a finished run of another comparison: recipe.optim.lr was 0.002, now"
    ):
        Work(other, work.folder, work.data).train(workers=1, board=Board(Console(quiet=True)))


def test_rows_say_what_was_expected_measured_and_whether_it_holds(work):
    results = json.loads(json.dumps(collect(work, [MORE, SAVING])))
    more, saving = results["rows"]
    assert more["values"] == [1.0, 1.0] and more["interval"] == [1.0, 1.0] and more["holds"] == "yes"
    assert more["paired"] and not saving["paired"] and saving["expected"] == [None, None]
    for seed, value in zip((0, 1), saving["values"], strict=True):
        (job,) = (job for job in work.jobs if (job.seed, job.arm) == (seed, "unequal"))
        layers = job.summary["history"][-1]["layers"]
        assert value == pytest.approx(sum(layer["width"] / (2 * 10) for layer in layers) / 2)
    text = effects_summary(results)
    assert "| X | more | experts | pages | 0.5 to 1.5 | 1.000 ± 0.000 | 1 to 1 | yes |" in text
    assert results["corpora"]["pages"]["fingerprint"][:12] in text and results["commit"][:12] in text
    losses = [job.summary["final"]["bpb"] for job in work.jobs if job.arm == "top-3"]
    assert f"| top-3 | pages | {statistics.fmean(losses):.3f} ±" in text


@pytest.mark.parametrize(
    ("values", "low", "high", "holds"),
    [
        ([1.0, 1.1, 1.2], 0, math.inf, "yes"),
        ([1.0, 1.1, 1.2], -math.inf, 0.5, "no"),
        ([1.0, 1.1, 1.2], 1.1, math.inf, "not separable from noise"),
        ([-1.0, 3.0], 0, math.inf, "not separable from noise"),
        ([5.0], 0, math.inf, "not separable from noise"),
        ([5.0, 6.0], -math.inf, math.inf, "–"),
        ([0.0, 0.0], -math.inf, 0, "not separable from noise"),
        ([1.0, 1.0], 0, math.inf, "yes"),
    ],
)
def test_an_effect_holds_where_the_interval_lies_in_the_range(values, low, high, holds):
    effect = Effect("Z", "", "", "", ("a",), lambda run: run["x"], low, high)
    row = effect.row("text", {seed: {"a": {"x": value}} for seed, value in enumerate(values)})
    assert row["holds"] == holds and row["measured"] == pytest.approx(statistics.fmean(values))


def test_the_interval_is_student_s() -> None:
    """t(0.975; 2) = 4.303, standard deviation 1, three values."""
    low, high = interval_of_mean([1.0, 2.0, 3.0])
    assert high - 2 == pytest.approx(4.3027 / 3**0.5, rel=1e-4) and low == pytest.approx(4 - high)


def test_a_value_that_is_no_number_is_refused():
    effect = Effect("Z", "", "", "ratio", ("a",), lambda run: math.nan)
    with pytest.raises(ValueError, match=r"effect Z on text: ratio is \[nan\] for seeds \[0\]"):
        effect.row("text", {0: {"a": {}}})


def test_widths_and_losses_are_those_of_each_position():
    """Against each sequence alone; padding has neither."""
    model = tiny_model(kinds=("moe", "moe")).eval()
    batch = next(iter(Counting().val_batches(2)))
    keep = torch.ones_like(batch.keep)
    keep[1, 4:] = False
    batch = replace(batch, targets=batch.targets.where(keep, IGNORE))
    with torch.no_grad():
        width, loss = widths_and_losses(model, batch)
        for row, length in enumerate((6, 4)):
            output = model(batch.tokens[row : row + 1, :length])
            alone = sum(trace.active_width() for trace in output.traces) / 2
            torch.testing.assert_close(width[row, :length].double(), alone.double())
            nats = torch.nn.functional.cross_entropy(output.logits[0], batch.targets[row, :length], reduction="none")
            torch.testing.assert_close(loss[row, :length], nats)
    assert not width[1, 4:].any() and not loss[1, 4:].any()


def test_relation_of_width_and_loss():
    width, loss = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 0.2, 0.3, 0.9])
    found = relation([(width[:2], loss[:2]), (width[2:], loss[2:])])
    assert found["hard_over_easy"] == 4.0 and 0.8 < found["correlation"] < 1
    assert relation([(torch.ones(8), torch.arange(8.0))])["correlation"] is None


def test_corpora_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"corpus wikitext-2: no file .*train.txt; --data names the folder"):
        corpus_settings("wikitext-2", tmp_path)
    with pytest.raises(ValueError, match=r"corpus 'wiki', allowed: wikitext-2, "):
        corpus_settings("wiki", tmp_path)


def test_ranges_in_words():
    assert [expected(bounds) for bounds in ((0, None), (None, 1.5), (0.85, 0.93), (None, None))] == [
        "at least 0",
        "at most 1.5",
        "0.85 to 0.93",
        "any",
    ]


def test_arms_of_hmoe_s_study_say_what_they_are_called(tmp_path):
    """Same total width everywhere, the objectives of the names, entropy of the sign of the names."""
    study = hmoe.STUDY.quick()
    work = Work(study, tmp_path, tmp_path)
    objectives = {}
    for arm in study.arms:
        recipe = work.recipe("pages", arm, {})
        model = build_model(recipe, 64, "meta")
        assert len(model.moe_layers()) == 3
        assert all(layer.expert_widths().sum() == hmoe.TOTAL for layer in model.moe_layers().values())
        objectives[arm] = [(name, weight, part.build()) for name, weight, part in recipe.objectives]
    assert [name for name, *_ in objectives["no-loss"]] == []
    assert [name for name, *_ in objectives["equal"]] == [name for name, *_ in objectives["balanced"]]
    assert not objectives["top-p-entropy"][1][2].literal and objectives["top-p-printed"][1][2].literal
    assert {arm for effect in hmoe.EFFECTS for arm in effect.arms} == set(study.arms)


@pytest.mark.slow
def test_the_quick_study_of_hmoe_measures_every_effect(tmp_path):
    results = main(
        hmoe.STUDY, hmoe.EFFECTS, hmoe.__doc__, ["--quick", "--workers", "1", "--json", f"{tmp_path}/x.json"]
    )
    assert [row["effect"] for row in results["rows"]] == [effect.id for effect in hmoe.EFFECTS]
    assert json.loads((tmp_path / "x.json").read_text()) == results
