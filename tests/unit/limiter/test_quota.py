"""Periods of the calendar, and what a quota says of what has passed in them."""

from __future__ import annotations

import os
import time
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from pybpfthrottle.errors import LimitError, SettingsError
from pybpfthrottle.model import Rate, parse_bytes
from pybpfthrottle.periods import Period, Span, day_of, start_of
from pybpfthrottle.quota import Quota, parse

BERLIN = ZoneInfo("Europe/Berlin")
G = 1024**3


@pytest.fixture
def local(monkeypatch):
    """Sets the machine's time zone, as the C library has it."""

    def put(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield put
    monkeypatch.undo()
    time.tzset()


# Midnight is left out in one of them, and twice in another.
DAYS = [
    ("Europe/Berlin", date(2026, 3, 29), 23),
    ("Europe/Berlin", date(2026, 10, 25), 25),
    ("America/Havana", date(2024, 3, 10), 23),
    ("America/Havana", date(2024, 11, 3), 25),
    ("Asia/Kolkata", date(2026, 3, 29), 24),
]


@pytest.mark.parametrize(("zone", "day", "hours"), DAYS)
@pytest.mark.parametrize("is_local", [False, True])
def test_a_day_is_as_long_as_the_clock_says(local, zone, day, hours, is_local) -> None:
    """Its first second belongs to it, the one before and that after its end do not."""
    local(zone if is_local else "UTC")
    where = None if is_local else ZoneInfo(zone)
    span = Span(day, day + timedelta(days=1))
    begins_s, ends_s = span.begins_s(where), span.ends_s(where)
    assert ends_s - begins_s == hours * 3600
    assert day_of(begins_s, where) == day_of(ends_s - 1, where) == day
    assert day_of(begins_s - 1, where) == day - timedelta(days=1)
    assert day_of(ends_s, where) == span.after


def test_a_week_begins_on_monday() -> None:
    """Also where it reaches into another year."""
    week = Span(date(2026, 12, 28), date(2027, 1, 4))
    assert [Period.WEEK.around(day) for day in (week.first, week.last)] == [week, week]
    assert week.last == date(2027, 1, 3)
    assert Period.WEEK.around(week.after).first == week.after


@pytest.mark.parametrize(
    ("day", "start_day", "first", "after"),
    [
        ("2026-11-26", 1, "2026-11-01", "2026-12-01"),
        ("2026-12-31", 1, "2026-12-01", "2027-01-01"),
        ("2026-11-14", 15, "2026-10-15", "2026-11-15"),
        ("2026-11-15", 15, "2026-11-15", "2026-12-15"),
        ("2026-01-03", 15, "2025-12-15", "2026-01-15"),
        ("2026-02-27", 31, "2026-01-31", "2026-02-28"),
        ("2026-02-28", 31, "2026-02-28", "2026-03-31"),
        ("2028-02-29", 31, "2028-02-29", "2028-03-31"),
    ],
)
def test_a_month_begins_on_its_day(day, start_day, first, after) -> None:
    """Or on its last one if it is shorter."""
    span = Period.MONTH.around(date.fromisoformat(day), start_day)
    assert [one.isoformat() for one in span] == [first, after]


@pytest.mark.parametrize("start_day", [1, 28, 29, 30, 31])
def test_months_follow_one_another(start_day) -> None:
    """Each day is in one of them, whatever day they begin on."""
    span = Period.MONTH.around(date(2027, 12, 1), start_day)
    for _ in range(30):
        assert Period.MONTH.around(span.last, start_day) == span
        following = Period.MONTH.around(span.after, start_day)
        assert following.first == span.after
        span = following


@pytest.mark.parametrize(
    ("text", "count"), [("100G", 100 * G), ("1.5 GiB", 3 * G // 2), ("2TB", 2048 * G), ("1", 1)]
)
def test_amounts_are_read_as_limits_are(text, count) -> None:
    """K is 1024; there are terabytes too."""
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "G", "0", "-1G", "1e3", "8mbit", "1M/s", "1001T", "9" * 40, "\u0661G", "5 apples"]
)
def test_what_is_no_amount_is_refused(text) -> None:
    """With what is accepted."""
    with pytest.raises(LimitError, match="500M"):
        parse_bytes(text)


def test_a_rule_s_quota_is_read() -> None:
    """All of it."""
    quota = parse(
        {"month": "100G", "day": "5G", "then": "limit", "rate": "500K", "start_day": 15}
        | {"zone": "Europe/Berlin"}
    )
    amounts = {Period.MONTH: 100 * G, Period.DAY: 5 * G}
    assert quota == Quota(amounts, "limit", Rate.parse("500K"), 15, BERLIN)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("100G", "a table such as"),
        ({}, "a table such as"),
        ({"then": "warn"}, "day or week or month"),
        ({"month": "many"}, "'many' is not an amount"),
        ({"month": True}, "'True' is not an amount"),
        ({"month": "1G", "then": "explode"}, "limit, block, warn"),
        ({"month": "1G", "then": ["limit"]}, "limit, block, warn"),
        ({"month": "1G", "then": "limit"}, "rate"),
        ({"month": "1G", "rate": "1M"}, "then"),
        ({"month": "1G", "then": "limit", "rate": "fast"}, "'fast'"),
        ({"month": "1G", "start_day": 32}, "from 1 to 31"),
        ({"month": "1G", "start_day": True}, "from 1 to 31"),
        ({"day": "1G", "start_day": 3}, "for a month"),
        ({"month": "1G", "zone": "Mars/Olympus"}, "Europe/Berlin"),
        ({"month": "1G", "zone": "../../etc/passwd"}, "Europe/Berlin"),
        ({"month": "1G", "zone": 7}, "Europe/Berlin"),
        ({"year": "1G"}, "unknown key year: .*month"),
    ],
)
def test_a_quota_with_a_mistake_is_refused(table, says) -> None:
    """With the place, and what is allowed."""
    with pytest.raises(SettingsError, match=says):
        parse(table)


