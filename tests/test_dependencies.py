"""Pins, ranges and licences of what moestro depends on, and what is made of pip-audit's answers."""

import json
import stat
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools import dependencies
from tools.dependencies import advisories, closure, declared, is_allowed, licence, main, pins, problems


def test_all_that_is_installed_for_moestro_is_pinned_in_range_and_free(capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 0, capsys.readouterr().out
    names = {requirement.name.lower() for listed in declared().values() for _, requirement in closure(listed)}
    assert {"torch", "sympy", "lm-eval", "uvicorn", "huggingface-hub", "jinja2"} <= names and len(names) > 60


@pytest.mark.parametrize(
    ("wanted", "pinned", "said"),
    [
        ("numpy>=2", {}, "numpy: moestro requires it, constraints.txt has no pin"),
        ("numpy>=2", {"numpy": "1.26"}, "numpy==1.26: moestro requires >=2"),
        ("chardet", {"chardet": "6"}, "chardet: licence 'GNU Lesser General Public"),
    ],
)
def test_what_is_wrong_is_said(wanted: str, pinned: dict[str, str], said: str) -> None:
    assert said in "\n".join(problems({"core": [Requirement(wanted)]}, pinned)[0])


def test_what_packages_require_of_others_counts() -> None:
    found = problems({"core": [Requirement("jinja2")]}, {"jinja2": "3.1.6"})
    assert found == (["markupsafe: jinja2 requires it, constraints.txt has no pin"], [])
    assert problems({"core": [Requirement("nothing-like-this")]}, {"nothing-like-this": "1"}) == (
        [],
        ["nothing-like-this"],
    )


@pytest.mark.parametrize(
    ("text", "core", "extra"),
    [
        *((text, True, True) for text in ("MIT", "Apache-2.0 AND MIT", "BSD License", "GPL-3.0 OR MIT", "PSFL")),
        *((text, False, True) for text in ("LGPL-3.0-only", "GNU Lesser General Public License v3 (LGPLv3)")),
        *(
            (text, False, False)
            for text in ("", "GPL-3.0-only", "MIT AND GPL-3.0", "AGPL-3.0", "permit nothing", "simple terms")
        ),
    ],
)
def test_licences(text: str, core: bool, extra: bool) -> None:
    assert (is_allowed(text, True), is_allowed(text, False)) == (core, extra)


def test_licences_are_read_where_packages_say_them() -> None:
    assert is_allowed(licence("torch"), True) and is_allowed(licence("scipy"), True)


def auditor(folder: Path, answer: object) -> str:
    """A program that answers as pip-audit would: with 0 whatever it skipped."""
    program = folder / "pip-audit"
    (folder / "answer.json").write_text(json.dumps(answer))
    copy = f"cp {folder}/answer.json" if answer else "echo no connection >&2; false"
    program.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n{copy} "$2"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "no known vulnerability in what was audited\n"),
        ([{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}], 1, "a==1: CVE-1\n"),
        ([{"name": "a", "skip_reason": "not found"}], 3, "not audited, because no database knew them or could be"),
        (None, 3, "nothing was audited: ['no connection']"),
    ],
)
def test_what_pip_audit_skipped_was_not_audited(
    tmp_path: Path, capsys: pytest.CaptureFixture, answer: list | None, code: int, said: str
) -> None:
    program = auditor(tmp_path, answer and {"dependencies": answer})
    assert main(["--advisories", program]) == code
    assert main(["--advisories", program, "--may-skip"]) == code % 3
    assert said in capsys.readouterr().out
    assert dependencies.PINS.is_file() and len(pins()) > 100
    assert advisories({"dependencies": []}) == ([], [])
