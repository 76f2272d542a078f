"""Runs converted through the command line: continued, evaluated, turned back."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moestro.cli import main
from moestro.convert.layers import ConversionError, convert_layer, every_expert
from moestro.convert.plan import load_conversion
from moestro.convert.run import convert_run, dense_sites
from moestro.convert.seen import Seen
from moestro.experts import FFNBank
from moestro.layers import DenseFFN, MoELayer, TaughtLayer
from moestro.recipe.evaluation import evaluate_run, opened_run
from moestro.recipe.load import load_recipe
from moestro.recipe.syntax import RecipeError
from tests.conftest import ROOT

FOLDER = ROOT / "recipes" / "convert"
RECIPES = sorted(FOLDER.glob("*.yaml"))
TOKENS = ["tokens=256"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained dense run of two blocks."""
    folder = tmp_path_factory.mktemp("dense")
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"{n} and {n * n} are {'even' if n % 2 == 0 else 'odd'}" for n in range(1200)))
    small = ["model.n_layers=2", "model.d_model=16", "model.attention.n_heads=2", "model.ffn.width=48"]
    data = [f"data.source={{kind: text, paths: {text}, split: blank-line}}", "data.tokenizer={kind: bytes}"]
    training = ["data.seq_len=32", "train.batch_size=8", "train.budget.steps=40", "train.eval_tokens=1024"]
    words = [*small, *data, *training, "train.tensorboard=false", "--out", str(folder / "run")]
    assert main(["train", str(ROOT / "recipes" / "dense.yaml"), *words]) == 0
    return folder / "run"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors")


def convert(source: Path, out: Path, *words: str) -> int:
    return main(["convert", str(source), "--out", str(out), *words])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_converts_trains_on_and_turns_back(recipe, dense, tmp_path, capsys):
    out, back = tmp_path / "moe", tmp_path / "back"
    changes = [*TOKENS, "run.train.budget={steps: 2}", "run.train.eval_tokens=256"]
    if load_conversion(recipe).router.steps:
        changes.append("router.steps=20")
    assert convert(dense, out, "--recipe", str(recipe), *changes) == 0
    text = capsys.readouterr().out
    assert "held-out loss" in text and f"moestro train {out}/recipe.yaml --out {out}" in text
    report = json.loads((out / "convert.json").read_text())
    loss, exact = report["loss"], {layer["exact"] for layer in report["layers"]}
    if exact == {"all"}:
        assert loss["all_experts"] == pytest.approx(loss["dense"], rel=1e-5)
    if exact == {"routed"}:
        assert loss["converted"] == pytest.approx(loss["dense"], rel=1e-5)
    assert all(one["difference"]["relative"] < 1e-5 for one in report["layers"] if one["exact"] != "no")
    assert evaluate_run(opened_run(out))["step"] == 0

    if any((rows < 0).any() for rows in load_file(out / "units.safetensors").values()):
        assert exact == {"no"} and convert(out, back, "--back") == 1
        assert "units were re-initialised in every expert" in capsys.readouterr().err
    else:
        assert convert(out, back, "--back") == 0
        old, new = weights(dense), weights(back)
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
        assert load_recipe(back / "recipe.yaml") == load_recipe(dense / "recipe.yaml")

    before = weights(out)
    assert main(["train", str(out / "recipe.yaml"), "--out", str(out)]) == 0
    after = weights(out)
    assert json.loads((out / "done.json").read_text())["step"] == 2
    frozen = {name for name in after if torch.equal(before[name], after[name]) and after[name].is_floating_point()}
    assert {name for name in frozen if "teacher" not in name} == set()
    assert frozen == {name for name in after if "teacher" in name}


def test_teachers_are_dropped(dense, tmp_path, capsys):
    out, without = tmp_path / "moe", tmp_path / "without"
    convert(dense, out, "--recipe", str(FOLDER / "factorllm.yaml"), "router.steps=5", *TOKENS)
    assert isinstance(opened_run(out).model.blocks[0].ffn, TaughtLayer)
    assert convert(out, without, "--drop-teacher") == 0
    model = opened_run(without).model
    assert all(isinstance(block.ffn, MoELayer) for block in model.blocks)
    objectives = load_recipe(without / "recipe.yaml").resolved["objectives"]
    assert [node["kind"] for node in objectives] == ["load_balance"]
    assert evaluate_run(opened_run(without))["loss"] == pytest.approx(evaluate_run(opened_run(out))["loss"], rel=1e-6)
    assert convert(without, tmp_path / "again", "--drop-teacher") == 1
    assert "no layer has a teacher" in capsys.readouterr().err