def decided(used: int, *, then: str = "block", now: str = "2026-11-26T12:00"):
    """How a quota of 10 bytes a day and 100 a month stands if a day has seen so many."""
    rate = Rate.parse("500K") if then == "limit" else None
    quota = Quota({Period.DAY: 10, Period.MONTH: 100}, then, rate, zone=BERLIN)
    now_s = datetime.fromisoformat(now).replace(tzinfo=BERLIN).timestamp()
    return quota.decide(lambda span: used * (span.after - span.first).days, now_s)


def test_while_something_is_left_nothing_applies() -> None:
    """It says what is used and left, and until when."""
    decision = decided(3)
    assert (decision.then, decision.rate, decision.until_s, decision.text("x")) == (
        *("", None, None),
        "",
    )
    day, month = decision.standings
    assert (day.used_bytes, day.left_bytes, month.used_bytes, month.left_bytes) == (3, 7, 90, 10)
    assert day.ends_s - day.begins_s == 86400
    assert month.begins_s == start_of(date(2026, 11, 1), BERLIN)
    assert month.ends_s == start_of(date(2026, 12, 1), BERLIN)
    assert decision.to_json()["periods"][1]["left_bytes"] == 10


def test_the_last_byte_is_the_last() -> None:
    """With nothing left the action applies until the period ends; the longest one counts."""
    decision = decided(4, then="limit")
    assert decision.exceeded == decision.standings[1]
    assert (decision.then, decision.rate) == ("limit", Rate.parse("500K"))
    assert decision.until_s == start_of(date(2026, 12, 1), BERLIN)
    assert decision.standings[0].left_bytes == 6
    assert decision.to_json()["rate"] == 500 << 10


@pytest.mark.parametrize(
    ("then", "what"),
    [
        ("limit", "limited to 500.0 KB/s"),
        ("block", "it is blocked until"),
        ("warn", "next month begins"),
    ],
)
def test_it_says_in_a_sentence_what_happens(then, what) -> None:
    """With the end in the quota's own time zone."""
    text = decided(10, then=then).text("video")
    assert text.startswith("video has used 300 B of its 100 B a month")
    assert what in text
    assert text.endswith("2026-12-01 00:00")


def test_the_day_of_a_quota_is_that_of_its_zone() -> None:
    """Not the machine's: half an hour after midnight in Berlin it is still yesterday in UTC."""
    at_s = datetime(2026, 7, 1, 22, 30, tzinfo=ZoneInfo("UTC")).timestamp()
    assert Quota({Period.DAY: 1}, zone=BERLIN).day(at_s) == "2026-07-02"
    assert os.environ.get("TZ") != "Europe/Berlin"
