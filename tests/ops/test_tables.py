"""Tables in memory and in files: the same zeros, and a file that needs no cleaning up."""

import errno
import os

import pytest
import torch

from moestro.experts import SingletonBank
from moestro.ops import tables
from moestro.ops.tables import new_table, tables_in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_table_is_zeros_that_keep_what_is_written(tmp_path, mapped, dtype):
    with tables_in(tmp_path / "new" if mapped else None):
        table = new_table(1000, 7, dtype)
    assert table.shape == (1000, 7) and table.dtype == dtype and not table.any()
    table[3] = 2
    assert table.sum() == 14


def test_a_file_is_used_inside_only_and_has_no_name(tmp_path):
    with tables_in(tmp_path):
        inside = new_table(2**16, 4)
        with tables_in(None):
            nested = new_table(2**16, 4)
    outside = new_table(2**16, 4)
    assert list(tmp_path.iterdir()) == []
    maps = [line for line in open("/proc/self/maps") if f"{tmp_path}/table-" in line]
    spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    where = [any(a <= table.data_ptr() < b for a, b in spans) for table in (inside, nested, outside)]
    assert where == [True, False, False]


def test_tables_without_numbers_or_memory_are_not_mapped(tmp_path):
    with tables_in(tmp_path):
        assert new_table(0, 4).shape == (0, 4)
        with torch.device("meta"):
            assert new_table(10**9, 10**6).device.type == "meta"


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tables.os, "posix_fallocate", full)
    with tables_in(tmp_path), pytest.raises(OSError, match="No space left"):
        new_table(10, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_bank_s_weights_do_not_depend_on_where_they_lie(tmp_path):
    banks = []
    for folder in (None, tmp_path):
        torch.manual_seed(0)
        with tables_in(folder):
            banks.append(SingletonBank(8, 25, heads=2, top_k=3))
    assert all(torch.equal(a, b) for a, b in zip(*(bank.parameters() for bank in banks), strict=True))
