"""What is timed has to be right: results that are compared before."""

import pytest
import torch

from bench.harness import agree


def results(rows: int):
    want = torch.linspace(1, 2, rows * 3).view(rows, 3)
    return want.clone(), want


def test_results_beyond_the_tolerance_are_not_timed():
    have, want = results(100)
    agree("as it is", have, want, 1e-6)
    have[7] *= 1.1
    with pytest.raises(SystemExit, match="a row: relative error"):
        agree("a row", have, want, 1e-3)


def test_rows_where_scores_tie_are_left_out_and_no_others():
    have, want = results(100)
    have[7] *= -1
    agree("one row", have, want, 1e-6, ties=0.01)
    have[8] *= 1.1
    with pytest.raises(SystemExit, match="two rows"):
        agree("two rows", have, want, 1e-3, ties=0.01)


def test_what_is_no_number_is_no_tie():
    have, want = results(100)
    have[7, 1] = torch.nan
    with pytest.raises(SystemExit):
        agree("a row", have, want, 1e-3, ties=0.01)
