"""The table of arms, on the terminal and as rows; numbers as text."""

import io

import pytest
from rich.console import Console

from moestro.compare import numerals
from moestro.compare.table import arm_rows, column_titles, comparison_table
from moestro.compare.verdict import headline, main_verdict


def printed(results, width):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(comparison_table(results))
    return out.getvalue()


def test_fits_eighty_columns_without_losing_a_number(make_results):
    data = make_results(1, (3.2e12,), 3)
    text = printed(data, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for row in arm_rows(data):
        assert row.texts["bpb"] in text and row.texts["active"] in text and row.texts["speed"] in text
    assert "HMoE won at equal compute" in text.replace("\n", " ")


def test_several_sizes_fit_too_and_the_verdict_is_whole(make_results):
    data = make_results(3, (3.2e12,), 3)
    text = printed(data, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(row.texts["speed"] in text for row in arm_rows(data))
    assert " ".join(headline(data, main_verdict(data)).split()) in " ".join(text.split())


def test_sizes_and_budgets_are_columns_only_where_there_are_several(make_results):
    assert not {"size", "budget"} & set(column_titles(make_results(1, (3.2e12,), 1)))
    many = make_results(3, (8e11, 3.2e12), 1)
    assert {"size", "budget"} <= set(column_titles(many))
    assert len(arm_rows(many)) == 3 * 2 * 4
    assert "3.2e12" in printed(many, 140) and "d128" in printed(many, 140)


def test_gap_is_to_the_reference_at_the_same_size_and_budget(make_results):
    rows = arm_rows(make_results(2, (8e11, 3.2e12), 2))
    for row in rows:
        reference = next(
            r.cell
            for r in rows
            if (r.cell.budget, r.cell.size) == (row.cell.budget, row.cell.size) and r.cell.arm == "dense"
        )
        if row.cell.arm == "dense":
            assert row.texts["gap"] == "–"
        else:
            assert row.numbers["gap"] == pytest.approx(row.cell.mean - reference.mean)
            assert row.texts["gap"].startswith("−" if row.cell.mean < reference.mean else "+")


def test_exactly_one_row_of_a_group_is_lowest(make_results):
    rows = arm_rows(make_results(2, (8e11, 3.2e12), 2))
    lowest = [(row.cell.budget, row.cell.size) for row in rows if row.lowest]
    assert len(lowest) == len(set(lowest)) == 4


def test_flops_per_token_are_training_flops(make_results):
    data = make_results(1, (3.2e12,), 2)
    row = next(row for row in arm_rows(data) if row.cell.arm == "hmoe")
    runs = [run for run in data["runs"] if run["arm"] == "hmoe"]
    tokens = sum(run["tokens"] for run in runs)
    assert row.numbers["useful"] == pytest.approx(sum(run["flops"] for run in runs) / tokens)
    assert row.numbers["computed"] == pytest.approx(sum(run["flops_computed"] for run in runs) / tokens)


def test_failed_and_missing_runs_are_shown(make_results, summarise):
    data = make_results(1, (3.2e12,), 3)
    data["runs"] = [run for run in data["runs"] if run["arm"] != "moe"]
    for run in data["runs"]:
        if run["arm"] == "peer":
            del run["final"]
            run |= {"status": "failed", "error": "out of memory"}
        if run["arm"] == "hmoe" and run["seed"] == 2:
            run["final"]["bpb"] = float("nan")
    summarise(data)
    seeds = {row.cell.arm: row.texts["seeds"] for row in arm_rows(data)}
    assert seeds == {"dense": "3 of 3", "moe": "not run", "hmoe": "2 of 3, 1 diverged", "peer": "0 of 3, 3 failed"}
    text = printed(data, 120)
    assert "not run" in text and "3 failed" in text and "1 diverged" in text


def test_titles_are_not_markup(make_results):
    data = make_results(1, (3.2e12,), 1)
    data["arms"]["hmoe"]["title"] = "[bold]H[/nothing]"
    assert "[bold]H[/nothing]" in printed(data, 140)


def test_without_a_reference_there_is_no_gap(make_results):
    data = make_results(1, (3.2e12,), 1) | {"reference": None}
    assert "gap" not in column_titles(data)
    assert "vs" not in printed(data, 100)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (0, "0"), (7, "7"), (999.6, "1k"), (1234, "1.23k"), (1_230_000, "1.23M")]
    + [(999_999, "1M"), (4.172e8, "417M"), (1.5e9, "1.5B"), (2e12, "2T"), (True, "–")],
)
def test_si(value, text):
    assert numerals.si(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(4.5e12, "4.5e12"), (1e12, "1e12"), (9.999e11, "1e12"), (1234.0, "1230"), (123456, "1.23e5"), (None, "–")],
)
def test_scientific(value, text):
    assert numerals.scientific(value) == text


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (1.9123, 0.0041, "1.912 ± 0.004"),
        (1.9123, 0.00131, "1.9123 ± 0.0013"),
        (2.0, None, "2.000"),
        (2.0, 0.0, "2.000 ± 0.000"),
    ]
    + [(1.9, 0.25, "1.900 ± 0.250"), (None, None, "–"), (2.0, 3e-8, "2.00000 ± 0.00000")],
)
def test_mean_and_spread(mean, spread, text):
    assert numerals.mean_and_spread(mean, spread).replace("\u00a0", " ") == text


def test_other_numerals():
    assert (
        numerals.signed(-0.0312) == "−0.031"
        and numerals.signed(0.0312) == "+0.031"
        and numerals.signed(-1e-9) == "0.000"
    )
    assert numerals.percent(0.0161).replace("\u00a0", " ") == "1.6 %"
    assert [numerals.duration(s) for s in (48.2, 200, 7500)] == ["48 s", "3 min 20 s", "2 h 05 min"]
    assert numerals.byte_size(11_065_582) == "11.1 MB"
