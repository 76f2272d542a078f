"""Reading parts of files, through the page cache and past it: the same bytes."""

import os
from pathlib import Path

import pytest
import torch

from bench.cold_files import held_pages, make_cold
from moestro.offload import files as files_module
from moestro.offload import session as session_module
from moestro.offload.blobs import Extent
from moestro.offload.files import Files, OffloadError
from moestro.offload.session import Plan, Session
from tests.hf.families import some_tokens
from tests.offload.models import in_memory, memory_for, tiny_folder

SIZE = (9 << 20) + 12345


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "numbers"
    path.write_bytes(torch.randint(256, (SIZE,), dtype=torch.uint8).numpy().tobytes())
    return path


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_any_place_and_size(file: Path, direct: bool) -> None:
    whole, files = file.read_bytes(), Files(direct)
    places = [(0, 1), (4096, 4096), (4095, 2), (777, 5 << 20), (4096, 4 << 20), (SIZE - 3, 3), (0, SIZE)]
    for start, size in places:
        into = torch.zeros(size + 7, dtype=torch.uint8)
        files.read(Extent(file, start, size, 0), into)
        assert into[:size].numpy().tobytes() == whole[start : start + size] and not into[size:].any(), (start, size)
    rows = torch.zeros(3, 1000, dtype=torch.uint8)
    files.read_rows(file, 50, [2, 3, 9], rows)
    assert rows.numpy().tobytes() == whole[2050:4050] + whole[9050:10050]
    for start in (SIZE - 3, SIZE, SIZE + 5000):
        with pytest.raises(OffloadError, match=f"numbers ends at byte {max(SIZE, start)}: it was cut"):
            files.read(Extent(file, start, 4, 0), torch.zeros(4, dtype=torch.uint8))
    files.close()


def test_direct_reads_leave_no_pages(file: Path) -> None:
    files = Files(direct=True)
    files.open(file)
    if not files._opened[file].direct:
        pytest.skip("this file system has no direct reads")
    make_cold([file])
    files.read(Extent(file, 100, SIZE - 100, 0), torch.zeros(SIZE, dtype=torch.uint8))
    assert held_pages(files._opened[file].descriptor) == 0
    file.read_bytes()
    assert held_pages(files._opened[file].descriptor) == -(-SIZE // 4096)
    files.close()


def test_a_file_system_without_direct_reads_is_read_as_usual(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def refuses(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(files_module.os, "open", refuses)
    files, into = Files(direct=True), torch.zeros(10, dtype=torch.uint8)
    files.read(Extent(file, 5, 10, 0), into)
    assert into.numpy().tobytes() == file.read_bytes()[5:15] and not files._opened[file].direct
    files.close()


def test_generation_past_the_page_cache_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tokens = tiny_folder(tmp_path / "model"), some_tokens(1, 12)
    with torch.no_grad():
        want = in_memory(folder)(tokens).logits
    # what the machine has left decides where a plan does not
    for free, said, direct in ((None, None, False), (1 << 40, None, False), (1000, None, True), (1000, False, False)):
        monkeypatch.setattr(session_module, "free_machine_memory", lambda free=free: free)
        plan = Plan(memory_for(folder, 2), direct=said)
        with Session(folder, plan, poison=True) as session, session.running():
            assert session.memory.source.files.direct == direct
            assert torch.equal(session.model(tokens).logits, want)
