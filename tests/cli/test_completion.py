"""Completion as a user has it: a real shell on a terminal, a Tab, and what then stands on the line."""

import os
import pty
import select
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moestro.cli import VERBS, main
from tests.conftest import ROOT

SHELLS = {"bash": ["bash", "--noprofile", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}
START = {"bash": "bind 'set bell-style none'", "zsh": "autoload -Uz compinit && compinit -u -D; unsetopt beep"}
TAB, DELETE_LINE = b"\t", b"\x15"


class Terminal:
    """A shell on a pseudo-terminal."""

    def __init__(self, shell: str, folder: Path, environment: dict[str, str]) -> None:
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe(SHELLS[shell][0], SHELLS[shell], environment)

    def read_until(self, wanted: str, seconds: float = 20) -> str:
        seen, until = "", time.monotonic() + seconds
        while wanted not in seen and time.monotonic() < until:
            if select.select([self.end], [], [], 0.1)[0]:
                seen += os.read(self.end, 4096).decode(errors="replace")
        assert wanted in seen, f"{wanted!r} did not come; got {seen!r}"
        return seen

    def send(self, content: bytes) -> None:
        os.write(self.end, content)

    def close(self) -> None:
        self.send(DELETE_LINE + b"exit\n")
        os.close(self.end)
        os.waitpid(self.pid, 0)


@pytest.fixture(scope="module", params=SHELLS)
def terminal(request, tmp_path_factory):
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    tmp_path = tmp_path_factory.mktemp("home")
    script = tmp_path / "moestro"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m moestro "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "TERM": "dumb", "HOME": str(tmp_path)}
    opened = Terminal(shell, ROOT, environment)
    # what is typed is echoed, so the prompt is not typed as it will look
    opened.send(f'{START[shell]}; eval "$(moestro completion {shell})"; PS1="re""ady> "\n'.encode())
    opened.read_until("ready> ")
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("typed", "then"),
    [
        ("moestro insp", "inspect "),
        ("moestro train recipes/peer_gl", "recipes/peer_glu.yaml"),
        ("moestro train recipes/peer_glu.yaml --ou", "--out "),
        ("moestro eval runs --checkpoint be", "best "),
        ("moestro completion z", "zsh "),
    ],
)
def test_a_tab_completes(terminal, typed, then):
    terminal.send(typed.encode() + TAB)
    # zsh rewrites the line where bash writes what is missing
    missing = then[len(typed.rsplit(" ", 1)[1]) :]
    terminal.read_until(missing)
    terminal.send(DELETE_LINE)


def script(shell: str, capsys: pytest.CaptureFixture) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_sound_and_know_every_verb(shell, capsys):
    text = script(shell, capsys)
    assert all(verb in text for verb in VERBS)
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def completed(bash: str, *words: str) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f"{bash}\nCOMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _moestro; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    return subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_offers_what_fits(capsys):
    bash = script("bash", capsys)
    assert completed(bash, "moestro", "") == [*VERBS, "--help", "--version"]
    assert completed(bash, "moestro", "co") == ["compare", "convert", "compress", "completion"]
    assert completed(bash, "moestro", "export", "x", "--form") == ["--format"]
    assert completed(bash, "moestro", "export", "x", "--format", "") == ["moestro", "stock"]
    # nothing of ours: the shell completes paths
    assert completed(bash, "moestro", "train", "recipes/") == []
    assert completed(bash, "moestro", "nosuchverb", "--") == []


def test_other_shells_are_refused_by_name(capsys):
    assert main(["completion", "fish"]) == 2
    assert "invalid choice: 'fish' (choose from" in capsys.readouterr().err
