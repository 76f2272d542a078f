"""Who won: means, spread, the rule, and the sentence that says so."""

import math

import pytest

from moestro.compare.verdict import cells, compute_spread, headline, judge, main_verdict, student_factor, winner


def results(bpb, seeds=(0, 1, 2), **changes):
    """Results with one size and one budget from {arm: [bpb of every seed, None for a failed run]}."""
    runs = [
        {
            "arm": arm,
            "size": "d64",
            "budget": 1e12,
            "seed": seed,
            "final": {"bpb": value},
            "status": "done",
            "flops": 1e12,
        }
        if value is not None
        else {"arm": arm, "size": "d64", "budget": 1e12, "seed": seed, "status": "failed", "error": "boom"}
        for arm, values in bpb.items()
        for seed, value in zip(seeds, values, strict=False)
    ]
    made = {
        "format": 1,
        "arms": {arm: {"title": arm.upper()} for arm in bpb},
        "sizes": [{"name": "d64"}],
        "budgets": [1e12],
        "seeds": list(seeds),
        "runs": runs,
        "reference": "a",
    }
    return made | changes


@pytest.mark.parametrize(
    ("freedom", "factor"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (10, 2.2281), (30, 2.0423), (1000, 1.9623)],
)
def test_student_factor(freedom, factor):
    assert student_factor(freedom) == pytest.approx(factor, rel=2e-4)


def test_student_factor_between_whole_numbers():
    # From the regularised incomplete beta function in mpmath: 1 - I(1.5 / (1.5 + t^2); 0.75, 0.5) = 0.95.
    assert student_factor(1.5) == pytest.approx(6.016663, rel=2e-4)
    assert student_factor(2) < student_factor(1.5) < student_factor(1)


def test_standard_error_and_threshold_by_hand():
    verdict = main_verdict(results({"a": [2.00, 2.02, 2.04], "b": [1.90, 1.92, 1.94]}))
    (found,) = verdict.comparisons
    assert (found.best.arm, found.other.arm) == ("b", "a")
    assert found.difference == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(math.sqrt(2 * 0.02**2 / 3))
    assert found.needed == pytest.approx(2.776, abs=1e-3)
    assert found.separable is True
    assert verdict.kind == "won"


def test_won_sentence():
    data = results({"a": [2.00, 2.02, 2.04], "b": [1.90, 1.92, 1.94], "c": [2.2, 2.2, 2.2]})
    sentence = headline(data, main_verdict(data)).replace("\u00a0", " ")
    assert sentence == (
        "B won at equal compute: 0.100 bits per byte (5 %) below A, the runner-up, "
        "against a spread of ± 0.020 over 3 seeds."
    )


def test_within_the_spread_nobody_wins():
    data = results({"a": [2.00, 2.02, 2.04], "b": [1.99, 2.01, 2.03], "c": [2.5, 2.52, 2.54]})
    sentence = headline(data, main_verdict(data))
    assert main_verdict(data).kind == "tied"
    assert sentence.startswith("No single winner: B and A are not separable from seed noise at equal compute")
    assert "won" not in sentence and "C" not in sentence


def test_winning_needs_a_gap_to_every_arm_not_only_to_the_second():
    # c lies higher than b on average, but its spread reaches a.
    data = results({"a": [1.900, 1.901, 1.902], "b": [1.950, 1.951, 1.952], "c": [1.7, 2.0, 2.3]})
    verdict = main_verdict(data)
    assert [cell.arm for cell in verdict.ranked] == ["a", "b", "c"]
    assert verdict.comparisons[0].separable and not verdict.comparisons[1].separable
    assert "A and C are not separable" in headline(data, verdict)


def test_two_seeds_ask_for_more_than_two_standard_errors():
    data = results({"a": [2.00, 2.02], "b": [1.95, 1.97]}, seeds=(0, 1))
    (found,) = main_verdict(data).comparisons
    assert found.standard_error is not None and found.difference > 2 * found.standard_error
    assert found.separable is False


