"""Blocks of code in Markdown pages, and how they are run as a reader would."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One block: its language, the file that it is said to be, its text."""

    language: str
    title: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


class Reader:
    """Someone who follows a page in a folder of theirs: blocks with a title become files, `sh` and `python` are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / ".programs"
        programs.mkdir()
        command = programs / "moestro"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m moestro "$@"\n')
        command.chmod(0o755)
        (programs / "python").symlink_to(sys.executable)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "MOESTRO_CACHE": str(folder / ".cache"),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
        }

    def follow(self, block: Block, timeout: float = 1200) -> str:
        """Do what a block says; returns all that it printed."""
        if block.title:
            (self.folder / block.title).write_text(block.text, encoding="utf-8")
            return ""
        words = {"sh": ["bash", "-e"], "python": [sys.executable, "-"]}[block.language]
        done = subprocess.run(
            words, input=block.text, cwd=self.folder, env=self.environment, text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{block.text}\n{done.stdout}"
        return done.stdout
