"""The pieces of bench/offload.py and bench/effects/offload.py that need no large model."""

import math
import mmap
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.cold_files import disk_speed, held_pages, make_cold
from bench.effects.offload import EFFECTS, STUDY
from bench.effects.offload_probes import replayed
from bench.effects.study import Work
from bench.limits import limited, read_from_disk
from bench.llama_cpp_side import Folder, paired, tensors
from bench.offload import rows_of
from bench.offload_side import Clock
from bench.small_mixtral import drawn, library_text
from moestro.compare.board import Board
from moestro.formats import Checkpoint
from tests.offload.traces import made_up

SIZES = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_local_experts": 4}


def test_a_drawn_checkpoint_is_whole(tmp_path: Path) -> None:
    checkpoint = Checkpoint(drawn(tmp_path / "model", SIZES))
    assert checkpoint.moe_layers == (0, 1) and checkpoint.n_experts(1) == 4
    first = checkpoint.expert(0, 0)
    assert first.gate.shape == (8, 16) and first.down.shape == (16, 8) and first.gate.dtype == torch.bfloat16
    assert not torch.equal(first.gate, checkpoint.expert(0, 1).gate)
    assert int(library_text().max()) < 256


def test_a_command_under_a_limit_answers_or_says_why() -> None:
    assert limited(["-c", "print('x'); print('{\"a\": 1}')"], 1 << 31) == {"a": 1}
    greedy = "from bench.limits import enter; enter(); x = bytearray(1 << 30); print('{}')"
    with pytest.raises(RuntimeError, match="ended with"):
        limited(["-c", greedy], 1 << 28)


def test_cold_files_come_from_the_disk_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    descriptor = os.open(path, os.O_RDONLY)
    assert held_pages(descriptor) == 1024
    make_cold([path])
    assert held_pages(descriptor) == 0
    before = read_from_disk()
    path.read_bytes()
    assert held_pages(descriptor) == 1024 and read_from_disk() - before == 4 << 20
    with mmap.mmap(descriptor, 4 << 20, mmap.MAP_PRIVATE) as mapped:
        assert mapped[:].count(0) == 4 << 20
        with pytest.raises(RuntimeError, match="1024 pages stay in memory; does another process use it"):
            make_cold([path])
    os.close(descriptor)
    assert disk_speed(path, True) > 0 < disk_speed(path, False)


def test_contestants_are_put_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([(1.0, 100), (3.0, 700), (4.0, 800), (7.0, 1100)])
    clock = Clock()
    monkeypatch.setattr("bench.offload_side.time.perf_counter", lambda: (mark := next(marks)) and mark[0])
    monkeypatch.setattr("bench.offload_side.read_from_disk", lambda: 100 * len(clock.marks))
    for _ in range(4):
        clock.mark()
    assert clock.found() == {"prefill": 2.0, "prefill_disk": 100, "seconds": 2.0, "disk": 100.0}
    one = clock.found() | {"disk": 0.0}
    found = {side: [one, one] for side in ("exact", "accelerate", "mixed")}
    found["accelerate"] = [{**one, "seconds": 6.0, "disk": 8 << 20}] * 2
    rows = {(row.what, row.peer): row for row in rows_of("case", found)}
    assert len(rows) == 4 * 3
    decode = rows["decode a token", "accelerate disk offload"]
    assert (decode.ours, decode.theirs, decode.ratio, decode.unit) == (2000.0, 6000.0, 3.0, "ms")
    read = rows["from the disk, a token, mixed int4", "accelerate disk offload"]
    assert (read.ours, read.theirs, read.unit, read.ratio) == (2**-8, 8.0, "MiB", 2048)


def test_a_folder_is_told_to_llama_cpp(tmp_path: Path) -> None:
    folder = Folder(drawn(tmp_path / "model", SIZES))
    found = {name: (shape, read()) for name, shape, read in tensors(folder)}
    assert len(found) == 3 + 2 * 10 and all(bits.shape == shape for shape, bits in found.values())
    second = Checkpoint(tmp_path / "model").expert(1, 3).up
    assert (found["blk.1.ffn_up_exps.weight"][1][3] == second.view(torch.uint16).numpy()).all()
    rows = torch.arange(12).view(12, 1).numpy()
    # two heads of six rows: halves that turn together become neighbours
    assert paired(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert paired(rows, 0) is rows


def test_what_a_trace_says_for_the_effects() -> None:
    found = replayed(made_up(tokens=20, depth=3, n_layers=4, size=(64, 16)))
    assert found["mix"] <= min(found["single"].values()) and set(found["lfu"]) == {"sequence", "model"}
    nats = {"exact": 2.0, "mixed": 2.01, "skip 0.6": 2.3, "skip 0.3": 2.7, "int4 0.6": 2.1, "int2 0.6": 2.2}
    run = {"offload": {**found, "nats": nats}}
    numbers = [effect.id for effect in EFFECTS]
    assert len(set(numbers)) == len(numbers) and {arm for e in EFFECTS for arm in e.arms} == set(STUDY.arms)
    value = {effect.id: effect.value(*[run] * len(effect.arms)) for effect in EFFECTS}
    assert value["M3"] <= 1 and value["M1"] == found["chosen"][0] - found["chosen"][1] and value["B1"] == 1
    assert [value[f"H{i}"] for i in (5, 6, 7)] == pytest.approx([0.2, 0.1, 0.4])
    assert value["M8"] == pytest.approx(math.exp(0.01))


@pytest.mark.slow
def test_the_study_runs_and_answers_for_every_effect(tmp_path: Path) -> None:
    quick = replace(STUDY, common={**STUDY.common, "model.d_model": 32, "train.batch_size": 4}, budget=2e10).quick()
    work = Work(replace(quick, seeds=(0,)), tmp_path / "study", tmp_path)
    work.train(workers=1, board=Board(Console(quiet=True)))
    runs = {0: {job.arm: job.summary for job in work.jobs}}
    assert all(len(effect.row("pages", runs)["values"]) == 1 for effect in EFFECTS)
