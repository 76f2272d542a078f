"""How many experts each layer gives up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moestro.compress.budget import removed_counts, share_of, uniform_counts
from moestro.compress.calibration import Ask, calibrate
from moestro.compress.feasible import Limits
from moestro.compress.merging import Settings, merge_plans
from moestro.compress.pruning import Subject, uniform
from tests.compress.models import E, decoder, text

IMPORTANCE = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=8)


@given(IMPORTANCE, st.data())
def test_counts_sum_to_the_total_and_stay_below_their_ends(importance, data):
    most = data.draw(st.lists(st.integers(0, 12), min_size=len(importance), max_size=len(importance)))
    total = data.draw(st.integers(0, sum(most)))
    counts = removed_counts(importance, most, total)
    assert sum(counts) == total
    assert all(0 <= count <= cap for count, cap in zip(counts, most, strict=True))


@given(IMPORTANCE, st.data())
def test_a_layer_that_becomes_more_important_never_gives_up_more(importance, data):
    most = [data.draw(st.integers(1, 12))] * len(importance)
    total = data.draw(st.integers(0, sum(most)))
    place = data.draw(st.integers(0, len(importance) - 1))
    raised = [*importance]
    raised[place] = raised[place] * data.draw(st.floats(1, 100)) + data.draw(st.floats(0, 10))
    before, after = (removed_counts(values, most, total) for values in (importance, raised))
    assert after[place] <= before[place]


def test_more_important_layers_give_up_fewer_in_proportion_to_the_inverse():
    assert removed_counts([1, 2, 4], [8, 8, 8], 7) == [4, 2, 1]
    assert removed_counts([1, 1, 1], [8, 8, 8], 7) == [3, 2, 2]
    assert removed_counts([1, 2, 4], [8, 8, 8], 9, temperature=1e9) == [3, 3, 3]
    # a temperature at which all but the first count nothing, until the first has given all
    assert removed_counts([1, 1e5, 1e6], [2, 2, 2], 3, temperature=0.01) == [2, 1, 0]
    # what the first cannot give goes to the others by their shares
    assert removed_counts([0, 1, 2], [2, 8, 8], 8) == [2, 4, 2]


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match="0 to 4"):
        removed_counts([1, 1], [2, 2], 5)
    with pytest.raises(ValueError, match="at least 0"):
        removed_counts([-1, 1], [2, 2], 1)
    assert uniform_counts([6, 6], 2) == [2, 2]
    with pytest.raises(ValueError, match="0 to 1"):
        uniform_counts([6, 1], 2)


def test_a_ratio_means_the_same_number_wherever_it_is_asked():
    """Halves up, for the check before calibration as for methods: 2.5 of 10 are 3."""
    assert [share_of(0.25, n) for n in (8, 10, 14)] == [2, 3, 4]
    assert Limits(2).n_kept(10, 0.25) == 7
    model = decoder("m")
    given = Subject(model, calibrate(model, text(1), Ask()))
    assert uniform(given, 0.25) == {"blocks.0.ffn": 2} and E == 6
    assert len(merge_plans(given, Settings(0.25))[0].keep) == 4
