"""Reports: sizes counted independently, perplexity as a loop over windows has it, what cards and pages say."""

import json
import math

import pytest
import torch

from moestro.cli import main
from moestro.compress import LayerPlan, report
from moestro.compress.applying import apply_plan
from moestro.compress.feasible import Output
from moestro.compress.measuring import Question, held_out, loss_of
from moestro.compress.report import BEGIN, SPEED, figures, reported, sizes, warnings, write_report
from tests.compress.folders import GROUPED, loaded, plan_for, saved, some_of
from tests.data.tokenizer_files import metaspace


def folder(tmp_path, family="mixtral"):
    model = saved(family, tmp_path / "src", vocab_size=400)
    metaspace(tmp_path / "src")
    (tmp_path / "text.txt").write_text("Experts of different widths share a layer. " * 30)
    return model


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe", "gpt_oss"])
@pytest.mark.parametrize("custom", [False, True])
def test_parameters_are_counted_as_the_model_has_them(tmp_path, family, custom):
    folder(tmp_path, family)
    semantics = "zero" if custom else "slice"
    plan = plan_for(tmp_path / "src", some_of(family), semantics=semantics)
    apply_plan(tmp_path / "src", plan, tmp_path / "dst", Output("custom" if custom else "stock"))
    model = loaded(tmp_path / "dst", trust=custom)
    names = dict(model.named_parameters())
    if family in GROUPED:
        names |= {k: v for k, v in model.named_buffers() if "correction" in k}
    experts = sum(tensor.numel() for name, tensor in names.items() if ".experts." in name)
    total = sum(tensor.numel() for tensor in names.values())
    found = sizes(tmp_path / "dst", plan)["parameters"]
    assert found["total"] == total and found["experts"] == experts
    assert found["active"] == round(total - experts + experts * 2 / len(some_of(family)))
    assert sizes(tmp_path / "src")["parameters"]["active"] == found["active"] + (0 if custom else _rows(tmp_path))


def _rows(tmp_path):
    """Router rows that went."""
    from moestro.formats import Checkpoint

    counts = []
    for name in ("src", "dst"):
        checkpoint = Checkpoint(tmp_path / name)
        shapes = [
            checkpoint.shape(t) for layer in checkpoint.moe_layers for t in checkpoint.router_tensors(layer).values()
        ]
        counts.append(sum(math.prod(shape) for shape in shapes))
    return counts[0] - counts[1]


