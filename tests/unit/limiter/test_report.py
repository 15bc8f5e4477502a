"""What is said of a limit: the burst that it allows is not held against it."""

from __future__ import annotations

import pytest

from pybpfthrottle.meter import Activity, Meter, Reading
from pybpfthrottle.model import BLOCKED, Counters, Direction, Rate, Verdict

LIMIT = Rate(10_000)


@pytest.mark.parametrize(
    ("actual", "spare", "verdict"),
    [
        (0, 0, Verdict.IDLE),
        (0, 65536, Verdict.IDLE),
        (9_700, 0, Verdict.THROTTLED),
        (11_000, 2_000, Verdict.THROTTLED),
        (28_300, 65536, Verdict.BURST),
        (40_300, 65536, Verdict.BURST),
        (40_300, 31_000, Verdict.BURST),
        (1_000, 0, Verdict.BELOW),
        (8_900, 65536, Verdict.BELOW),
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
    assert "dropped" not in reading.summary(1.0)
    before = Counters(packets_total=4, packets_dropped=1)
    lifted = Reading(Direction.DOWNLOAD, None, 1e6, before)
    assert lifted.summary(1.0).endswith(", 25.0% of packets dropped")


def test_what_is_blocked_has_no_ratio() -> None:
    """Nothing passes, or it is not blocked."""
    blocked = Reading(Direction.UPLOAD, BLOCKED, 0.0, Counters(), dropped=3)
    assert blocked.line() == "upload: actual=0 B/s, limit=blocked ⛔ BLOCKED"
    assert blocked.short() == "upload 0 B/s ⛔"
    record = blocked.record()
    assert (record["limit"], record["ratio"], record["verdict"]) == (0, None, "blocked")
    assert Reading(Direction.UPLOAD, BLOCKED, 1.0, Counters()).verdict is Verdict.NOT_WORKING


def test_what_was_held_back_is_not_below_the_limit() -> None:
    """A transfer that loses packets to the policer may stay far below its limit for some time."""
    reading = Reading(Direction.DOWNLOAD, LIMIT, 1_000, Counters(), 0, dropped=1)
    assert reading.verdict is Verdict.THROTTLED


def test_the_verdicts_read_as_words() -> None:
    """In the line, and by their names in JSON."""
    burst = Reading(Direction.DOWNLOAD, LIMIT, 28_300, Counters(), 65536)
    assert burst.line().endswith("ratio=2.83x within the burst")
    assert burst.record()["verdict"] == "burst"
    below = Reading(Direction.UPLOAD, LIMIT, 1_000, Counters())
    assert below.line().endswith("ratio=0.10x below the limit")
    assert below.record()["verdict"] == "below"


MB = Rate(1 << 20)


def ratio_of(samples: list[float], limit: Rate = MB, seconds: float = 1.0) -> float:
    """The ratio over samples of so many times the limit each."""
    activity = Activity()
    for share in samples:
        passed = round(share * seconds * limit.bytes_per_s)
        activity.add(seconds, passed, came=passed, limit=limit)
    return activity.total().rate / limit.bytes_per_s


@pytest.mark.parametrize(
    ("samples", "ratio"),
    [
        ([1, 1, 1, 1], 1.0),
        ([0, 0, 1, 1, 1, 1, 0, 0, 0, 0], 1.0),
        ([0.4, 1, 1, 1, 0.3, 0, 0], 1.0),
        ([1, 1, 1, 0, 0, 0, 0.5, 1, 1, 0.2], 1.0),
        ([0, 0.5, 0.5, 0.5, 0.5, 0], 0.5),
        ([0, 0.001, 1, 1, 1, 0.001, 0.001], 1.0),
        ([1.6, 1.6, 1.6], 1.6),
        ([0.7], 0.7),
        ([0, 0, 0], 0.0),
    ],
)
def test_the_last_ratio_leaves_idle_seconds_out(samples: list[float], ratio: float) -> None:
    """Neither a time without traffic nor the middle of a second makes it smaller."""
    assert ratio_of(samples) == pytest.approx(ratio, abs=0.01)


def test_pauses_that_the_limit_makes_are_no_idle_time() -> None:
    """At 1 KB/s the next packet comes after a minute."""
    assert ratio_of([20, *[0] * 19] * 5, Rate(1024)) < 1.4


def test_a_moment_at_the_end_does_not_make_a_rate() -> None:
    """A packet in the last millisecond is no 64 MB/s."""
    activity = Activity()
    activity.add(1.0, 1 << 20, came=1 << 20, limit=MB)
    activity.add(0.001, 65536, came=65536, limit=MB)
    assert activity.total().rate / (1 << 20) < 1.1


class Transfer:
    """A throttle whose download has a limit and moves when it is told."""

    def __init__(self) -> None:
        self.limits = {Direction.DOWNLOAD: MB}
        self.passed = 0

    def counters(self) -> dict[Direction, Counters]:
        """So many bytes, and nothing dropped."""
        return {Direction.DOWNLOAD: Counters(1, 1, self.passed)}

    def burst_bytes(self, direction: Direction) -> int:
        """As much as a quarter of a second."""
        return 1 << 18


def test_a_transfer_that_held_its_limit_ends_at_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after idle time, and with a stop between two samples; JSON tells how long it was."""
    now = [100.0]
    monkeypatch.setattr("pybpfthrottle.meter.time.monotonic", lambda: now[0])
    throttle = Transfer()
    meter = Meter(throttle)  # type: ignore[arg-type]
    for seconds, rate in ((1, 0), (1, 1), (1, 1), (7, 1), (1, 1), (1, 0), (1, 0), (1, 0)):
        now[0] += seconds
        throttle.passed += seconds * rate << 20
        [sampled] = meter.sample()
        assert sampled.ratio is not None
        assert sampled.ratio <= 1.0
    [total] = meter.total()
    assert total.ratio == pytest.approx(1.0)
    assert meter.elapsed_s == 14
    assert total.record()["active_s"] == 10
    assert "ratio=1.00x ✅ THROTTLED, 10.0 MB in 10.0 of 14.0 s" in total.summary(meter.elapsed_s)


def test_another_limit_is_judged_by_what_comes_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by what came before: what is blocked from now on is no broken limit."""
    now = [100.0]
    monkeypatch.setattr("pybpfthrottle.meter.time.monotonic", lambda: now[0])
    throttle = Transfer()
    meter = Meter(throttle)  # type: ignore[arg-type]
    seen = []
    for limit, passed in ((MB, 1 << 20), (BLOCKED, 1 << 20), (BLOCKED, 0)):
        now[0] += 1
        throttle.limits[Direction.DOWNLOAD] = limit
        throttle.passed += passed
        seen += [(one.limit, one.verdict) for one in meter.sample()]
    assert seen == [
        (MB, Verdict.THROTTLED),
        (MB, Verdict.THROTTLED),
        (BLOCKED, Verdict.BLOCKED),
    ]
