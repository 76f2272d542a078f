"""The command line from end to end: what it prints, what it exits with, and that no mistake ends in a traceback."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moestro.cli import VERBS, main
from moestro.cli.terminal import as_json
from moestro.ops import native
from tests.conftest import ROOT

RECIPE = str(ROOT / "recipes" / "hmoe.yaml")
COMPARISON = "recipes/compare/first_look.yaml"


@pytest.fixture
def quick(small_data: list[str]) -> list[str]:
    tiny = ["model.n_layers=1", "model.d_model=16", "model.attention.n_heads=2", "data.seq_len=16"]
    return [*small_data, *tiny, "train.batch_size=4", "train.budget.steps=3", "train.eval_tokens=64"]


@pytest.fixture
def run(tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture) -> Path:
    """A finished run."""
    assert main(["train", RECIPE, *quick, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def refusal(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str]:
    """(exit code, the one line on standard error) of a command that must fail."""
    code = main(words)
    out, err = capsys.readouterr()
    assert code != 0 and out == "" and err.count("\n") == 1 and err.startswith("moestro: error: ")
    return code, err.removeprefix("moestro: error: ").rstrip("\n")


def last_line(capsys: pytest.CaptureFixture) -> str:
    """The error with which a command ended that has shown its progress before."""
    return capsys.readouterr().err.splitlines()[-1].removeprefix("moestro: error: ")


def moestro(*words: str, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "moestro", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, **options)  # type: ignore[call-overload]


def children_seconds() -> float:
    """Time of the processor that ended processes of this one took: a busy machine changes little in it."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_is_quick_and_waits_for_no_torch() -> None:
    begun = children_seconds()
    done = moestro("--help")
    assert children_seconds() - begun < 1.0
    assert done.returncode == 0 and "train" in done.stdout and "compare" in done.stdout
    check = (
        "import sys; from moestro.cli import main; code = main(['train', '--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and "--out DIR" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: moestro {verb}")


