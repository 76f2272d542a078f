"""The run folder: one process, metrics that fit the checkpoint, errors that name the path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moestro.ops.whole_files import DamagedFile, record_hashes, require_intact
from moestro.train import CheckpointError, RunFolder, RunFolderError, train
from moestro.train.checkpoint import write_checkpoint
from moestro.train.folder import MetricsFile, require_writable
from tests.train.tiny import Counting, tiny_model, tiny_settings

HOLD = """
import sys, time
from pathlib import Path
from moestro.train.folder import RunFolder
with RunFolder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_with_the_first_ones_pid(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match=f"{tmp_path} is in use by process {other.pid}: wait for it, stop it"):
            train(tiny_model(), Counting(), tiny_settings(), [], [], tmp_path)
        other.kill()
        other.wait()
    # A killed process leaves no lock behind.
    with RunFolder(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_entering_clears_what_interrupted_writers_left(tmp_path):
    (tmp_path / "checkpoints" / ".writing-step-00000005").mkdir(parents=True)
    (tmp_path / ".writing-done.json").write_text("{")
    with RunFolder(tmp_path) as folder:
        assert list(folder.checkpoints.iterdir()) == []
        assert folder.result is None
    assert not (tmp_path / ".writing-done.json").exists()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*file/run: Not a directory\. Free space or make it"):
        train(tiny_model(), Counting(), tiny_settings(), [], [], tmp_path / "file" / "run")


def test_whether_a_folder_could_be_made_is_seen_beforehand(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*file/deep/run: Not a directory\."):
        require_writable(tmp_path / "file" / "deep" / "run")
    monkeypatch.chdir(tmp_path)
    require_writable(Path("new/run"))
    require_writable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    # root may write everywhere, so that the system's answer is given here
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(RunFolderError, match=r"cannot write new/run: Permission denied\."):
        require_writable(Path("new/run"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full to stand for a full disk")
def test_a_full_disk_under_the_metrics_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFolderError, match=r"cannot write .*metrics\.jsonl: No space left on device\. Free space"):
        train(tiny_model(), Counting(), tiny_settings(), [], [], tmp_path)


FULL = """
import resource, signal, sys
from pathlib import Path
from tests.train.tiny import Counting, tiny_model, tiny_settings
from moestro.ops.whole_files import DamagedFile, record_hashes, require_intact
from moestro.train import CheckpointError, train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
try:
    train(tiny_model(), Counting(), tiny_settings(steps=5), [], [], Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
"""


def test_no_room_for_a_checkpoint_is_an_error_and_leaves_no_half_of_it(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    assert f"cannot write checkpoint {tmp_path}/checkpoints/step-00000004: " in done.stdout, done.stderr
    assert "starts again from the beginning (no checkpoint is complete)" in done.stdout
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_the_write_error_names_the_checkpoint_that_is_left(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(2)}}, {})

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moestro.train.checkpoint.write_tensors", refuse)
    message = r"cannot write checkpoint .*step-00000010: .*No space left on device\. .*continues from step-00000005"
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path, 10, {"model": {"w": torch.ones(2)}}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_metrics_are_cut_back_to_their_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1})
    size = file.sync()
    file.write({"step": 2})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 3, "lo')
    file = MetricsFile(path, size)
    file.write({"step": 2, "again": True})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2, "again": True}]


def test_missing_metrics_are_an_error(tmp_path):
    with pytest.raises(
        RunFolderError, match=r"metrics\.jsonl has 0 bytes, its checkpoint was written at 90: lines are"
    ) as refused:
        MetricsFile(tmp_path / "metrics.jsonl", 90)
    assert refused.traceback[-1].frame.f_locals["self"].file.closed


def test_a_file_that_changed_while_training_ran_is_not_taken_for_what_was_written(tmp_path):
    with RunFolder(tmp_path) as folder:
        for name in ("recipe.yaml", "metrics.jsonl"):
            (tmp_path / name).write_text("then")
        record_hashes(tmp_path, ["recipe.yaml"])
        folder.finish({"step": 3})
        require_intact(tmp_path)
        (tmp_path / "recipe.yaml").write_text("now")
        assert folder.finish({"step": 4}) == folder.result == {"step": 4}
        with pytest.raises(DamagedFile, match=r"recipe\.yaml is damaged"):
            require_intact(tmp_path)
