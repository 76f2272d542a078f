"""Pages of docs/: each in the navigation, every link within the repository leads somewhere, the site builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tools.api_pages import pages

DOCS = ROOT / "docs"
FILES = sorted(DOCS.glob("*.md"))
API = pages()
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of headings, as mkdocs makes them, and those that are written."""
    made = set(re.findall(r"\{ *#([\w.-]+) *\}", text))
    for title in re.findall(r"^#+ (.+?)(?: \{.*\})?$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).strip().lower()
        made.add(re.sub(r"[-\s]+", "-", plain))
    return made


def broken(page: Path, text: str) -> list[str]:
    found = []
    for target in LINK.findall(without_code(text)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        name = os.path.relpath(page.parent / path if path else page, DOCS)
        there = API.get(name) or (text_of(DOCS / name) if (DOCS / name).is_file() else None)
        if there is None or (anchor and anchor not in anchors(there)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", FILES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page, text_of(page)) == []


def test_every_note_on_systems_has_a_name_of_its_own_and_is_asked_for():
    text = text_of(DOCS / "systems.md")
    notes = re.findall(r"^([A-Z]?\d+)\. ", text, re.MULTILINE)
    cells = [row.split("|")[4].split() for row in re.findall(r"^\|.*\|$", text, re.MULTILINE)]
    asked = {note for cell in cells if all(re.fullmatch(r"[A-Z]?\d+", word) for word in cell) for note in cell}
    assert len(notes) == len(set(notes)) and set(notes) == asked


@pytest.mark.parametrize("name", API)
def test_links_of_the_api_lead_somewhere(name):
    assert broken(DOCS / name, API[name]) == []


def test_a_broken_link_would_be_found():
    assert broken(DOCS / "index.md", "[a](nowhere.md) [b](tour.md#no-such) [c](tour.md) `[d](x.md)`") == [
        "nowhere.md",
        "tour.md#no-such",
    ]


def listed(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    return [name for inner in (entry.values() if isinstance(entry, dict) else entry) for name in listed(inner)]  # type: ignore[union-attr]


def test_every_page_is_in_the_navigation_once():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(listed(navigation)) == sorted(page.name for page in FILES), "mkdocs.yml: nav"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in API:
        assert (tmp_path / "site" / name.removesuffix(".md") / "index.html").is_file()