def test_one_seed_has_no_spread():
    data = results({"a": [2.0], "b": [1.9]}, seeds=(0,))
    verdict = main_verdict(data)
    assert verdict.kind == "unknown"
    assert headline(data, verdict).endswith("but with one seed no spread is known: it may be noise.")


def test_one_arm_with_one_surviving_seed_is_named():
    data = results({"a": [2.0, 2.01, 2.02], "b": [1.5, None, None]})
    assert "with one seed of B no spread is known" in headline(data, main_verdict(data))


@pytest.mark.parametrize("lost", [None, float("nan"), float("inf")])
def test_lost_runs_are_left_out_of_the_mean(lost):
    data = results({"a": [2.0, 2.02, lost], "b": [2.5, 2.5, 2.6]})
    cell = main_verdict(data).ranked[0]
    assert cell.mean == pytest.approx(2.01) and len(cell.runs) == 2 and len(cell.unfinished) == 1


def test_nothing_finished_and_one_arm_finished():
    data = results({"a": [None, None, None]})
    assert headline(data, main_verdict(data)).startswith("No run has finished")
    assert winner(data) is None
    data = results({"a": [2.0, 2.1, 2.2], "b": [None, None, None]})
    assert headline(data, main_verdict(data)).startswith("Only A has finished runs")


def test_identical_seeds_are_separable_only_if_they_differ():
    assert main_verdict(results({"a": [2.0] * 3, "b": [1.9] * 3})).kind == "won"
    assert main_verdict(results({"a": [2.0] * 3, "b": [2.0] * 3})).kind == "tied"


def test_unequal_compute_is_said():
    data = results({"a": [2.00, 2.02, 2.04], "b": [1.90, 1.92, 1.94]})
    data["runs"][0]["flops"] = 1.3e12
    assert compute_spread(main_verdict(data)) == pytest.approx(0.3)
    sentence = headline(data, main_verdict(data)).replace("\u00a0", " ")
    assert "at compute that is equal only within 30 %" in sentence and "at equal compute" not in sentence


def test_every_arm_stands_at_its_best_size(make_results):
    data = make_results(4, (8e11, 3.2e12), 3)
    verdict = main_verdict(data)
    assert verdict.budget == 3.2e12
    for cell in verdict.ranked:
        means = [c.mean for c in cells(data) if (c.arm, c.budget) == (cell.arm, 3.2e12)]
        assert len(means) == 4 and cell.mean == min(means)
    assert data["winner"]["arm"] == verdict.ranked[0].arm == "hmoe"
    assert data["winner"]["verdict"] == "won" and data["winner"]["bpb_mean"] == verdict.ranked[0].mean


def test_the_headline_budget_is_the_largest_with_most_arms(make_results):
    data = make_results(1, (8e11, 3.2e12), 2)
    for run in data["runs"]:
        if run["budget"] == 3.2e12 and run["arm"] == "peer":
            run["final"] = None
    assert main_verdict(data).budget == 8e11
    assert [cell.arm for cell in judge(data, 3.2e12).ranked].count("peer") == 0


def test_sizes_of_one_budget_are_not_asked_of_another(make_results):
    data = make_results(2, (8e11, 3.2e12), 1)
    data["runs"] = [run for run in data["runs"] if (run["size"] == "d64") == (run["budget"] == 8e11)]
    assert {(cell.budget, cell.size) for cell in cells(data)} == {(8e11, "d64"), (3.2e12, "d96")}


def test_malformed_results_are_refused():
    good = results({"a": [2.0]}, seeds=(0,))
    with pytest.raises(ValueError, match="format version 2, written by a newer moestro"):
        cells(good | {"format": 2})
    with pytest.raises(ValueError, match=r"unknown arms \['x'\]; arms: \['a'\]"):
        cells(good | {"runs": [good["runs"][0] | {"arm": "x"}]})
    with pytest.raises(ValueError, match=r"unknown sizes \['huge'\]; sizes: \['d64'\]"):
        cells(good | {"runs": [good["runs"][0] | {"size": "huge"}]})
