"""No file that a folder names lies outside of it: neither read, nor copied, nor written."""

import json
import shutil
from pathlib import Path

import pytest

from moestro.cli import main
from moestro.export import open_model
from moestro.formats import FormatError
from moestro.ops.whole_files import sha256_json
from moestro.train.checkpoint import STATE, CheckpointError, read_state
from tests.security.test_untrusted_folders import verbs
from tests.stock_models import stock_folder

OUTSIDE = (
    "../secret.safetensors",
    "/secret.safetensors",
    "a/../../secret.safetensors",
    "sub/weights.safetensors",
    "..",
    "",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stock model whose weights an index places."""
    made = stock_folder(tmp_path / "model")
    shutil.copy(made / "model.safetensors", tmp_path / "secret.safetensors")
    return made


def index(folder: Path, file: str) -> None:
    """Place every tensor in `file`."""
    from moestro.formats.shards import header

    entries, _ = header(folder.parent / "secret.safetensors")
    place = file.replace("/secret", f"{folder.parent}/secret") if file.startswith("/") else file
    content = {"metadata": {}, "weight_map": dict.fromkeys(entries, place)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_places_nothing_outside_of_its_folder(folder: Path, tmp_path: Path, file: str) -> None:
    index(folder, file)
    with pytest.raises(FormatError, match="is not a file name inside the folder"):
        open_model(folder)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    for words in verbs(folder, tmp_path / "out"):
        assert main(words) != 0
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before


def test_a_checkpoint_hashes_nothing_outside_of_its_folder(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = tmp_path / "checkpoints" / "step-00000001"
    path.mkdir(parents=True)
    for name in ("../../secret.txt", str(secret), ".."):
        state = {"format_version": 1, "step": 1, "sha256": {name: "0" * 64}}
        (path / STATE).write_text(json.dumps({**state, "checksum": sha256_json(state)}))
        with pytest.raises(CheckpointError) as refused:
            read_state(path)
        assert "is not a file name" in str(refused.value)


def test_an_import_copies_no_folder_and_no_hidden_file(tmp_path: Path) -> None:
    source = stock_folder(tmp_path / "model")
    (source / ".hidden.json").write_text("{}")
    (source / "code.py").write_text("")
    (source / "inner").mkdir()
    (source / "inner" / "more.json").write_text("{}")
    assert main(["import", str(source), "--out", str(tmp_path / "run")]) == 0
    copied = {path.name for path in (tmp_path / "run" / "pretrained").iterdir()}
    assert "config.json" in copied and not copied & {".hidden.json", "code.py", "inner"}


def test_an_output_that_is_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    import os
    import stat

    from moestro.train.durable import write_text

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(pipe, "hello")
        assert os.read(reader, 100) == b"hello" and stat.S_ISFIFO(pipe.stat().st_mode)
    finally:
        os.close(reader)
