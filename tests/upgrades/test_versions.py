"""Every kind of file says its version; older ones are upgraded step by step, newer ones refused with what to do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from moestro import LinearScore, ScoredRouter, TopK, upgrades
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from moestro.routers import BiasedRouter, SlotRouter
from moestro.train import checkpoint, load_weights
from moestro.train.settings import Budget, TrainSettings
from moestro.train.state import FREE
from moestro.train.tensors import model_tensors
from moestro.upgrades import CHECKPOINT, EXPORT, PLAN, RUN, SHARDS, Format, VersionError

FILE = Path("some/file.json")
FORMATS = [value for value in vars(upgrades).values() if isinstance(value, Format)]
# What a checkpoint of each version fixes. A setting that comes or goes is a new version of checkpoints: enter the
# function that gives the older ones what they were trained with, in moestro/upgrades.py, and add the names here.
SETTINGS = {
    2: "accumulate batch_size budget compile precision recompute seed table_precision "
    "optim.betas optim.clip optim.eps optim.fused_rows optim.groups optim.lr optim.schedule optim.skipped_rows "
    "optim.weight_decay"
}


def two_steps() -> Format:
    def renamed(content: dict) -> dict:
        return {("width" if key == "size" else key): value for key, value in content.items()}

    def doubled(content: dict) -> dict:
        return content | {"width": 2 * content["width"]}

    return Format("thing", "version", steps={1: renamed, 2: doubled})


def test_content_goes_through_every_step_from_its_own_version():
    thing = two_steps()
    assert thing.version == 3
    assert thing.upgraded({"version": 1, "size": 4}, FILE) == {"version": 3, "width": 8}
    assert thing.upgraded({"version": 2, "width": 4}, FILE) == {"version": 3, "width": 8}
    content = {"version": 3, "width": 8}
    assert thing.upgraded(content, FILE) is content


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_newer_content_is_refused_with_what_to_do(form):
    newer = {form.key: form.version + 1}
    with pytest.raises(VersionError) as error:
        form.upgraded(newer, FILE)
    assert str(error.value) == (
        f"some/file.json is a {form.name} of format version {form.version + 1}, written by a newer moestro; this one "
        f"reads up to {form.version}: update moestro, or use the one that wrote it (some/file.json: {form.key})"
    )


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("said", [0, -1, "1", 1.0, True, None, [1]])
def test_what_is_no_version_is_refused(form, said):
    with pytest.raises(VersionError, match=rf"allowed: 1 to {form.version} \(some/file.json: {form.key}\)"):
        form.upgraded({form.key: said}, FILE)


def test_content_without_a_version_is_of_the_first_where_it_may_say_none():
    assert {form.name for form in FORMATS if form.absent} == {RUN.name, EXPORT.name}
    assert RUN.version_of({}, FILE) == 1
    with pytest.raises(VersionError, match="format=None, allowed: 1 to"):
        SHARDS.version_of({}, FILE)


def test_every_step_up_to_today_is_there():
    for form in FORMATS:
        assert sorted(form.steps) == list(range(1, form.version))
        assert set(form.tensors) <= set(form.steps)


def test_settings_that_a_checkpoint_fixes_belong_to_its_version():
    settings = TrainSettings(Budget(steps=1))
    own = {name for name in vars(settings) if name not in FREE | {"optim"}}
    fixed = own | {f"optim.{name}" for name in vars(settings.optim)}
    assert fixed == set(SETTINGS[CHECKPOINT.version].split()), "see SETTINGS"


def test_routers_of_version_1_get_their_masks_and_others_keep_theirs():
    shapes = {"a.router.score.weight": (3, 8), "b.router.score.weight": (2, 8), "b.router.available": (2,)}
    added = CHECKPOINT.added(1, shapes)
    assert set(added) == {"a.router.available", "a.router.resting", "b.router.resting"}
    assert added["a.router.available"].tolist() == [True] * 3 and not added["a.router.resting"].any()
    assert CHECKPOINT.added(CHECKPOINT.version, shapes) == {}


@pytest.mark.parametrize(
    ("router", "masked"),
    [
        (lambda: ScoredRouter(LinearScore(8, 4), TopK(1)), True),
        (lambda: BiasedRouter(LinearScore(8, 4), 1), False),
        (lambda: SlotRouter(8, 4), False),
    ],
    ids=["scored", "biased", "slots"],
)
def test_checkpoints_of_version_1_load_whatever_their_routers(router, masked, tmp_path, monkeypatch):
    then, now = (nn.ModuleDict({"router": router()}) for _ in range(2))
    tensors = {name: value for name, value in model_tensors(then)[0].items() if name.endswith("score.weight")}
    tensors |= {name: value for name, value in then.state_dict().items() if name.endswith("bias")}
    monkeypatch.setattr(checkpoint, "CHECKPOINT", replace(CHECKPOINT, steps={}, tensors={}))
    path = checkpoint.write_checkpoint(tmp_path, 1, {"model": tensors}, {"tied": {}})
    monkeypatch.undo()
    load_weights(now, path)
    torch.testing.assert_close(now.state_dict(), then.state_dict())
    assert ("router.available" in now.state_dict()) is masked


def test_a_written_recipe_says_its_version_and_reads_as_the_same(tmp_path):
    recipe = load_recipe("recipes/hmoe.yaml")
    recipe.write(tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert text.startswith(f"format_version: {RUN.version}\n")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    (tmp_path / "newer.yaml").write_text(text.replace("format_version: 1", "format_version: 7"))
    with pytest.raises(RecipeError, match="a recipe of format version 7, written by a newer moestro"):
        load_recipe(tmp_path / "newer.yaml")


def test_a_plan_of_a_former_version_is_read(tmp_path, monkeypatch):
    from moestro.compress import plan_file
    from tests.compress.test_plan import FULL as SAID

    def shares(content: dict) -> dict:
        content = dict(content)
        return content | {"ratio": content.pop("share")}

    former = json.loads(plan_file.plan_text(SAID))
    former["share"] = former.pop("ratio")
    (tmp_path / "plan.json").write_text(json.dumps(former))
    monkeypatch.setattr(plan_file, "PLAN", replace(PLAN, steps={1: shares}))
    assert plan_file.read_plan(tmp_path / "plan.json", whole=False) == SAID
    assert json.loads(plan_file.plan_text(SAID))["version"] == 2


def test_tensors_of_several_steps_add_up():
    first = Format("thing", "v", steps={1: dict, 2: dict}, tensors={2: lambda shapes: {"b": torch.zeros(shapes["a"])}})
    first = replace(first, tensors={**first.tensors, 1: lambda shapes: {"a": torch.ones(2)}})
    assert {name: tuple(tensor.shape) for name, tensor in first.added(1, {}).items()} == {"a": (2,), "b": (2,)}