def test_perplexity_is_that_of_windows_read_one_by_one(tmp_path):
    model = folder(tmp_path)
    question = Question(str(tmp_path / "text.txt"), 400, 16)
    batches = held_out(tmp_path / "src", question)
    with torch.no_grad():
        found = loss_of(model, batches, "cpu")
    nats, count = 0.0, 0
    for batch in batches:
        for window, targets in zip(batch.tokens, batch.targets, strict=True):
            with torch.no_grad():
                logs = model(window[None]).logits[0].double().log_softmax(-1)
            for place, target in enumerate(targets.tolist()):
                if target >= 0:
                    nats -= float(logs[place, target])
                    count += 1
    assert found["tokens"] == count > 200 and found["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-6)


def test_experts_that_calibration_hardly_saw_are_named(tmp_path):
    folder(tmp_path)
    plan = plan_for(tmp_path / "src", range(6))
    seen = LayerPlan(0, 8, tuple(range(6)), rows=(500, 3, 500, 500, 500, 0, 500, 500))
    plan = type(plan)(plan.method, plan.ratio, plan.source, (seen, plan.layers[1]))
    assert warnings(plan) == [
        "layer 0: 2 of 8 experts computed fewer than 100 rows of the calibration text (1, 5): their scores say little"
    ]


def test_the_card_keeps_what_stood_in_it_and_has_one_section(tmp_path):
    folder(tmp_path)
    (tmp_path / "src" / "README.md").write_text("# A model\n\nIts own words.\n")
    apply_plan(tmp_path / "src", plan_for(tmp_path / "src", range(6)), tmp_path / "dst")
    found = reported(tmp_path / "src", tmp_path / "dst", None)
    for _ in range(2):
        write_report(found, tmp_path / "dst")
    card = (tmp_path / "dst" / "README.md").read_text()
    assert card.startswith("# A model\n\nIts own words.") and card.count(BEGIN) == 1 and SPEED in card
    assert "- layer 0: 6 of 8: 0, 1, 2, 3, 4, 5" in card and "perplexity" not in card
    assert [row[0] for row in figures(found)] == ["parameters", "of experts", "active for a token", "bytes on disk"]
    assert json.loads((tmp_path / "dst" / "report.json").read_text()) == found


def test_what_was_measured_stays_in_a_report_that_is_made_again_without_measuring(tmp_path, monkeypatch):
    folder(tmp_path)
    apply_plan(tmp_path / "src", plan_for(tmp_path / "src", range(6)), tmp_path / "dst")
    measured = {"perplexity": 3.0, "peak_device_bytes": None, "peak_host_bytes": 2**20}
    monkeypatch.setattr(report, "measured", lambda folder, question, reader=None: dict(measured))
    first = reported(tmp_path / "src", tmp_path / "dst", Question("text.txt"))
    write_report(first, tmp_path / "dst")
    assert first["after"]["perplexity"] == 3.0
    assert reported(tmp_path / "src", tmp_path / "dst", None) == first


def test_decoding_is_said_to_be_unchanged_only_where_a_token_needs_the_same_arithmetic(tmp_path):
    folder(tmp_path)
    for name, keywords, unchanged in (
        ("dropped", {}, True),
        ("narrow", {"units": (tuple(range(9)),) * 6}, False),
        ("thin", {"ranks": (4,) * 6}, False),
        ("skipping", {"skip_below": 0.2}, False),
    ):
        plan = plan_for(tmp_path / "src", range(6), **keywords)
        apply_plan(tmp_path / "src", plan, tmp_path / name, Output("custom"))
        found = reported(tmp_path / "src", tmp_path / name, None)
        assert (found["decode_speed"] == SPEED) is unchanged, name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stock", "custom"])
def test_the_command_measures_both_and_writes_a_page(tmp_path, capsys, layout):
    folder(tmp_path)
    text = str(tmp_path / "text.txt")
    words = ["compress", str(tmp_path / "src"), str(tmp_path / "dst"), "--method", "reap", "--ratio", "0.25"]
    words += ["--calib", text, "--eval", text, "--seq-len", "32", "--eval-tokens", "300", "--device", "cpu"]
    (tmp_path / "eval").mkdir()
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "src" / "tokenizer_config.json").write_text(json.dumps(names))
    row = {"context": "Experts of different", "choices": ["widths", "sizes"], "gold": 0}
    (tmp_path / "eval" / "piqa.jsonl").write_text(3 * (json.dumps(row) + "\n"))
    words += ["--tasks", "piqa", "--data", str(tmp_path), "--limit", "2"]
    assert main([*words, "--format", layout]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "dst" / "report.json").read_text())
    for side in ("before", "after"):
        assert found[side]["perplexity"] > 1 and found[side]["decode_tokens_per_s"] > 0
        assert found[side]["peak_host_bytes"] > 1e7 and found[side]["seq_len"] == found[side]["stride"] == 32
        assert found[side]["tasks"]["tasks"]["piqa"]["n"] == 2
        assert "no tensor missing" in found[side]["load_check"]
    assert found["before"]["tokens"] == found["after"]["tokens"] >= 250
    assert "decode, tokens/s" in out and "warning: layer 0" in out
    assert "piqa, acc " in out
    page = (tmp_path / "dst" / "report.html").read_text()
    assert (
        "Before and after" in page
        and "reap" in page
        and "windows of 32" in (tmp_path / "dst" / "README.md").read_text()
    )
