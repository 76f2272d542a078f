"""What is damaged, killed in the middle or built twice at once is noticed, and never half there."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moestro.data import BPETokenizer, ByteTokenizer, Dataset
from tests.data.build import build, only


def damage_cut(folder: Path):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-10])


def damage_bit(folder: Path):
    data = bytearray((folder / "val.bin").read_bytes())
    data[7] ^= 1
    (folder / "val.bin").write_bytes(data)


def damage_hash(folder: Path):
    meta = json.loads((folder / "meta.json").read_text())
    # as releases wrote it that did not know of it
    del meta["checksum"]
    meta["splits"]["train"]["idx_sha256"] = "0" * 64
    (folder / "meta.json").write_text(json.dumps(meta))


def damage_tokenizer(folder: Path):
    ByteTokenizer().save(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_cut, r"train\.bin: damaged: it has \d+ bytes, meta\.json says \d+\. Delete the folder .*tokens"),
        (
            damage_bit,
            r"val\.bin: damaged: its SHA-256 is \w{12}\.\.\., meta\.json says \w{12}\.\.\.\. Delete the folder",
        ),
        (damage_hash, r"train\.idx: damaged: its SHA-256 is \w{12}\.\.\., meta\.json says 000000000000\.\.\."),
        (damage_tokenizer, r"tokenizer\.json: damaged: its fingerprint is .* Delete the folder"),
        (lambda folder: (folder / "val.idx").unlink(), r"val\.idx: damaged: it is missing"),
        (
            lambda folder: (folder / "meta.json").unlink(),
            r"meta\.json: no such file; this folder holds no token shards",
        ),
        (lambda folder: (folder / "meta.json").write_text("{"), r"meta\.json: damaged: it is not valid JSON"),
        (
            lambda folder: (folder / "meta.json").write_text("{}"),
            r"format=None, allowed: 1 to 1 \(.*meta\.json: format\)",
        ),
    ],
)
def test_damage_is_named(stories: Path, tmp_path: Path, damage, message: str):
    dataset = build(stories, tmp_path, BPETokenizer(300))
    damage(dataset.folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(stories, tmp_path, BPETokenizer(300))


def test_a_meta_without_an_entry_is_damaged(stories: Path, tmp_path: Path):
    dataset = build(stories, tmp_path)
    meta = json.loads((dataset.folder / "meta.json").read_text())
    del meta["splits"]["val"]["n_bytes"], meta["checksum"]
    (dataset.folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"meta\.json: damaged: an entry is missing or unknown \(.*n_bytes"):
        Dataset(dataset.folder, 32)


BUILD = """
import sys
from moestro.data import ByteTokenizer, JsonlSource, TokenData
from moestro.data import dataset, shards
from pathlib import Path
stories, cache, mark, slow = sys.argv[1:]
writer = shards._Writer.add
def add(self, document, ids):
    Path(mark).touch()
    if slow == "slow":
        import time; time.sleep(0.01)
    writer(self, document, ids)
shards._Writer.add = add
print(TokenData(JsonlSource(stories), ByteTokenizer(), 32, cache_dir=cache).prepare(progress=False).fingerprint)
"""


def builder(stories: Path, cache: Path, mark: Path, slow: str = "fast") -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, str(stories), str(cache), str(mark), slow]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def wait_for(path: Path) -> None:
    end = time.time() + 60
    while not path.exists():
        assert time.time() < end, f"{path} never came"
        time.sleep(0.01)


def test_killed_in_the_middle_it_starts_again(stories: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    process = builder(stories, cache, tmp_path / "mark", "slow")
    wait_for(tmp_path / "mark")
    (left,) = (cache / "tokens").iterdir()
    assert left.name.startswith(".")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert left.exists()
    # nobody holds it any more, whatever the clock says
    assert only(cache / "tokens") == left
    dataset = build(stories, cache)
    assert left.name.startswith(f".{dataset.folder.name}.") and only(cache / "tokens") == dataset.folder


def test_two_processes_may_build_the_same(stories: Path, tmp_path: Path):
    cache = tmp_path / "cache"
    slow = builder(stories, cache, tmp_path / "mark", "slow")
    wait_for(tmp_path / "mark")
    quick = build(stories, cache).fingerprint
    assert slow.poll() is None
    output, _ = slow.communicate(timeout=60)
    assert slow.returncode == 0 and output.strip() == quick
    assert len(list((cache / "tokens").iterdir())) == 1