def test_a_trained_mixture_turned_back_is_what_all_its_experts_compute(dense, tmp_path):
    out, back = tmp_path / "moe", tmp_path / "back"
    method = "method={kind: split, widths: {kind: equal, n_experts: 4}, top_k: 2, shared: 8, gate: hard}"
    with pytest.warns(UserWarning, match="gate: hard: no gradient of the language-model loss reaches the routers"):
        convert(dense, out, method, *TOKENS, "run.train.budget={steps: 3}")
    router = {name: value for name, value in weights(out).items() if ".router.score." in name}
    main(["train", str(out / "recipe.yaml"), "--out", str(out)])
    # check 9: hard gates leave routers where they are
    assert router and all(torch.equal(weights(out)[name], value) for name, value in router.items())
    convert(out, back, "--back")
    assert isinstance(opened_run(back).model.blocks[0].ffn, DenseFFN)
    mixture, plain = opened_run(out).model, opened_run(back).model
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad(), every_expert(mixture.moe_layers().values()):
        torch.testing.assert_close(mixture(tokens).logits, plain(tokens).logits, rtol=1e-4, atol=1e-4)


def test_routers_alone_can_be_trained(dense, tmp_path):
    """As docs/convert.md says: everything else at a learning rate of 0."""
    out = tmp_path / "moe"
    groups = """run.optim.groups=[{pattern: "router", lr_scale: 1}, {pattern: ".", lr_scale: 0}]"""
    assert groups.partition("=")[2] in (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    method = "method={kind: split, widths: {kind: equal, n_experts: 4}, top_k: 2}"
    convert(dense, out, method, groups, "run.train.budget={steps: 2}", *TOKENS)
    before = weights(out)
    assert main(["train", str(out / "recipe.yaml"), "--out", str(out)]) == 0
    changed = {name for name, value in weights(out).items() if not torch.equal(value, before[name])}
    assert changed and all(".router.score." in name for name in changed)


def test_the_page_s_recipes_exist() -> None:
    page = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+\.yaml)`", page)) == {path.name for path in RECIPES}


def test_only_the_layers_asked_for_are_converted_and_may_see_what_stands_before_them(dense, tmp_path):
    method = "method={kind: split, widths: {kind: arithmetic, n_experts: 4}, top_k: 1, gate: share}"
    one = convert_run(dense, tmp_path / "one", load_conversion(None, [method, "layers=[1]", *TOKENS]))
    model = opened_run(tmp_path / "one").model
    assert isinstance(model.blocks[0].ffn, DenseFFN) and isinstance(model.blocks[1].ffn, MoELayer)
    assert [layer["layer"] for layer in one["layers"]] == [1]
    assert isinstance(model.blocks[1].ffn.bank, FFNBank) and len(set(model.blocks[1].ffn.bank.widths)) > 1
    teacher, student = (
        convert_run(dense, tmp_path / stream, load_conversion(None, [method, f"stream={stream}", *TOKENS]))
        for stream in ("teacher", "student")
    )
    first, second = ([layer["as_routed"] for layer in report["layers"]] for report in (teacher, student))
    assert first[0] == second[0] and first[1] != second[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method={kind: slice}"], r"unknown kind 'slice'; did you mean 'split'\? allowed: split, upcycle"),
        ([], r"missing key 'method'"),
        (["layers=[5]", "method={kind: upcycle, n_experts: 2, top_k: 1}"], r"layers=\[5\], allowed: some of \[0, 1\]"),
        (
            ["method={kind: upcycle, n_experts: 2, top_k: 1}", "router.steps=5"],
            r"copies are all alike, so no label says which to choose; allowed: start: random or zero, steps: 0",
        ),
        (["method={kind: split, widths: {kind: equal, n_experts: 2}, top_k: 3}"], r"top_k=3 > 2 experts"),
        (["method={kind: split, widths: {kind: equal, n_experts: 2, multiple_of: 7}, top_k: 1}"], r"total=48 is not a"),
        (["method={kind: split, widths: {kind: equal, n_experts: 2}, top_k: 1, shared: 48}"], r"shared=48, allowed: f"),
        (
            ["method={kind: split, widths: {kind: equal, n_experts: 90}, top_k: 1}"],
            r"widths: 90 experts for 48 units, allowed: at least one unit for every expert",
        ),
        (["method={kind: split, widths: {kind: equal_importance, n_experts: 0}, top_k: 1}"], r"n_experts=0 widths"),
        (
            ["layers=[1, 1]", "method={kind: upcycle, n_experts: 2, top_k: 1}"],
            r"layers=\[1, 1\], allowed: .* each once",
        ),
        (["run.data.seq_len=16", "method={kind: upcycle, n_experts: 2, top_k: 1}"], r"run.data: a converted run keeps"),
        (["run.objectives=[{kind: router_target}]", "method={kind: upcycle, n_experts: 2, top_k: 1}"], "taught: true"),
        (
            ["method={kind: split, widths: {kind: equal, n_experts: 24}, top_k: 12}", "router.steps=1"],
            r"error: layer 0: labels='subset': 2,704,156 sets of 12 among 24 experts, allowed: 20,000[^(]*$",
        ),
    ],
)
def test_mistakes_are_refused_with_what_is_allowed(words, message, dense, tmp_path, capsys):
    assert convert(dense, tmp_path / "out", *words, *TOKENS) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and re.search(message, error), error
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_folders_that_do_not_fit_are_refused(dense, tmp_path, capsys):
    upcycle = ["--recipe", str(FOLDER / "upcycle.yaml"), *TOKENS]
    assert convert(tmp_path, tmp_path / "out", *upcycle) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert convert(dense, tmp_path / "moe", *upcycle) == 0
    assert convert(dense, tmp_path / "moe", *upcycle) == 1
    assert "is not empty: choose another folder" in capsys.readouterr().err
    assert convert(tmp_path / "moe", tmp_path / "twice", *upcycle) == 1
    assert "no block of the model has a dense feed-forward layer" in capsys.readouterr().err
    assert convert(dense, tmp_path / "back", "--back") == 1
    assert "it was not made by moestro convert" in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_no_folder_that_could_be_trained(dense, tmp_path, monkeypatch):
    """A recipe without its checkpoint would be trained from random weights without a word."""
    words = ("--recipe", str(FOLDER / "upcycle.yaml"), *TOKENS)

    def killed(*_arguments: object, **_named: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moestro.train.state.TrainState.save", killed)
        assert convert(dense, tmp_path / "moe", *words) == 130
    assert not (tmp_path / "moe").exists()
    assert convert(dense, tmp_path / "moe", *words) == 0
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["moe"]
        and evaluate_run(opened_run(tmp_path / "moe"))["step"] == 0
    )


def test_the_inverse_takes_no_recipe_and_says_what_is_damaged(dense, tmp_path, capsys):
    out = tmp_path / "moe"
    convert(dense, out, "--recipe", str(FOLDER / "upcycle.yaml"), *TOKENS)
    assert convert(out, tmp_path / "back", "--back", "tokens=3") == 2
    assert "tokens=3: --back and --drop-teacher take no recipe" in capsys.readouterr().err
    (out / "units.safetensors").write_text("nothing")
    assert convert(out, tmp_path / "back", "--back") == 1
    assert "units.safetensors is damaged" in capsys.readouterr().err


def test_a_layer_that_is_not_the_network_is_found_out(dense):
    """A method that loses a unit does not get past the check."""
    site = dense_sites(opened_run(dense).model, (0,))[0]
    conversion = load_conversion(None, ["method={kind: split, widths: {kind: equal, n_experts: 2}, top_k: 1}"])
    method = conversion.method

    def losing(seen):
        made = method(seen)
        made.layer.bank.w_out.weight.data[3] = 0
        return made

    losing.fits_scale = False
    object.__setattr__(conversion, "method", losing)
    with pytest.raises(ConversionError, match=r"layer 0 is not the network that it was made of: relative difference"):
        convert_layer(site, Seen(site.network, torch.randn(64, 16)), conversion)


def test_recipes_say_what_they_are() -> None:
    assert {path.stem for path in RECIPES} >= {"factorllm", "upcycle", "drop_upcycle", "virtual_groups", "uneven"}
    for path in RECIPES:
        load_conversion(path)
    with pytest.raises(RecipeError, match="unknown key 'metod'; did you mean 'method'"):
        load_conversion(None, ["metod=1"])
    with pytest.raises(RecipeError, match="unknown key 'difers'; did you mean 'differs'"):
        load_conversion(RECIPES[0], ["paper.difers=[tiny]"])
