"""Files that are whole or absent, and the hashes beside them."""

import os
from pathlib import Path

import pytest

from moestro.ops.whole_files import (
    HASHES,
    DamagedFile,
    record_hashes,
    recorded_hashes,
    require_intact,
    sha256,
    sha256_json,
    write_bytes,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    record_hashes(tmp_path, ["a", "b", "c"])
    return tmp_path


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "there"] and os.listdir(tmp_path / "there") == ["file"]


def test_of_several_damaged_files_the_first_is_named(folder):
    require_intact(folder)
    for name in ("b", "c"):
        (folder / name).write_text("other")
    with pytest.raises(DamagedFile, match=f"{folder}/b is damaged: it has sha256 {sha256(folder / 'b')}"):
        require_intact(folder)
    require_intact(folder, "a", "of which nothing is known")
    (folder / "c").unlink()
    with pytest.raises(DamagedFile, match=f"{folder}/c is missing"):
        require_intact(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/../../secret"])
def test_hashes_of_files_elsewhere_are_refused(folder, name):
    (folder.parent / "secret").write_text("x")
    record_hashes(folder, [], {name: "0" * 64})
    with pytest.raises(DamagedFile, match=r"lies outside of its folder\): restore it"):
        require_intact(folder)


@pytest.mark.parametrize("said", [["a"], "a", 3, None])
def test_hashes_that_are_no_table_are_damage(folder, said):
    text = f'{{"sha256": {said!r}, "checksum": "{sha256_json(said)}"}}'.replace("'", '"').replace("None", "null")
    (folder / HASHES).write_text(text)
    with pytest.raises(DamagedFile, match=r"hashes.json is damaged \("):
        recorded_hashes(folder)
