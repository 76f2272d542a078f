"""What is stated of the memory of verbs, and that peaks are beneath it."""

import json
from pathlib import Path

import pytest

from bench.reliability import memory
from bench.reliability.memory import DOING, IMPORTING, Case, long_text, measured, peak
from bench.reliability.memory_model import EXACT, MIB, STATED, WORKING, Sizes, stated
from moestro.cli import VERBS
from moestro.train.estimate import FRAGMENTS, MemoryEstimate
from tests.conftest import ROOT

TRAINING = MemoryEstimate(1e8, 2e8, 0, 1e8, 3e7, 1e7)


def test_something_is_stated_of_every_verb_that_holds_anything() -> None:
    assert set(STATED) == set(VERBS) - {"completion", "version"}


@pytest.mark.parametrize(
    ("verb", "parts"),
    [
        ("plan", 0),
        ("train", EXACT * (1 + FRAGMENTS) * TRAINING.tensors),
        ("compare", EXACT * (1 + FRAGMENTS) * TRAINING.tensors + 2e8),
        ("eval", 2e8 + 4e7),
        ("generate", 2e8 + 1e6),
        ("serve", 2e8 + 8e6),
        ("import", 1e8),
        ("offload", 2e7),
    ],
)
def test_stated_is_the_sum_of_its_parts(verb: str, parts: float) -> None:
    sizes = Sizes(weights=100_000_000, cache=1_000_000, memory=10_000_000, training=TRAINING)
    total, said = stated(verb, 300 * MIB, sizes)
    assert total == pytest.approx(300 * MIB + parts + WORKING)
    assert said.startswith(f"at most {total / MIB:,.0f}: imports 300") and said.endswith(f"working {WORKING / MIB:.0f}")


@pytest.mark.slow
def test_the_peak_of_a_verb_is_beneath_what_is_stated_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "DOCUMENT", 100_000)
    words = [f"data.source={{kind: text, paths: {long_text(tmp_path)}, split: blank-line}}", "data.seq_len=16"]
    words += ["data.tokenizer={kind: bytes}", f"data.cache_dir={tmp_path / 'cache'}"]
    case = Case("prepare", [str(ROOT / "recipes" / "dense.yaml"), *words], Sizes(document=100_000))
    found, share = measured(case, tmp_path)
    assert found.holds and 100 < found.value and 0.3 < share.value <= 1
    # what is held before the command begins counts, as what it holds does
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps({"modules": ["json"]}))
    assert peak("held = b'x' * 80_000_000\n" + IMPORTING, facts, []) > 80_000_000


def test_a_command_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="moestro nothing: .*nothing"):
        peak(DOING, tmp_path / "facts.json", ["nothing"])


def test_a_server_that_does_not_start_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the server did not start"):
        peak(DOING, tmp_path / "facts.json", ["serve", str(tmp_path / "nowhere")])


@pytest.mark.slow
def test_the_peak_of_every_verb_is_beneath_what_is_stated_for_it(tmp_path: Path) -> None:
    memory.main(["--json", str(tmp_path / "memory.json")])
    figures = json.loads((tmp_path / "memory.json").read_text())["figures"]
    held = [figure for figure in figures if figure["what"] == "peak"]
    assert {figure["case"] for figure in held} == set(STATED) and all(figure["holds"] for figure in held)
