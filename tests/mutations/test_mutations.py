"""Recipes and command lines changed at random: no traceback, no endless work, and refusals that help."""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

from bench.reliability.cases import Case, Draw
from bench.reliability.confined import confined
from bench.reliability.mutations import RESULTS, WRONG, run
from bench.reliability.recipe_cases import RECIPE_MUTATIONS
from bench.reliability.verdict import Verdict, judged, lacking
from moestro.cli import version


def told(verdicts: list[Verdict]) -> str:
    """The cases that went wrong, as the command line shows them."""
    return "\n".join(f"{v.result}: {v.case.verb} {v.case.words}: {v.why}: {v.said[-500:]}" for v in verdicts)


def test_sixty_mutations_end_in_a_message_that_helps() -> None:
    verdicts = run(60, seed=11)
    assert not (wrong := [each for each in verdicts if each.result in WRONG]), told(wrong)
    assert sum(each.result == "refused" for each in verdicts) > 40 and len({each.case.verb for each in verdicts}) > 10


@pytest.mark.slow
def test_a_thousand_mutations_end_in_a_message_that_helps() -> None:
    verdicts = run(1000, seed=0)
    assert not (wrong := [each for each in verdicts if each.result in WRONG]), told(wrong)
    assert {each.result for each in verdicts} == set(RESULTS) - set(WRONG)


@pytest.mark.parametrize("mutate", RECIPE_MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_a_mutation_is_a_function_of_its_seed(mutate) -> None:
    tree = {"data": {"source": {"kind": "text"}}, "train": {"seed": 1}, "objectives": [{"kind": "x", "weight": 0.5}]}
    texts = [str(mutate(Draw(str(seed)), tree).text) for seed in (1, 1, *range(20))]
    assert texts[0] == texts[1] and len(set(texts)) > 1
    assert tree["train"] == {"seed": 1} and "extends" not in tree


def test_what_a_refusal_lacks_is_said() -> None:
    case = Case("train", "zero", (), ("d_model",), ("-3",))
    assert lacking(case, "moestro: error: d_model=-3, allowed: at least 1", 1, 2) == ""
    assert lacking(case, "moestro: error: d_model=0, allowed: at least 1", 1, 2) == "does not show the value"
    assert lacking(case, "moestro: error: it is -3, allowed: at least 1", 1, 2) == "does not name what is wrong"
    assert lacking(case, "moestro: error: d_model=-3 wrong", 1, 2) == "does not say what is allowed"
    nothing = Case("train", "override, no value", (), ("d_model",), ("", "null"))
    assert lacking(nothing, "moestro: error: d_model=3, allowed: at least 1", 1, 2) == "does not show the value"
    assert lacking(nothing, "moestro: error: d_model is empty, allowed: at least 1", 1, 2) == ""
    scaled = Case("train", "wrong value", (), ("d_model",), ("1e3",))
    assert lacking(scaled, "moestro: error: d_model=1000.0, allowed: at most 1", 1, 2) == ""
    assert "exit code 7" in lacking(case, "moestro: error: d_model=-3, allowed: x", 0, 7)


def test_every_kind_of_wrong_end_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(what: BaseException | None, write: Path | None = None) -> str:
        def run(arguments: object) -> int:
            if write is not None:
                write.write_text("x")
            if what is not None:
                raise what
            return 0

        monkeypatch.setattr(version, "run", run)
        return judged(Case("version", "none", (), ()), tmp_path / "in").result

    (tmp_path / "in").mkdir()
    assert [ended(None), ended(KeyError("a bug")), ended(ValueError("no"))] == ["accepted", "traceback", "poor"]
    assert ended(None, tmp_path / "in" / "a") == "accepted"
    # what is always wrong may not be
    assert judged(Case("version", "extra key", (), ()), tmp_path / "in").result == "unnoticed"
    assert ended(None, tmp_path / "out") == "outside" and not (tmp_path / "out").exists()


def test_nothing_outside_the_folder_can_be_changed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out.txt"
    inside.mkdir()
    outside.write_text("kept")
    (inside / "link").symlink_to(tmp_path)
    with confined(inside) as fence:
        (inside / "new").write_text("x")
        os.replace(inside / "new", inside / "newer")
        for change in (
            lambda: outside.write_text("x"),
            lambda: outside.unlink(),
            lambda: os.replace(inside / "newer", outside),
            lambda: (inside / "link" / "more").mkdir(),
            lambda: (tmp_path / "also").symlink_to(inside),
        ):
            with pytest.raises(PermissionError):
                change()
        assert len(fence.crossed) == 5 and outside.read_text() == "kept"
    outside.unlink()


def test_what_is_imported_inside_leaves_no_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "imported_inside.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    with confined(tmp_path / "in") as fence:
        import_module("imported_inside")
    assert not fence.crossed and not (tmp_path / "__pycache__").exists() and not sys.dont_write_bytecode
