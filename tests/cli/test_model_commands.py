"""Verbs that use a model: `generate`, `serve` and `eval --tasks` on a run, as they are called on a terminal."""

import io
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moestro.cli import main
from moestro.data import Batch, ByteTokenizer
from moestro.evaluate import evaluate
from moestro.export import open_model
from moestro.generation import Continuation, Piece
from moestro.recipe.evaluation import opened_run
from moestro.recipe.syntax import RecipeError
from tests.conftest import ROOT

TINY = ["model.n_layers=1", "model.d_model=16", "model.attention.n_heads=2", "data.seq_len=64"]
K = "model.ffn.router.select.top_k"
TRAINED = ["train.batch_size=4", "train.budget.steps=3", "train.eval_tokens=64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_data: list[str]) -> str:
    """A finished run over bytes."""
    folder = str(tmp_path_factory.mktemp("runs") / "tiny")
    assert main(["train", str(ROOT / "recipes" / "hmoe.yaml"), *small_data, *TINY, *TRAINED, "--out", folder]) == 0
    return folder


def answered(capsys: pytest.CaptureFixture, *words: str) -> str:
    """What a command prints that succeeds."""
    capsys.readouterr()
    code = main(list(words))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_generate_prints_the_text(run: str, capsys: pytest.CaptureFixture) -> None:
    words = ["generate", run, "--prompt", "the quick", "--max-new-tokens", "12"]
    text = answered(capsys, *words)
    assert text.endswith("\n") and text == answered(capsys, *words)
    sampled = [answered(capsys, *words, "--temperature", "1", "--seed", seed) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    likeliest = answered(capsys, *words, "--temperature", "1", "--top-k", "1")
    assert likeliest == text


def test_a_model_to_use_takes_another_number_of_experts(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tokens = torch.arange(24)[None]
    plain, turned = (open_model(run, settings=settings).model for settings in ([], [f"{K}=1"]))
    measured = opened_run(run, settings=[f"{K}=1"]).model.eval()
    with torch.no_grad():
        logits = turned(tokens).logits
        assert torch.equal(logits, measured(tokens).logits) and not torch.equal(logits, plain(tokens).logits)
    words = ["generate", run, "--prompt", "the quick", "--max-new-tokens", "12"]
    assert answered(capsys, *words, "--set", f"{K}=2") == answered(capsys, *words)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"top_k=1' cannot be set: .* is no run of moestro \(--set\)"):
        open_model(tmp_path, settings=[f"{K}=1"])


def test_generate_takes_prompts_from_everywhere(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--max-new-tokens", "4"]
    single = {prompt: answered(capsys, "generate", run, "--prompt", prompt, *few) for prompt in ("fox", "dog")}
    both = answered(capsys, "generate", run, "--prompt", "fox", "--prompt", "dog", *few)
    assert both == f"=== 1 of 2: fox\n{single['fox']}=== 2 of 2: dog\n{single['dog']}"
    (tmp_path / "prompt.txt").write_text("dog\n")
    assert answered(capsys, "generate", run, "--prompt-file", str(tmp_path / "prompt.txt"), *few) == single["dog"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("fox\n"))
    assert answered(capsys, "generate", run, *few) == single["fox"]
    lines = answered(capsys, "generate", run, "--prompt", "fox", "--prompt", "dog", *few, "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [each["text"] for each in found] == [single["fox"][:-1], single["dog"][:-1]]
    assert found[0] | {"text": ""} == {
        "prompt": "fox",
        "text": "",
        "reason": "length",
        "prompt_tokens": 3,
        "new_tokens": 4,
    }


def test_generate_ends_at_a_stop(run: str, capsys: pytest.CaptureFixture) -> None:
    words = [
        "generate",
        run,
        "--prompt",
        "fox",
        "--max-new-tokens",
        "20",
        "--temperature",
        "1",
        "--seed",
        "1",
        "--json",
    ]
    whole = json.loads(answered(capsys, *words))["text"]
    found = json.loads(answered(capsys, *words, "--stop", "never", "--stop", whole[5:7]))
    assert (found["text"], found["reason"]) == (whole[: whole.index(whole[5:7])], "stop")


def test_a_terminal_is_not_given_orders(
    run: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [Piece("a\x1b[2J\tb\n\x07"), Piece("c\x9bd", "length")]
    monkeypatch.setattr(Continuation, "pieces", lambda self: iter(pieces))
    assert answered(capsys, "generate", run, "--prompt", "x") == "a\x1b[2J\tb\n\x07c\x9bd\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert answered(capsys, "generate", run, "--prompt", "x") == "a␛[2J\tb\n␇c\ufffdd\n"


def test_ctrl_c_ends_the_line(run: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Continuation.step

    def interrupted(self: Continuation) -> Any:
        if len(self.new_tokens) == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Continuation, "step", interrupted)
    assert main(["generate", run, "--prompt", "fox"]) == 130
    out, err = capsys.readouterr()
    assert out.endswith("\n") and err.endswith("moestro: error: interrupted\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "RUN", "--prompt", ""], "the prompt is empty; allowed: at least one token"),
        (
            ["generate", "RUN", "--prompt", "a\udcff"],
            "'a\\udcff' is not valid UTF-8: give words, ",
        ),
        (
            ["generate", "RUN", "--prompt", "x" * 65],
            "the prompt has 65 tokens and 1 new ones are asked for, more than the",
        ),
        (["generate", "RUN", "--prompt", "x", "--max-new-tokens", "64"], "the prompt has 1 tokens and 64 new ones are"),
        (["generate", "RUN", "--prompt", "x", "--stop", ""], "a stop sequence is empty; allowed: text of at least one"),
        (["generate", "RUN", "--prompt", "x", "--seed", "1"], "--seed needs --temperature above 0: at 0 the likeliest"),
        (["generate", "RUN", "--prompt", "x", "--top-p", "0.5"], "--top-p needs --temperature above 0"),
        (["generate", "RUN", "--prompt", "x", "--temperature", "-1"], "temperature=-1.0; allowed: 0 (the likeliest"),
        (
            ["generate", "RUN", "--prompt", "x", "--dtype", "int8"],
            "argument --dtype: invalid choice: 'int8' (choose from",
        ),
        (
            ["generate", "recipes", "--prompt", "x"],
            "recipes holds no model: neither recipe.yaml (a run) nor config.json",
        ),
        (["serve", "RUN", "--port", "70000"], "port=70000; allowed: 0 to 65535"),
        (["serve", "RUN", "--waiting", "-1"], "waiting=-1; allowed: 0 to "),
        (["eval", "RUN", "--tasks", "piqa"], "--tasks needs --data FOLDER, the folder that the tasks' files lie in"),
        (
            ["eval", "RUN", "--tasks", "piqua", "--data", "x"],
            "unknown task 'piqua'; did you mean 'piqa'? allowed: arc_",
        ),
        (["eval", "RUN", "--tasks", "piqa", "--tokens", "5"], "--tokens=5 does not go with --tasks"),
        (["eval", "RUN", "--tasks", "piqa", "--set", "a=b"], "--set=a=b does not go with --tasks"),
        (
            ["generate", "RUN", "--prompt", "x", "--set", f"{K}=9"],
            "top_k=9 > 8 experts (command line: model.ffn.router",
        ),
        (["serve", "RUN", "--set", "optim.lr=1"], "'optim.lr=1' cannot be changed after training; allowed: threshold"),
        (["eval", "RUN", "--batch-size", "5"], "--batch-size=5 needs --tasks"),
        (["eval", "RUN", "--seed", "0"], "--seed=0 needs --tasks"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    run: str, words: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    code = main([run if word == "RUN" else word for word in words])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"moestro: error: {message}"), err


def test_a_port_that_is_taken_is_named(run: str, capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", run, "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}: " in capsys.readouterr().err


def own_figures(run: str, ids: list[int], seq_len: int) -> dict[str, float]:
    """What `moestro.evaluate` says of bytes in windows of `seq_len`, the first id being read only."""
    tokens, targets = (torch.tensor(part).view(-1, seq_len) for part in (ids[:-1], ids[1:]))
    batch = Batch(tokens, targets, torch.zeros_like(tokens), (targets < 256).long())
    return evaluate(opened_run(run).model, [batch])


def test_tasks_agree_with_the_evaluation_of_our_own(run: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # a text of whole windows: where one is left unfilled, ours begins anew and that of lm-eval reaches back
    text = ("the quick brown fox jumps over lazy dogs, naïve ones too; " * 40).encode()[: 64 * 30].decode()
    file = tmp_path / "lm" / "wikitext-2" / "valid.txt"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    words = ["eval", run, "--tasks", "wikitext", "--data", str(tmp_path)]
    found = json.loads(answered(capsys, *words, "--json", "--batch-size", "7"))
    ids = [ByteTokenizer.eos_id, *text.encode()]
    own = own_figures(run, ids, 64)
    metrics = found["tasks"]["wikitext"]["metrics"]
    assert metrics["bits_per_byte"]["value"] == pytest.approx(own["bpb"], rel=1e-6)
    assert metrics["byte_perplexity"]["value"] == pytest.approx(own["perplexity"], rel=1e-6)
    assert (found["model"], found["max_length"], found["seed"], found["limit"]) == (run, 64, 0, None)
    assert "bits_per_byte" in answered(capsys, *words, "--limit", "1")
    # the verb without tasks also counts the token that ends the document
    verb = json.loads(answered(capsys, "eval", run, "--data", str(file), "--json"))
    assert (verb["tokens"], verb["bytes"]) == (own["tokens"] + 1, own["bytes"])
    ending = verb["loss"] * verb["tokens"] - own["loss"] * own["tokens"]
    with torch.no_grad():
        logits = opened_run(run).model(torch.tensor([[ids[-1]]])).logits[0, 0]
    assert ending == pytest.approx(-float(logits.log_softmax(0)[ByteTokenizer.eos_id]), rel=1e-3)


def test_names_of_tasks_are_listed(run: str, capsys: pytest.CaptureFixture) -> None:
    assert {"papers", "piqa", "mmlu"} <= set(answered(capsys, "eval", run, "--tasks", "help").split())


@pytest.mark.slow
def test_a_server_ends_on_sigterm_and_loses_nothing(run: str) -> None:
    import openai

    command = [sys.executable, "-m", "moestro", "serve", run, "--port", "0", "--name", "tiny", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving tiny on http://127.0.0.1:") and line.endswith("/v1 (Ctrl-C stops)\n")
            client = openai.OpenAI(base_url=line.split()[3], api_key="none", max_retries=0)
            asked = {"model": "tiny", "prompt": "the quick", "max_tokens": 50, "seed": 1}
            whole = client.completions.create(**asked).choices[0].text
            with client.completions.create(**asked, stream=True) as stream:
                text = next(iter(stream)).choices[0].text
                process.send_signal(signal.SIGTERM)
                text += "".join(chunk.choices[0].text for chunk in stream)
            assert text == whole
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "stopped\n", "")


@pytest.mark.slow
def test_ctrl_c_stops_generation_on_a_terminal(run: str) -> None:
    command = [
        sys.executable,
        "-m",
        "moestro",
        "generate",
        run,
        "--prompt",
        "fox",
        "--temperature",
        "1",
        "--max-new",
        "9",
    ]
    assert subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120).returncode == 2
    begun = time.monotonic()
    with subprocess.Popen(
        [*command[:-2], *["--prompt", "dog"] * 2000],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        # a job in the background of a script is told to ignore it, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline() + process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        rest, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130 and err == b"moestro: error: interrupted\n" and time.monotonic() - begun < 60
    (first + rest).decode()
    assert rest.endswith(b"\n")
