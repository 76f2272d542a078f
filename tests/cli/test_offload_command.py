"""moestro offload: generating with a model larger than its memory, replaying and profiling its trace."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.cli.arguments import size
from moestro.offload.trace import read_trace
from tests.conftest import ROOT
from tests.offload.models import memory_for, tiny_folder
from tests.stock_models import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "mixtral"
    tiny_folder(path, vocab_size=257, num_local_experts=6)
    byte_tokenizer(path).save_pretrained(path)
    return path


def offload(*words: object) -> int:
    return main(["offload", *map(str, words)])


def test_texts_are_continued_by_a_model_larger_than_its_memory(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["generate", str(folder), "--prompt", "the quick", "--max-new-tokens", "6", "--json"]
    assert main(words) == 0
    whole = capsys.readouterr().out
    memory = ["--memory", str(memory_for(folder, 2))]
    for more in (["--exact"], ["--exact", "--hold", "host", "--prefetch", "1"], ["--t1", "1"]):
        assert main([*words, *memory, *more]) == 0
        assert capsys.readouterr().out == whole
    assert main([*words, *memory, "--store", str(tmp_path / "low"), "--t1", "0", "--low", "int8"]) == 0
    assert "int8 copies of layer" in capsys.readouterr().err
    for refused, said in (
        ([*words, "--exact"], "--exact is for models larger than memory"),
        ([*words, *memory, "--dtype", "bf16"], "does not go with --memory"),
        ([*words, *memory, "--set", "model.ffn.router.select.top_k=1"], "does not go with --memory"),
        ([*words, *memory, "--calibrate", "t.txt"], "builds the copies once"),
        ([*words, *memory, "--t1", "2"], "allowed: 0 <= T1 <= T2 <= 1"),
        (["serve", str(folder), "--memory", "1k", "--low-share", "2"], "share of memory for LOW copies"),
    ):
        assert main(refused) == 2
        assert said in capsys.readouterr().err


def test_generation_a_report_and_its_trace(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    words = ["--memory", memory_for(folder, 5), "--trace", tmp_path / "t.jsonl", "--store", tmp_path / "low"]
    words += ["--calibrate", text, "--eval", text, "--eval-tokens", 40, "--policy", "mix", "--prefetch", 1]
    words += ["--prompt", "the quick", "--tokens", 8, "--bench", "--json", tmp_path / "r.json"]
    assert offload(folder, *words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("the quick") and "perplexity" in said.out and "exactly on demand: 16 tokens" in said.out
    assert "calibrating on" in said.err and "tokens/s, hits high" in said.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["plan"]["low"] == "int4" and report["plan"]["policy"] == "mix" and not report["plan"]["exact"]
    assert len(report["generated"]) == 2 and report["counts"]["misses_low"] > 0
    assert report["quality"]["tokens"] == 40 and abs(report["quality"]["perplexity_change"]) < 0.05
    assert report["memory"]["slots_peak_bytes"] < report["memory"]["experts_bytes"]["high"]
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.complete and trace.header.n_layers == 2

    assert offload("replay", tmp_path / "t.jsonl", "--tune") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("lru", "lfu", "lhu", "fld", "lcu", "tuned mix"))
    assert offload("replay", tmp_path / "t.jsonl", "--policy", "lfu", "--exact", "--json") == 0
    replayed = json.loads(capsys.readouterr().out)["policies"]
    assert set(replayed) == {"lfu"} and replayed["lfu"]["misses_low"] == 0 < replayed["lfu"]["misses_high"]
    assert offload("profile", tmp_path / "t.jsonl") == 0
    assert "--t1" in (profiled := capsys.readouterr().out) and "1 layers ahead" in profiled
    assert offload("profile", tmp_path / "t.jsonl", "--memory", "64k", "--json") == 0
    profiled = json.loads(capsys.readouterr().out)
    assert 0 <= profiled["low_share"] < 1 and profiled["bytes_per_pass"]["mixed"] < profiled["bytes_per_pass"]["exact"]
    assert offload("profile", tmp_path / "t.jsonl", "--memory", "64k") == 0
    assert re.search(r"--low-share [0-9.]+: [0-9.]+ MiB moved a pass under lru", capsys.readouterr().out)
    assert offload("profile", tmp_path / "t.jsonl", "--memory", "1") == 2
    assert "do not hold one expert" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["offload", "--prompt", "a"],
        pytest.param(["generate", "--prompt", "a"], marks=pytest.mark.slow),
        pytest.param(["serve", "--port", "0"], marks=pytest.mark.slow),
    ],
    ids=lambda w: w[0],
)
def test_threads_that_wait_leave_the_cores_to_those_that_read(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moestro", words[0], str(tmp_path / "no"), "--memory", "1GiB", *words[1:]]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("torch's OpenMP is not GNU's: it does not say how its threads wait")
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", said)) == {"0"}


def test_exact_says_so(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert offload(folder, "--memory", memory_for(folder, 3), "--exact", "--prompt", "a", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["plan"]["exact"] and report["plan"]["low"] is None and report["quality"] is None
    assert report["counts"]["skips"] == report["counts"]["asked_low"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SRC", "--prompt", "a"], "--memory 8GiB"),
        (["SRC", "--memory", "8 apples", "--prompt", "a"], "'8 apples' is no size"),
        (["SRC", "--memory", "8GiB"], "nothing to do"),
        (["SRC", "more", "--memory", "8GiB", "--prompt", "a"], "unexpected 'more'"),
        (["SRC", "--memory", "1k", "--prompt", "a"], "1,000 bytes do not do: .* the least"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--policy", "best"], "policy 'best', allowed"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--low", "int3"], "precision 'int3', allowed"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--t1", "0.9", "--t2", "0.5"], "T1=0.9, T2=0.5"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--exact", "--cooperative"], "needs them in host memory"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--t1", "2"], "T1=2.0"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--low-share", "1"], "LOW copies 1.0, allowed"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--policy", "mix:nan,0,0,1"], "of sum 1"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--exact", "--calibrate", "SRC/config.json"], "have none"),
        (["SRC", "--memory", "8GiB", "--eval", "nowhere"], "no file nowhere"),
        (["SRC", "--memory", "8GiB", "--prompt", "a", "--prefetch", "-1"], "prefetch depth -1"),
        (["replay"], "takes one trace"),
        (["replay", "SRC/config.json"], "line 1: not JSON"),
        (["profile", "nowhere"], "nowhere"),
        (["nowhere", "--memory", "8GiB", "--prompt", "a"], "nowhere is not a folder"),
    ],
)
def test_mistakes_are_said(words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert offload(*(word.replace("SRC", str(folder)) for word in words)) in (1, 2)
    assert re.search(message, capsys.readouterr().err)


def test_sizes() -> None:
    read = [size(text) for text in ("8GiB", "500MB", "4096", "1.5k", "2 gib", "1TiB")]
    assert read == [8 << 30, 500_000_000, 4096, 1500, 2 << 30, 1 << 40]
    for text in ("", "0", "GiB", "-1", "1TB5"):
        with pytest.raises(ArgumentTypeError, match="no size"):
            size(text)


def test_a_disk_that_fills_up_ends_the_trace_and_nothing_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [folder, "--memory", memory_for(folder, 3), "--exact", "--prompt", "the quick", "--tokens", 8]
    assert offload(*words) == 0
    text = capsys.readouterr().out.splitlines()[0]
    trace, before = tmp_path / "t.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    # what a file may have stands for what is left of a disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert offload(*words, "--trace", trace) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == text and "tokens read in" in said.out
    assert f"the trace is incomplete: {trace}: [Errno 27] File too large" in said.err
    found = read_trace(trace)
    assert 0 < len(found.steps) < 2 * 8 and not found.complete and trace.stat().st_size <= 1000
    assert offload("replay", trace, "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete"] is False


@pytest.mark.slow
def test_being_told_to_end_leaves_a_trace_that_reads(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    words = [folder, "--memory", memory_for(folder, 3), "--exact", "--prompt", "a", "--tokens", 90, "--trace", trace]
    command = [sys.executable, "-m", "moestro", "offload", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (trace.exists() and trace.stat().st_size > 2000):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in said, said
    assert len(read_trace(trace).steps) > 4
