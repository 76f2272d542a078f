"""The waits of a newcomer: what is done, in which order, and what is said of it. The whole takes half an hour."""

import json
from pathlib import Path

import pytest
import yaml

from bench.reliability import newcomer
from bench.reliability.newcomer import Newcomer, figures, main, timed, tour
from tests.conftest import ROOT


class Quick(Newcomer):
    """Does nothing but make what the commands would."""

    made = {"make demo": "runs/first_look/report.html", "moestro train": "runs/mine/done.json"}
    words: list[str]

    def do(self, *words: str, where: Path | None = None) -> None:
        self.words = [*getattr(self, "words", []), " ".join(words)]
        if words[0] == "git":
            (self.clone / "docs").mkdir(parents=True)
            (self.clone / "docs" / "tour.md").write_bytes((ROOT / "docs" / "tour.md").read_bytes())
        for start, path in self.made.items():
            if " ".join(words).removeprefix(".venv/bin/").startswith(start):
                (self.clone / path).parent.mkdir(parents=True, exist_ok=True)
                (self.clone / path).write_text("{}")


def test_it_does_what_the_readme_and_the_tour_say(tmp_path):
    someone = Quick("somewhere", tmp_path)
    done = timed(someone)
    assert list(done) == ["clone", "make setup", "make demo", "own recipe"]
    assert list(done.values()) == sorted(done.values())
    git, setup, demo, text, train = someone.words
    assert git == f"git clone -q somewhere {tmp_path}/moestro" and (setup, demo) == ("make setup", "make demo")
    assert "pydoc_data" in text and train == ".venv/bin/moestro train mine.yaml --out runs/mine"
    assert yaml.safe_load((someone.clone / "mine.yaml").read_text())["data"]["source"]["paths"] == "texts"
    assert all(figure.holds is not False for figure in figures(done, someone.clone))
    (someone.clone / "runs/mine/done.json").unlink()
    assert [figure.case for figure in figures(done, someone.clone) if figure.holds is False] == ["clone to own recipe"]


def test_caches_are_its_own_and_no_environment_is_inherited(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    someone = Newcomer("somewhere", tmp_path)
    assert someone.environment["MOESTRO_CACHE"] == str(tmp_path / "cache")
    assert someone.environment["PIP_NO_CACHE_DIR"] == "1" and "PYTHONPATH" not in someone.environment


def test_a_real_clone_and_a_command_in_it(tmp_path, capfd):
    someone = Newcomer("somewhere", tmp_path)
    someone.do("git", "init", "-q", str(someone.clone), where=tmp_path)
    someone.do("git", "status", "--short", "--branch")
    assert "No commits yet" in capfd.readouterr().err


def test_it_reports_in_the_one_format(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(newcomer, "Newcomer", Quick)
    main(["--source", "x", "--json", str(tmp_path / "out" / "newcomer.json")])
    assert "clone to own recipe" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "newcomer.json").read_text())
    assert set(result) == {"script", "commit", "machine", "seed", "figures"}
    assert (ROOT / result["script"]).is_file()
    assert [figure["case"] for figure in result["figures"]][1:3] == ["clone to first report", "clone to own recipe"]
    monkeypatch.setattr(Quick, "made", {"make demo": "runs/first_look/report.html"})
    with pytest.raises(SystemExit, match="a figure is not what it has to be"):
        main(["--source", "x"])


def test_a_tour_without_its_blocks_is_said(tmp_path):
    (tmp_path / "tour.md").write_text("# nothing")
    with pytest.raises(ValueError, match="no block that writes text"):
        tour(tmp_path / "tour.md")
