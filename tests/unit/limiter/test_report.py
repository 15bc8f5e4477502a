"""What is said of a limit: the burst that it allows is not held against it."""

from __future__ import annotations

import pytest

from pybpfthrottle.meter import Reading
from pybpfthrottle.model import Counters, Direction, Rate, Verdict

LIMIT = Rate(10_000)


@pytest.mark.parametrize(
    ("actual", "spare", "verdict"),
    [
        (0, 0, Verdict.IDLE),
        (0, 65536, Verdict.IDLE),
        (9_700, 0, Verdict.THROTTLED),
        (40_300, 65536, Verdict.THROTTLED),
        (40_300, 31_000, Verdict.THROTTLED),
        (43_000, 31_000, Verdict.OVER_LIMIT),
        (40_300, 0, Verdict.NOT_WORKING),
        (100_000, 65536, Verdict.NOT_WORKING),
    ],
)
def test_the_burst_is_allowed(actual: float, spare: float, verdict: Verdict) -> None:
    """What it may have added in the time is taken off before judging."""
    reading = Reading(Direction.DOWNLOAD, LIMIT, actual, Counters(), spare)
    assert reading.verdict is verdict


def test_without_a_limit_there_is_no_verdict() -> None:
    """It was lifted."""
    reading = Reading(Direction.DOWNLOAD, None, 1e6, Counters())
    assert reading.verdict is None
    assert reading.line() == "download: actual=976.6 KB/s, no limit"
