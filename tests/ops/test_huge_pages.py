"""Huge pages: asked of the system where it has them, harmless elsewhere."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from moestro.experts import SingletonBank
from moestro.ops import huge_pages, tables
from moestro.ops.huge_pages import request_huge_pages
from moestro.train.row_adamw import RowAdamW

offered = pytest.mark.skipif(
    huge_pages.huge_pages() not in ("always", "madvise"), reason="the system offers no transparent huge pages"
)


def advised(tensor: torch.Tensor) -> bool:
    """Whether the kernel marks the middle of a tensor's memory as wanting huge pages."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= middle < end
        elif inside and head == "VmFlags:":
            return "hg" in line.split()[1:]
    return False


@offered
def test_a_large_tensor_gets_them_and_keeps_its_values():
    # memory of its own: torch's may have been another table's
    plain, table = torch.frombuffer(mmap.mmap(-1, 2**26), dtype=torch.float32), torch.zeros(2**24)
    assert request_huge_pages(table) and advised(table)
    assert not advised(plain)
    assert not table.any()


def test_small_tensors_and_tensors_elsewhere_are_left_alone():
    assert request_huge_pages(torch.zeros(10)) is False
    assert request_huge_pages(torch.empty(0)) is False
    assert request_huge_pages(torch.zeros(2**24, device="meta")) is False


@pytest.mark.parametrize("state", ["never", "unavailable"])
def test_nothing_is_asked_where_there_are_none(monkeypatch, state):
    monkeypatch.setattr(huge_pages, "huge_pages", lambda: state)
    assert request_huge_pages(torch.zeros(2**24)) is False


@pytest.mark.parametrize(
    ("text", "expected"),
    [("always [madvise] never\n", "madvise"), ("[always] madvise never\n", "always"), (None, "unavailable")],
)
def test_the_system_s_setting_is_reported(monkeypatch, tmp_path, text, expected):
    monkeypatch.setattr(huge_pages.platform, "system", lambda: "Linux")
    monkeypatch.setattr(huge_pages, "_SWITCH", tmp_path / "enabled")
    if text is not None:
        (tmp_path / "enabled").write_text(text)
    assert huge_pages.huge_pages() == expected


@offered
def test_tables_and_their_moments_lie_in_huge_pages():
    bank = SingletonBank(64, 2**17, sparse_gradients=True)
    optimizer = RowAdamW(bank.parameters())
    for parameter in bank.parameters():
        parameter.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 64), parameter.shape, check_invariants=False)
    optimizer.step()
    for parameter in bank.parameters():
        assert advised(parameter)
        assert advised(optimizer.state[parameter]["exp_avg"]) and advised(optimizer.state[parameter]["exp_avg_sq"])


def test_tables_are_asked_for_before_they_are_written(monkeypatch):
    """Pages that exist already stay small."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    grown, before = [], resident()
    monkeypatch.setattr(tables, "request_huge_pages", lambda table: grown.append(resident() - before))
    table = tables.new_table(2**16, 2**8)
    assert grown[0] < table.nbytes / 4 and not table.any()
