"""What a run shows: the bar, plain lines, TensorBoard."""

import io
import sys

import pytest
import torch
from rich.console import Console

from moestro.train import Bar, Lines, Silent, describe_machine, display_on, train
from moestro.train.environment import version
from moestro.train.hardware import known_peak, peak_flops
from moestro.train.metrics import scalars
from moestro.train.progress import Remaining, duration, short
from tests.train.tiny import Counting, tiny_model, tiny_settings

LINE = {
    "step": 7,
    "loss": 2.5,
    "bpb": 1.25,
    "active_params": 1_234_567,
    "time": {"tokens_per_s": 45_600.0, "mfu": 0.421},
}
EVALUATION = {"step": 8, "eval": {"loss": 2.0, "bpb": 1.0, "perplexity": 7.389, "tokens": 5000, "bytes": 9000}}


def test_plain_lines_are_throttled_but_evaluations_and_the_end_are_shown():
    stream = io.StringIO()
    with Lines(stream, title="moe", seconds=1000) as lines:
        lines.show(LINE, 0.1)
        lines.show({**LINE, "step": 8}, 0.2)
        lines.show(EVALUATION, 0.2)
        lines.show({**LINE, "step": 9}, 1.0)
    shown = stream.getvalue().splitlines()
    assert [line.split("  ")[1] for line in shown] == ["step 7", "step 8", "step 9"]
    assert shown[0] == "moe  step 7   10%  loss 2.500  1.250 bpb  45.6k tok/s  1.23M active  MFU 42.1%  -:-- left"
    assert shown[1] == "moe  step 8  held out: loss 2.0000  1.0000 bpb  perplexity 7.39  (5k tokens)"


def test_the_bar_shows_the_same_figures():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=160, color_system=None)
    with Bar("moe", console) as bar:
        bar.show(LINE, 0.5)
        bar.show(EVALUATION, 0.5)
    shown = stream.getvalue()
    assert "loss 2.500  1.250 bpb  45.6k tok/s  1.23M active  MFU 42.1%" in shown
    assert " 50%" in shown
    assert "step 8  held out: loss 2.0000" in shown


def test_the_display_fits_the_stream():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert isinstance(display_on(Terminal()), Bar)
    assert isinstance(display_on(io.StringIO()), Lines)


def test_without_a_known_peak_there_is_no_mfu():
    stream = io.StringIO()
    Lines(stream).show({**LINE, "time": {"tokens_per_s": 10.0}}, 0.1)
    assert "MFU" not in stream.getvalue()


def test_remaining_time_counts_from_where_this_process_began():
    clock = iter([0.0, 10.0, 20.0])
    remaining = Remaining(lambda: next(clock))
    assert [remaining(share) for share in (0.5, 0.6, 1.0)] == ["-:-- left", "0:40 left", "0:00 left"]


def test_short_numbers_and_durations():
    assert [short(n) for n in (7, 999.4, 1234, 5.6e6, 7.89e9, 1e12)] == ["7", "999", "1.23k", "5.6M", "7.89G", "1T"]
    assert [short(n) for n in (999.6, 999_600, 999_499)] == ["1k", "1M", "999k"]
    assert [duration(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]


def test_a_run_on_a_terminal_and_in_silence_is_the_same(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True)
    shown = train(tiny_model(), Counting(), tiny_settings(3), [], [], tmp_path / "a", Bar("x", console))
    silent = train(tiny_model(), Counting(), tiny_settings(3), [], [], tmp_path / "b", Silent())
    assert shown["eval"] == silent["eval"]


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny_model(), Counting(), tiny_settings(4, tensorboard=True), [], [], tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "bpb", "lr", "grad_norm", "time/tokens_per_s", "eval/bpb"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_without_tensorboard_it_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(tiny_model(), Counting(), tiny_settings(4, tensorboard=True), [], [], tmp_path, Lines(sys.stdout))
    assert capsys.readouterr().out.count("pip install 'moestro[tensorboard]'") == 1


def test_scalars_are_flattened():
    assert scalars({"step": 3, "loss": 1.0, "time": {"mfu": 0.5}}) == [("loss", 1.0), ("time/mfu", 0.5)]


def test_peaks_are_found_by_the_devices_name():
    assert known_peak("NVIDIA H200") == 989e12
    assert known_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert known_peak("Some other accelerator") is None
    assert peak_flops(torch.device("cpu"), "bf16") is None


def test_the_machine_is_described():
    machine = describe_machine(torch.device("cpu"))
    assert machine["packages"]["torch"] == torch.__version__
    assert (machine["device"], machine["threads"]) == ("cpu", torch.get_num_threads())
    assert version("no-such-package") is None