def test_without_a_verb_the_verbs_are_listed(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: moestro VERB ...")


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert main(["version"]) == 0 and main(["--version"]) == 0
    assert capsys.readouterr().out == f"moestro 0.1.0\nnative kernels: {native.status()}\n" * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian", "x"],
            "unknown verb 'trian'; did you mean 'train'? allowed: --help, --version, compare, ",
        ),
        (["--hepl"], "unknown option '--hepl'; did you mean '--help'? allowed: --help, --version, compare, "),
        (["train"], "the following arguments are required: RECIPE"),
        (["eval"], "the following arguments are required: RUN"),
        (
            ["train", RECIPE, "--ot", "x"],
            "unknown option '--ot'; did you mean '--out'? allowed: --device, --help, --max-restarts, --nproc, --out, ",
        ),
        (["train", RECIPE, "--outt=x"], "unknown option '--outt'; did you mean '--out'? allowed: "),
        (["eval", "x", "--dta", "y"], "unknown option '--dta'; did you mean '--data'? allowed: "),
        (["eval", "x", "y"], "unexpected 'y' (moestro eval)"),
        (["version", "x"], "unexpected 'x' (moestro version)"),
        (["eval", "x", "--tokens", "0"], "argument --tokens: '0' is not a whole number above 0"),
        (["eval", "x", "--checkpoint", "last"], "argument --checkpoint: invalid choice: 'last' (choose from"),
        (["train", RECIPE, "--out"], "argument --out: expected one argument"),
        (["train", RECIPE, "--nproc", "0"], "argument --nproc: '0' is not a whole number above 0"),
        (["train", RECIPE, "--nproc", "2", "--max-restarts", "-1"], "--max-restarts -1, allowed: at least 0"),
        (["train", RECIPE, "--max-restarts", "3"], "--max-restarts=3 needs --nproc"),
        (["train", RECIPE, "--device", "gpu"], "device 'gpu'; did you mean 'cpu'? allowed: cpu, cuda, cuda:N, mps"),
        (
            ["train", RECIPE, "--device", "cuda:x"],
            "device 'cuda:x'; did you mean 'cuda'? allowed: cpu, cuda, cuda:N, mps",
        ),
        (["train", RECIPE, "--device", "cuda:99"], "device 'cuda:99': this machine has "),
        (["train", RECIPE, "optim.lr"], "override 'optim.lr' is not of the form key.key=value (command line)"),
        (["train", RECIPE, "optim.lrr=1"], "unknown key 'lrr'; did you mean 'lr'? allowed: betas, clip, "),
        (
            ["train", RECIPE, "--out", "d", "optim.lrr=1"],
            "unknown key 'lrr'; did you mean 'lr'? allowed: betas, clip, ",
        ),
        (["train", "recipes/hmo.yaml"], "no such recipe: recipes/hmo.yaml"),
        (["compare", "recipes/compare/nowhere.yaml"], "no such recipe: recipes/compare/nowhere.yaml"),
        (["prepare", RECIPE, "data.seq_len=0"], "seq_len=0; allowed: at least 1 ("),
        (["eval", "nowhere"], "no such run folder: nowhere"),
        (
            ["train", COMPARISON],
            f"a comparison, not a recipe: moestro compare {COMPARISON} runs it (",
        ),
        (["compare", RECIPE], f"a recipe, not a comparison: moestro train {RECIPE} trains it ("),
    ],
)
def test_mistakes_are_one_line_and_exit_2(words: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    code, error = refusal(capsys, *words)
    assert (code, error[: len(message)]) == (2, message)


def test_bad_yaml_is_one_line_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("model:\n  d_model: [1\n")
    code, error = refusal(capsys, "train", str(file))
    assert (code, error) == (2, f"YAML: expected ',' or ']', but got '<stream end>' ({file}: line 3, column 1)")


def test_what_fails_while_running_exits_1(tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture) -> None:
    words = ["train", RECIPE, *quick, "--out", str(tmp_path / "run"), "optim.lr=1e30", "train.budget.steps=50"]
    code = main(words)
    *_, last = capsys.readouterr().err.splitlines()
    assert code == 1 and last.startswith("moestro: error: step ") and "a lower optim.lr" in last


def test_a_run_folder_that_cannot_be_made_exits_1(
    tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    code, error = refusal(capsys, "train", RECIPE, *quick, "--out", str(tmp_path / "file" / "run"))
    assert code == 1 and "Not a directory" in error


def test_an_unexpected_failure_says_how_to_see_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from moestro.cli import version

    def broken(arguments: object) -> int:
        raise RuntimeError("mat1 and mat2\n shapes")

    monkeypatch.setattr(version, "run", broken)
    code, error = refusal(capsys, "version")
    assert (code, error) == (1, "mat1 and mat2 shapes (RuntimeError; add --traceback to see where)")


def test_traceback_on_demand(quick: list[str]) -> None:
    with pytest.raises(ValueError, match="unknown key 'lrr'"):
        main(["train", RECIPE, "optim.lrr=1", "--traceback"])


def test_a_mistake_in_the_package_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro.cli import version

    def broken(arguments: object) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr(version, "run", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["version"])


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from moestro.cli import version

    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(version, "run", interrupted)
    assert main(["version"]) == 130
    assert capsys.readouterr().err == "moestro: error: interrupted\n"


def test_a_signal_saves_and_exits_0_and_the_same_command_continues(tmp_path: Path, quick: list[str]) -> None:
    out = tmp_path / "run"
    words = ["train", RECIPE, *quick, "train.budget.steps=300", "train.eval_every=0", "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-m", "moestro", *words], stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as run:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size < 1000:
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 0 and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith("moestro: stopped by SIGTERM, saved ") and last.endswith(
        "; the same command continues from there"
    )
    assert main(words) == 0 and json.loads((out / "done.json").read_text())["step"] == 300


def test_train_writes_a_run_and_says_so(tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "run"
    assert main(["train", RECIPE, "--out", str(out), *quick]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{out}: step 3, 192 tokens, ") and "bits per byte, perplexity" in printed.out
    assert "hmoe  step 1" in printed.err
    for name in ("recipe.yaml", "environment.json", "metrics.jsonl", "done.json", "tokenizer/tokenizer.json"):
        assert (out / name).is_file(), name


def test_the_default_folder_has_the_recipe_and_the_seed(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", RECIPE, *quick, "train.seed=3"]) == 0
    assert (tmp_path / "runs" / "hmoe-3" / "done.json").is_file()


def test_another_recipe_in_the_same_folder_is_refused(
    run: Path, quick: list[str], capsys: pytest.CaptureFixture
) -> None:
    code, error = refusal(capsys, "train", RECIPE, *quick, "optim.lr=1e-4", "--out", str(run))
    assert code == 2 and "holds a run of another recipe: optim.lr was 0.002, now 0.0001" in error
    command = error.split("continue that run: moestro ")[1]
    assert main(command.split()) == 0 and capsys.readouterr().out.startswith(f"{run}: step 3, ")


def test_a_run_is_continued_from_its_own_recipe(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", str(run / "recipe.yaml"), "--out", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run}: step 3, ")


def test_eval_prints_a_table_and_the_training_s_last_figures(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", str(run), "--tokens", "64"]) == 0
    table = capsys.readouterr().out
    final = json.loads((run / "done.json").read_text())["eval"]
    for text in (
        "bits per byte",
        "zlib -9",
        "perplexity",
        f"{final['bpb']:.4f}",
        "blocks.0.ffn",
        "uneven",
        "dead",
        "load",
    ):
        assert text in table, text


def test_eval_writes_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(["eval", str(run), "--checkpoint", "best", "--json", str(tmp_path / "figures.json")]) == 0
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written == printed and written["step"] == 3
    assert written["layers"]["blocks.0.ffn"]["experts_per_token"]["mean"] == 2.0
    assert sum(written["layers"]["blocks.0.ffn"]["load"]) == 2 * written["layers"]["blocks.0.ffn"]["tokens"]


def test_eval_reads_other_text_whole(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "other.txt").write_text("An owl sat in an oak.\n" * 40)
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "An owl sat in an oak.\n" * 40}) + "\n")
    as_source = f"{{kind: jsonl, paths: {tmp_path}/other.jsonl, text_field: body}}"
    bpb = []
    for data in (str(tmp_path / "other.txt"), as_source):
        assert main(["eval", str(run), "--data", data, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["bytes"] == 22 * 40
        bpb.append(figures["bpb"])
    assert bpb[0] == bpb[1] > 1


def test_eval_shows_how_to_name_the_field_of_the_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text(json.dumps({"body": "An owl sat in an oak.\n" * 40}) + "\n")
    assert main(["eval", str(run), "--data", str(file)]) == 2
    error = last_line(capsys)
    message, example = error.split(", for example --data ")
    assert message == f"{file}:1: no field 'text'; there are: body. Set text_field"
    assert example == f"'{{kind: jsonl, paths: {file}, text_field: body}}'"
    assert main(["eval", str(run), "--data", example.strip("'"), "--json"]) == 0


def test_a_typo_in_the_data_can_be_corrected(tmp_path: Path, quick: list[str], capsys: pytest.CaptureFixture) -> None:
    words = ["train", RECIPE, *quick, "--out", str(tmp_path / "run")]
    assert main([*words, "data.source.paths=wrods.txt"]) == 2
    error = last_line(capsys)
    assert error.startswith("wrods.txt: no such file") and error.endswith("data.source.paths)")
    assert main(words) == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere.txt", "nowhere.txt: no such file or folder (looked from "),
        ("stdlip", "stdlip: no such file or folder (looked from "),
        (
            "{kind: jsnl, paths: x}",
            "unknown kind 'jsnl'; did you mean 'jsonl'? allowed: grouped, hub, jsonl, parquet, stdli",
        ),
        (
            "{kind: jsonl, pths: x}",
            "unknown key 'pths'; did you mean 'paths'? allowed: ",
        ),
        ("{kind: jsonl", "YAML: expected ',' or '}', but got '<stream end>' (--data: line 1, column 13)"),
        ("jsonl", "missing key 'paths' (--data: top level)"),
    ],
)
def test_eval_refuses_data_that_is_not_there(run: Path, data: str, message: str, capsys: pytest.CaptureFixture) -> None:
    code, error = refusal(capsys, "eval", str(run), "--data", data)
    assert (code, error[: len(message)]) == (2, message)


def test_eval_of_a_run_without_a_checkpoint(run: Path, capsys: pytest.CaptureFixture) -> None:
    for folder in (run / "checkpoints").iterdir():
        folder.rename(run / folder.name)
    code, error = refusal(capsys, "eval", str(run))
    assert (code, error) == (1, f"run folder {run} has no checkpoint: train it first")


def test_prepare_says_what_it_made(quick: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["prepare", RECIPE, *quick]) == 0
    out = capsys.readouterr().out
    assert out.startswith("words.txt: ") and "training tokens" in out and "257 different ones" in out


def test_the_module_and_the_script_are_the_same_command() -> None:
    done = moestro("train", "recipes/hmoe.yaml", "model.ffn.router.select.topk=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "moestro: error: unknown key 'topk'; did you mean 'top_k'? allowed: gate, limit, renormalize, scale, top_k "
        "(command line: model.ffn.router.select.topk)\n"
    )


def test_figures_that_json_does_not_know_are_null(capsys):
    assert as_json(Path("-"), {"loss": float("nan"), "layers": [{"share": (1.5, float("inf"))}], "name": "a"})
    assert (
        capsys.readouterr().out.split()
        == '{ "loss": null, "layers": [ { "share": [ 1.5, null ] } ], "name": "a" }'.split()
    )
