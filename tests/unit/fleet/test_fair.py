"""Max-min fairness, whatever is wanted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybpfthrottle.fleet import fair

TOTALS = st.integers(0, 10**12)
DEMANDS = st.lists(st.integers(0, 10**12), min_size=1, max_size=20)


@given(TOTALS, DEMANDS)
def test_the_whole_is_given_away_and_no_more(total, demands):
    """But for what cannot be divided."""
    found = fair.parts(total, demands)
    assert total - len(demands) < sum(found) <= total
    assert min(found) >= 0


@given(TOTALS, DEMANDS)
def test_nobody_has_more_than_one_who_wants_more(total, demands):
    """That is what max-min fair means; rounding is one byte per second."""
    found = fair.parts(total, demands)
    wanting = [part for part, demand in zip(found, demands) if part < demand]
    assert not wanting or max(found) <= min(wanting) + 1


@given(TOTALS, DEMANDS)
def test_if_there_is_enough_for_all_everybody_gets_it(total, demands):
    """And an equal part of what is left."""
    if sum(demands) <= total:
        found = fair.parts(total, demands)
        left = {part - demand for part, demand in zip(found, demands)}
        assert len(left) == 1
        assert left.pop() >= 0


@given(TOTALS, DEMANDS, st.integers(0, 10**12))
def test_wanting_more_gets_no_less(total, demands, more):
    """So nobody gains by wanting less than it needs."""
    before = fair.parts(total, demands)[0]
    demand = demands[0] + more
    after = fair.parts(total, [demand, *demands[1:]])[0]
    assert after >= min(before, demands[0]) - len(demands)


@pytest.mark.parametrize(
    ("demands", "expected"),
    [([100, 10, 100], [45, 10, 45]), ([100], [100]), ([0, 0], [50, 50]), ([20, 20], [50, 50])],
)
def test_some_parts_of_a_hundred(demands, expected):
    """Of a total of 100."""
    assert fair.parts(100, demands) == expected


@pytest.mark.parametrize(
    ("moved", "expected"), [(0, 0), (40, 50), (89, 111), (90, 1000), (120, 1000)]
)
def test_who_is_held_back_wants_all(moved, expected):
    """With a part of 100 of 1000; who is not wants a little more than it moves."""
    assert fair.demand(moved, 100, 1000) == expected


@given(st.integers(1, 10**9))
def test_who_moves_what_it_wants_stays_content(moved):
    """A part that is exactly what is wanted does not look like being held back."""
    total = 10**12
    wanted = fair.demand(moved, total, total)
    assert fair.demand(moved, wanted, total) <= wanted or moved < 10
