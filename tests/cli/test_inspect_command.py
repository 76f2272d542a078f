"""`moestro inspect`, and `--set` of `inspect` and `eval`: figures, tables, the page, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from moestro.cli import main
from moestro.compare.inspection import active_share, render_inspection
from moestro.recipe.evaluation import opened_run
from moestro.recipe.inspection import beside_twin, inspect_run
from tests.compare.test_report import EVIL, Page
from tests.conftest import ROOT

RECIPE = str(ROOT / "recipes" / "hmoe.yaml")
TOP_P = "model.ffn.router.select={kind: top_p, threshold: 0.6}"
THRESHOLD = "model.ffn.router.select.threshold"
WIDTHS = list(range(36, 93, 8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> Path:
    """A finished run of two layers with top-p."""
    out = tmp_path_factory.mktemp("inspected") / "run"
    tiny = ["model.n_layers=2", "model.d_model=16", "model.attention.n_heads=2", "data.seq_len=16"]
    steps = ["train.batch_size=4", "train.budget.steps=3", "train.eval_tokens=64"]
    assert main(["train", RECIPE, *small_data, *tiny, *steps, TOP_P, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def found(run: Path) -> dict:
    return inspect_run(opened_run(run), max_tokens=512)


def test_figures_add_up(found: dict) -> None:
    assert list(found["layers"]) == ["blocks.0.ffn", "blocks.1.ffn"]
    for layer in found["layers"].values():
        assert layer["widths"] == WIDTHS
        assert layer["work"] == [w * n for w, n in zip(WIDTHS, layer["load"], strict=True)]
        assert sum(layer["work"]) / layer["tokens"] == pytest.approx(layer["active_width"]["mean"])
        twin = layer["twin"]
        assert twin["width"] == 64 and 8 * twin["load"] == pytest.approx(sum(layer["load"]))
        assert 8 * twin["work"] / layer["tokens"] == pytest.approx(twin["active_width"]["mean"])
        for key in ("mean", "p50", "p99"):
            assert twin["active_width"][key] == pytest.approx(64 * layer["experts_per_token"][key])
    (point,) = [p for p in found["curves"]["threshold"]["points"] if p["value"] == 0.6]
    assert found["curves"]["threshold"]["now"] == 0.6
    assert point == {"value": 0.6, **found["spending"]}
    assert point["bpb"] == pytest.approx(found["bpb"], rel=1e-6)
    both = sum(layer["active_width"]["mean"] for layer in found["layers"].values())
    assert found["spending"]["active_width"] == pytest.approx(both)
    assert active_share(found["layers"]) == pytest.approx(
        both / sum(layer["twin"]["active_width"]["mean"] for layer in found["layers"].values())
    )


def test_the_sample_is_held_out_text_with_width_and_loss(found: dict) -> None:
    for token in found["sample"]:
        assert token["loss"] > 0 and set(token["layers"]) == set(found["layers"])
        assert 36 <= token["layers"]["blocks.0.ffn"]["width"] <= 512
    text = "".join(token["text"] for token in found["sample"])
    assert len(text) > 50 and set(text.split()) <= set(
        "the quick brown fox jumps over lazy dogs while seven wise owls watch from an old oak tree".split()
    )


def test_the_twin_of_countless_experts_is_themselves() -> None:
    spread = {"mean": 8.0, "p50": 8.0, "p99": 8.0}
    figures = {"widths": None, "load": None, "n_experts": 10_000, "tokens": 50}
    found = beside_twin({**figures, "experts_per_token": spread, "active_width": spread})
    assert found["work"] is None and found["twin"] == {"width": 1.0, "load": 0.04, "work": 0.04, "active_width": spread}


def test_inspect_prints_tables_and_writes_the_page(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(run), "--tokens", "512"]) == 0
    out = capsys.readouterr().out
    for text in ("bits per byte", "homogeneous twin (computed, not trained)", "blocks.1.ffn", "*0.6", "active params"):
        assert text in out, text
    assert out.endswith(f"page: {run / 'inspect.html'}\n")
    page = Page((run / "inspect.html").read_text(encoding="utf-8"))
    assert page.open == []
    for identity in ("width", "experts", "knobs", "text", "setup"):
        assert page.all("section", id=identity) and page.all("a", href=f"#{identity}")


def test_inspect_writes_json_and_the_page_where_told(
    run: Path, found: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["inspect", str(run), "--tokens", "512", "--out", str(tmp_path / "page.html"), "--json"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found))
    assert (tmp_path / "page.html").is_file()
    assert main([*words, str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads(json.dumps(found))


def test_the_page_says_what_was_found(found: dict) -> None:
    page = Page(render_inspection(found))
    words = page.words()
    assert f"{found['bpb']:.4f} bits per byte on {found['tokens']:,} tokens" in words
    for layer in found["layers"].values():
        assert f"{layer['work'][3]:,.0f}" in words and f"{layer['twin']['work']:,.0f}" in words
    for point in found["curves"]["threshold"]["points"]:
        assert f"{point['bpb']:.4f}" in words
    tips = [a["title"] for a in page.all("span", **{"class": "token"})]
    assert len(tips) == len(found["sample"])
    for tip, token in zip(tips, found["sample"], strict=True):
        assert f"loss {token['loss']:.2f} nats" in tip and "blocks.1.ffn: active width" in tip
    assert not [a for _, a in page.elements if str(a.get("src", a.get("href", "#")))[0:1] not in ("#", "d")]


def test_the_page_escapes_what_it_shows(found: dict) -> None:
    evil = {**found, "run": f"runs/{EVIL}", "settings": [EVIL], "data": {**found["data"], "name": EVIL}}
    evil["layers"] = {EVIL: found["layers"]["blocks.0.ffn"]}
    evil["sample"] = [{"text": EVIL, "loss": 1.0, "layers": {EVIL: {"width": 40.0, "experts": 1}}}]
    page = Page(render_inspection(evil))
    assert page.open == [] and len(page.all("script")) == 1 and "Turned without training:" in page.words()


def test_headlines_follow_the_figures(found: dict) -> None:
    def titled(factor: float) -> str:
        layers = {
            name: {**layer, "active_width": {key: factor * v for key, v in layer["twin"]["active_width"].items()}}
            for name, layer in found["layers"].items()
        }
        return Page(render_inspection({**found, "layers": layers})).words()

    assert "is served by 13 % less width than equal experts give" in titled(0.87)
    assert "is served by 4 % more width than equal experts give" in titled(1.04)
    assert "is served by as much width as equal experts would give it" in titled(1.0)
    nothing = {
        name: {**layer, "twin": {**layer["twin"], "active_width": dict.fromkeys(("mean", "p50", "p99"), 0.0)}}
        for name, layer in found["layers"].items()
    }
    assert "no expert that was chosen has any width" in Page(render_inspection({**found, "layers": nothing})).words()
    bare = Page(render_inspection({**found, "curves": {}})).words()
    assert "have neither a threshold nor a k that could be turned" in bare


def test_generalization_says_every_term_and_what_is_heuristic(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(run), "--generalization", "--tokens", "512"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in (
        "no choice",
        "tokens",
        "sequences",
        "exact",
        "heuristic",
        "ln N",
        "does not choose a set of best scores",
    ):
        assert word in shown
    assert main(["inspect", str(run), "--generalization", "--tokens", "512", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    read = json.loads((run / "done.json").read_text())["tokens"]
    assert found["units"]["tokens"] <= read and found["bounds"]["tokens"]["exact"]["total"] > 0
    assert found["layers"] and found["heuristic"]


def test_knobs_are_turned_without_training(run: Path, found: dict, capsys: pytest.CaptureFixture) -> None:
    words = ["eval", str(run), "--tokens", "512", "--json", "--set"]
    figures = []
    for value in ("0.3", "0.6"):
        assert main([*words, f"{THRESHOLD}={value}"]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    points = {point["value"]: point for point in found["curves"]["threshold"]["points"]}
    for value, got in zip((0.3, 0.6), figures, strict=True):
        assert got["settings"] == [f"{THRESHOLD}={value}"]
        assert got["bpb"] == pytest.approx(points[value]["bpb"], rel=1e-6)
        experts = np.mean([layer["experts_per_token"]["mean"] for layer in got["layers"].values()])
        assert experts == pytest.approx(points[value]["experts"])
    assert figures[0]["bpb"] != figures[1]["bpb"]
    assert main(["eval", str(run), "--tokens", "64", "--set", f"{THRESHOLD}=0.3"]) == 0
    assert f"{THRESHOLD}=0.3" in capsys.readouterr().out.replace("\n", "")
    turned = inspect_run(opened_run(run, settings=[f"{THRESHOLD}=0.3"]), max_tokens=512)
    assert turned["curves"]["threshold"] == {**found["curves"]["threshold"], "now": 0.3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "optim.lr=1"], "'optim.lr=1' cannot be changed after training; allowed: threshold and top_k of a "),
        (["--set", "model.ffn.branches=3"], "'model.ffn.branches=3' cannot be changed after training; allowed: "),
        (
            ["--set", f"{THRESHOLD}=2"],
            "threshold=2.0, allowed: between 0 and 1 (",
        ),
        (
            ["--set", "model.ffn.router.select.top_k=2"],
            "unknown key 'top_k'; allowed: renormalize, strict, ",
        ),
        (["--set", THRESHOLD], f"override '{THRESHOLD}' is not of the form key.key=value (command line)"),
        (["--tokens", "0"], "argument --tokens: '0' is not a whole number above 0"),
        (
            ["--probe", "--out", "page.html"],
            "--out=page.html is where the page goes; --generalization and --probe write",
        ),
        ([f"{THRESHOLD}=0.4"], f"unexpected '{THRESHOLD}=0.4'; did you mean --set {THRESHOLD}=0.4?"),
        (["--sett", "x"], "unknown option '--sett'; did you mean '--set'? allowed: "),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", str(run), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.removeprefix("moestro: error: ")[: len(message)] == message


def test_a_dense_run_has_nothing_to_inspect(
    tmp_path: Path, small_data: list[str], capsys: pytest.CaptureFixture
) -> None:
    tiny = ["model.n_layers=1", "model.d_model=16", "model.attention.n_heads=2", "data.seq_len=16"]
    steps = ["train.batch_size=4", "train.budget.steps=1", "train.eval_tokens=64"]
    dense = str(ROOT / "recipes" / "dense.yaml")
    assert main(["train", dense, *small_data, *tiny, *steps, "--out", str(tmp_path / "dense")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "dense")]) == 2
    assert "its model has no mixture layers to look into; moestro eval gives its figures" in capsys.readouterr().err


def test_help_names_the_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    out = capsys.readouterr().out
    for option in ("--data", "--tokens", "--set key=value", "--out PAGE", "--json"):
        assert option in out, option


def test_probe_prints_every_expert_on_every_experts_tokens(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--probe", "--tokens", "128", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["layers"]) == ["blocks.0.ffn", "blocks.1.ffn"]
    for layer in found["layers"].values():
        assert sum(layer["tokens"]) == found["tokens"] > 100 and len(layer["loss"]) == 8
        assert all((row is None) == (count == 0) for row, count in zip(layer["loss"], layer["tokens"], strict=True))
    assert main(["inspect", str(run), "--probe", "--tokens", "64"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for layer in json.loads(probed_64(run, capsys))["layers"].values():
        for loss in (value for row in layer["loss"] if row for value in row):
            assert f"{loss:.3f}" in printed


def probed_64(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    main(["inspect", str(run), "--probe", "--tokens", "64", "--json"])
    return capsys.readouterr().out
