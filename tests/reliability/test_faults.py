"""Full disks, folders that cannot be written, two processes on one folder, clocks that jump: for every command that
writes. Full and read-only disks are small file systems in memory, which only root may mount."""

import multiprocessing
import os
import subprocess
import time
from pathlib import Path

import pytest

from bench.reliability.contents import contents, half_written
from moestro.cli import main
from moestro.ops.whole_files import TEMPORARY, holding
from moestro.train import RunFolder
from tests.reliability.commands import VERBS, Commands
from tests.train.tiny import Counting, tiny_model, tiny_settings


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("sources"))


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch):
    """Workers of a comparison without a start of python each."""
    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: forked)


class Disk:
    """A file system in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def mount(self, *options: str) -> None:
        words = ["mount", "-t", "tmpfs", *("-o", ",".join(options)), "moestro-test", str(self.path)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here ({done.stderr.strip() or 'not root'})")

    def remount(self, *options: str) -> None:
        subprocess.run(["mount", "-o", ",".join(["remount", *options]), str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    if not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("only root may mount a file system")
    made = Disk(tmp_path / "disk")
    yield made
    subprocess.run(["umount", "-l", str(made.path)], check=False, capture_output=True)


# what each needs before it fails: enough to begin with
ROOM = {"train": "100k", "prepare": "40k", "compare": "60k", "compress": "60k", "convert": "60k", "export": "60k"}


QUICK = ("train", "prepare", "compress")
SOME = [verb if verb in QUICK else pytest.param(verb, marks=pytest.mark.slow) for verb in VERBS]


@pytest.mark.parametrize("verb", SOME)
def test_a_full_disk_is_an_error_that_names_the_place_and_costs_nothing(verb, commands, disk, capsys):
    disk.mount(f"size={ROOM[verb]}")
    out = disk.path / "out"
    assert main(commands(verb, out)) == 1
    said = capsys.readouterr().err
    assert str(disk.path) in said and "Traceback" not in said
    assert "No space left on device" in said or "GB are free" in said
    assert not half_written(disk.path)
    disk.remount("size=40m")
    assert main(commands(verb, out)) == 0
    assert not half_written(disk.path) and not list(disk.path.rglob(TEMPORARY + "*"))


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_cannot_be_written_is_an_error_that_names_the_place(verb, commands, disk, capsys):
    disk.mount("size=40m")
    (disk.path / "out").mkdir()
    disk.remount("ro")
    assert main(commands(verb, disk.path / "out")) == 1
    said = capsys.readouterr().err
    assert str(disk.path / "out") in said and "Read-only file system" in said and "Traceback" not in said


# the folder that a second process finds held
HELD = {
    "train": "out", "compare": "out", "compress": f"{TEMPORARY}out.plan", "convert": f"{TEMPORARY}out.job",
    "export": f"{TEMPORARY}out.job",
}  # fmt: skip


@pytest.mark.parametrize("verb", [verb for verb in SOME if verb != "prepare"])
def test_a_second_process_on_a_folder_is_refused(verb, commands, tmp_path, capsys):
    held = tmp_path / HELD[verb]
    with RunFolder(held) if verb == "train" else holding(held, RuntimeError("held")):
        assert main(commands(verb, tmp_path / "out")) == 1
        said = capsys.readouterr().err
        assert ("is in use by process" if verb == "train" else "another process is writing") in said
        assert str(tmp_path / "out") in said and "wait for it, stop it, or choose another folder" in said
    assert main(commands(verb, tmp_path / "out")) == 0


@pytest.mark.parametrize("verb", ["compress", pytest.param("export", marks=pytest.mark.slow)])
def test_what_a_kill_just_after_the_end_left_is_cleared(verb, commands, tmp_path, monkeypatch):
    """Found by bench.reliability.kills: the folder has its name, what was kept beside it has not gone yet."""
    source, out = commands.work / "moe", tmp_path / "out"
    words = commands("export", out)
    if verb == "compress":
        assert main(["export", str(source), "--out", str(tmp_path / "stock"), "--format", "stock"]) == 0
        words = ["compress", str(tmp_path / "stock"), str(out), "--method", "width", "--ratio", "0.25"]
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("moestro.train.folder_job.shutil.rmtree", lambda *arguments, **keywords: None)
        assert main(words) == 0
    assert (tmp_path / f"{TEMPORARY}out.job").is_dir()
    assert main(words) == 0
    assert set(tmp_path.iterdir()) == before | {out}


def test_clocks_that_jump_change_nothing_that_is_learned(commands, tmp_path, monkeypatch):
    """Back by a day after every look, and forward: hashes and figures are those of a run under a clock that goes."""
    assert main(commands("train", tmp_path / "plain")) == 0
    assert main(commands("prepare", tmp_path / "plain-cache")) == 0
    looks = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + 86_400 * (-1) ** next(looks) * next(looks))
    assert main(commands("train", tmp_path / "jumping")) == 0
    assert main(commands("prepare", tmp_path / "jumping-cache")) == 0
    plain, jumping = contents(tmp_path / "plain"), contents(tmp_path / "jumping")
    assert plain == jumping
    assert contents(tmp_path / "plain-cache") == contents(tmp_path / "jumping-cache")


def test_files_from_the_future_do_not_look_abandoned_nor_finished(commands, tmp_path):
    """A shard build that another process holds stays, however old its files look; nothing compares times of files."""
    assert main(commands("prepare", tmp_path / "cache")) == 0
    (built,) = (tmp_path / "cache" / "tokens").iterdir()
    living = built.with_name(f".{built.name}.living")
    with holding(living, RuntimeError("held")):
        os.utime(living, (0, 0))
        for file in built.iterdir():
            file.unlink()
        built.rmdir()
        assert main(commands("prepare", tmp_path / "cache")) == 0
        assert living.is_dir() and built.is_dir()


def test_a_run_goes_on_where_another_process_has_died(tmp_path):
    """The lock is the process's, not the file's."""
    from moestro.train import train

    (tmp_path / "lock").write_text("1")
    assert train(tiny_model(), Counting(), tiny_settings(2), [], [], tmp_path)["step"] == 2
