"""Recorded traces: what is written is read, what is damaged is refused or read as far as it is whole."""

import json
from pathlib import Path

import pytest
import torch

from moestro.offload.trace import Header, Recorder, TraceError, read_trace
from tests.offload.traces import made_up


def record(path: Path, steps: int | None = None) -> Recorder:
    trace = made_up(tokens=5)
    recorder = Recorder(path, trace.header)
    for part in trace.sequences():
        recorder.start_sequence()
        for step in part[:steps]:
            recorder.step(step.layer, step.ids, step.weights, step.ahead)
    return recorder


def test_a_trace_is_read_as_written(tmp_path: Path) -> None:
    record(tmp_path / "t.jsonl").close()
    want, have = made_up(tokens=5), read_trace(tmp_path / "t.jsonl")
    assert have.complete and have.header == want.header and have.header.ratio == 0.25
    assert [s.sequence for s in have.steps] == [s.sequence for s in want.steps]
    for a, b in zip(have.steps, want.steps, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.allclose(a.weights, b.weights) and len(a.ahead) == len(b.ahead)
    assert len(list(have.sequences())) == 2


def test_a_cut_trace_is_read_as_far_as_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    record(path).close()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in (len(whole) - 1, len(whole) - len(lines[-1]), len(whole) - len(lines[-1]) - 7):
        path.write_bytes(whole[:cut])
        found = read_trace(path)
        assert not found.complete and len(found.steps) in (29, 30)
    path.write_bytes(whole[:10])
    with pytest.raises(TraceError, match="no line that is whole"):
        read_trace(path)


def test_damage_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    record(path).close()
    lines = path.read_text().splitlines()
    step = json.loads(lines[3])
    broken = {
        "not JSON": "{",
        "KeyError": json.dumps({k: v for k, v in step.items() if k != "w"}),
        "do not fit 8 experts": json.dumps({**step, "i": [[8, 0]]}),
        "no whole number": json.dumps({**step, "i": [[0.5, 1]]}),
        "do not fit": json.dumps({**step, "a": [[step["i"] * 2, step["w"] * 2]]}),
        "layer 7": json.dumps({**step, "l": 7}),
        "not finite": json.dumps({**step, "w": [[float("nan"), 1.0]]}),
        "not a JSON object": "3",
    }
    for message, line in broken.items():
        path.write_text("\n".join([*lines[:3], line, *lines[4:]]) + "\n")
        with pytest.raises(TraceError, match=f"line 4: .*{message}"):
            read_trace(path)
    header = json.loads(lines[0])
    for sizes in ("abc", [["a"] * 8] * 3, [[8.5] * 8] * 3, [[0] * 8] * 3, [8, 8, 8]):
        path.write_text("\n".join([json.dumps({**header, "high": sizes}), *lines[1:]]) + "\n")
        with pytest.raises(TraceError, match="line 1"):
            read_trace(path)
    for text, message in {"{}\n": "not a trace of format", lines[0][:-1] + ',"x":1}\n': "line 1"}.items():
        path.write_text(text)
        with pytest.raises(TraceError, match=message):
            read_trace(path)
    path.write_text("\n".join([*lines, lines[3]]) + "\n")
    with pytest.raises(TraceError, match="ended before"):
        read_trace(path)
    path.write_text("\n".join([*lines[:5], lines[-1]]) + "\n")
    with pytest.raises(TraceError, match="4 steps, its last line says 30"):
        read_trace(path)


def test_a_full_disk_ends_the_recording_at_its_last_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    recorder = record(path, steps=2)
    written = path.read_bytes()

    class Full:
        def write(self, text: bytes) -> None:
            with path.open("ab") as file:
                file.write(text[:5])
            raise OSError(28, "No space left on device")

        def flush(self) -> None: ...

    monkeypatch.setattr(recorder, "_file", Full())
    for _ in range(2):
        recorder.step(0, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))
    recorder.close()
    assert recorder.error is not None and "No space left" in str(recorder.error)
    assert path.read_bytes() == written and not read_trace(path).complete


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_a_device_that_is_full() -> None:
    recorder = Recorder(Path("/dev/full"), Header("", [[1]], [[1]], 1))
    recorder.close()
    assert recorder.error is not None and "No space left" in str(recorder.error)
