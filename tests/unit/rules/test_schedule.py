"""When a rule is in force: days, hours, zones, and clocks that are put forward or back."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybpfthrottle.errors import SettingsError
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.rules.schedule import parse

UP, DOWN = Direction.UPLOAD, Direction.DOWNLOAD
BERLIN = ZoneInfo("Europe/Berlin")
ZONES = ("Europe/Berlin", "Australia/Lord_Howe", "America/Sao_Paulo", "UTC")


@pytest.fixture(autouse=True)
def machine_in_berlin(monkeypatch):
    """The machine is in Berlin; afterwards where it was."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def berlin(text: str, fold: int = 0) -> datetime:
    """A time as a clock in Berlin shows it."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold)


def both(up: str, down: str = "") -> dict[Direction, Rate]:
    """The limits of both directions."""
    return {UP: Rate.parse(up), DOWN: Rate.parse(down or up)}


# 2026-11-23 is a Monday.
@pytest.mark.parametrize(
    ("now", "limits"),
    [
        ("2026-11-23 06:59", None),
        ("2026-11-23 07:00", both("1.75M")),
        ("2026-11-23 23:29:59.999999", both("1.75M")),
        ("2026-11-23 23:30", None),
    ],
)
def test_a_timetable_changes_at_its_times(now, limits):
    """Each entry holds until the next one, and the last one over midnight."""
    assert parse("07:00,1.75M 23:30,off").at(berlin(now)) == limits


def test_a_pair_is_upload_and_download():
    """The order is rclone's; one of them may be off."""
    found = parse("00:00,1M:off 12:00,512k:2M")
    assert found.at(berlin("2026-11-23 03:00")) == {UP: Rate.parse("1M"), DOWN: None}
    assert found.at(berlin("2026-11-23 13:00")) == both("512K", "2M")


def test_a_timetable_with_days_goes_round_the_week():
    """What Friday began holds on Sunday, and until Monday's first entry."""
    found = parse("Mon-08:00,512K  friday-18:00,4000B 12:00,1M Sat-12:00,2M")
    for now, rate in (
        ("2026-11-23 07:59", "1M"),
        ("2026-11-23 08:00", "512K"),
        ("2026-11-23 12:00", "1M"),
        ("2026-11-27 18:00", "4000"),
        ("2026-11-28 11:59", "4000"),
        ("2026-11-29 11:59", "2M"),
    ):
        assert found.at(berlin(now)) == both(rate), now


def test_a_window_has_the_limits_of_the_rule():
    """They are empty: nothing of the rule is replaced."""
    found = parse({"days": "Mon-Fri", "hours": "08:00-18:00", "zone": "Europe/Berlin"})
    assert found.at(berlin("2026-11-27 17:59")) == {}
    assert found.at(berlin("2026-11-27 18:00")) is None
    assert found.at(berlin("2026-11-28 12:00")) is None


def test_hours_over_midnight_belong_to_the_day_they_begin_on():
    """Sunday's go on into Monday, and Monday's own evening is none."""
    found = parse({"days": "Sun", "hours": "22:00-06:00"})
    assert found.at(berlin("2026-11-22 23:00")) == {}
    assert found.at(berlin("2026-11-23 05:59")) == {}
    assert found.at(berlin("2026-11-23 06:00")) is None
    assert found.at(berlin("2026-11-23 23:00")) is None
    assert found.at(berlin("2026-11-22 05:00")) is None


def test_the_first_window_that_holds_decides():
    """Windows may overlap, and lift what a later one limits."""
    found = parse(
        [
            {"days": ["Sat", "sunday"], "download": "off"},
            {"hours": "08:00-12:00, 13:00-24:00", "download": "20M"},
        ]
    )
    assert found.at(berlin("2026-11-28 09:00")) == {DOWN: None}
    assert found.at(berlin("2026-11-27 09:00")) == {DOWN: Rate.parse("20M")}
    assert found.at(berlin("2026-11-27 12:30")) is None
    assert found.at(berlin("2026-11-27 23:59")) == {DOWN: Rate.parse("20M")}


def test_days_may_go_over_the_weekend():
    """Fri-Mon are four days."""
    found = parse({"days": "Fri-Mon,Wed"})
    held = [found.at(berlin(f"2026-11-{day} 12:00")) is not None for day in range(23, 30)]
    assert held == [True, False, True, False, True, True, True]


def test_a_zone_is_that_of_the_clock_on_the_wall():
    """Eight in Tokyo is midnight in Berlin in winter."""
    found = parse({"hours": "08:00-09:00", "zone": "Asia/Tokyo"})
    assert found.at(berlin("2026-11-23 00:30")) == {}
    assert found.at(berlin("2026-11-23 08:30")) is None


def test_the_machines_zone_is_followed(monkeypatch):
    """A machine that is carried to another zone shows another time."""
    found = parse({"hours": "08:00-09:00"})
    now = berlin("2026-11-23 00:30")
    assert found.at(now) is None
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert found.at(now) == {}


def test_the_hour_that_is_missing_in_spring():
    """A window in it has no moment; one that goes on begins when the clock has jumped."""
    gone = parse({"days": "Sun", "hours": "02:00-03:00"})
    later = parse({"hours": "02:30-04:00"})
    before, after = berlin("2026-03-29 01:59:59"), berlin("2026-03-29 03:00")
    assert after - before.astimezone(timezone.utc) == timedelta(seconds=1)
    assert gone.at(before) is gone.at(after) is None
    assert later.at(before) is None
    assert later.at(after) == {}
    assert later.next_change(before) == after
    assert gone.next_change(before) == berlin("2026-04-05 02:00")


def test_the_hour_that_is_there_twice_in_autumn():
    """So is the window in it, and what begins half past two begins twice."""
    found = parse("00:00,off 02:30,1M")
    moments = [berlin("2026-10-25 02:29"), berlin("2026-10-25 02:30")]
    moments += [moment.replace(fold=1) for moment in moments]
    assert [found.at(moment) is not None for moment in moments] == [False, True, False, True]
    changes = [moments[0]]
    for _ in range(4):
        changes.append(found.next_change(changes[-1]))
    offsets = [moment.astimezone(BERLIN).isoformat()[11:] for moment in changes[1:]]
    assert offsets == ["02:30:00+02:00", "02:00:00+01:00", "02:30:00+01:00", "00:00:00+01:00"]


def test_a_schedule_that_never_changes_says_so():
    """There is nothing to wait for."""
    assert parse({"days": "Mon-Sun"}).next_change(berlin("2026-11-23 12:00")) is None
    assert parse("00:00,1M").next_change(berlin("2026-11-23 12:00")) is None


def minutes():
    """Times of day, and more often those at which clocks are changed."""
    return st.one_of(st.integers(0, 1439), st.sampled_from([0, 60, 90, 120, 150, 180]))


def window(begin, end, day, zone):
    """A window, in TOML."""
    hours = f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    table = {"days": day, "hours": hours}
    return table if zone is None else {**table, "zone": zone}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.builds(
            window,
            minutes(),
            minutes(),
            st.sampled_from(["Mon-Sun", "Sun", "Sat", "Sun-Mon"]),
            st.sampled_from([None, *ZONES]),
        ).filter(lambda table: table["hours"][:5] != table["hours"][6:]),
        min_size=1,
        max_size=2,
    ),
    st.sampled_from(["2026-03-28", "2026-10-24", "2018-11-03", "2026-04-04"]),
    st.integers(0, 2879),
)
def test_the_next_change_is_the_next_change(windows, day, minute):
    """Looked at minute by minute there is no earlier one, wherever clocks are changed."""
    found = parse(windows)
    now = datetime.fromisoformat(day).replace(tzinfo=timezone.utc) + timedelta(minutes=minute)
    told = found.next_change(now)
    horizon = now + timedelta(days=2)
    moment = now
    while moment < horizon and found.at(moment) == found.at(now):
        moment += timedelta(minutes=1)
    assert moment == (told if told and told < horizon else horizon)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "schedule is empty: write a timetable"),
        (7, "schedule is 7: write a timetable such as"),
        ([], r"schedule is \[\]: write a timetable"),
        (["Mon"], r"schedule is \['Mon'\]: write"),
        ("7am,1M", "'7am' is no time from 00:00 to 23:59"),
        ("24:00,1M", "'24:00' is no time"),
        ("07:60,1M", "'07:60' is no time"),
        ("\u0660\u0667:00,1M", "is no time"),
        ("Man-07:00,1M", "days has 'Man': write"),
        ("07:00", "schedule has '07:00' where a time belongs"),
        ("07:00,", "'' is not a limit: give"),
        ("07:00,8mbps", "may mean bits or bytes"),
        ("07:00,512", "512 needs a unit, 512K for KiB per second as rclone takes it, or 512B"),
        ("07:00,1M:2M:3M", "is not a limit"),
        ({}, "nothing in it: known are days, hours"),
        ({"day": "Mon"}, "unknown key day: known are days, hours, zone, download, upload"),
        ({"days": 5}, "days is 5: write"),
        ({"days": []}, "days is"),
        ({"days": "Mon-Wed-Fri"}, "days has 'Mon-Wed-Fri'"),
        ({"hours": "08:00"}, "hours has '08:00': write"),
        ({"hours": "08:00-25:00"}, "'25:00' is no time from 00:00 to 24:00"),
        ({"hours": "08:00-08:00"}, "leave hours out for all day"),
        ({"hours": "08:00-18:00", "zone": "Berlin"}, "there is no time zone 'Berlin'"),
        ({"zone": "../../etc/passwd"}, "there is no time zone"),
        ({"zone": "Europe"}, "there is no time zone"),
        ({"zone": ""}, "there is no time zone"),
        ({"zone": 1}, "there is no time zone 1"),
        ({"download": 5}, 'write a rate such as "5M", or "off"'),
        ({"upload": "5"}, "upload of a schedule: 5 is out of range"),
    ],
)
def test_a_mistake_is_told_in_one_line(value, complaint):
    """With what is allowed."""
    with pytest.raises(SettingsError, match=complaint) as raised:
        parse(value)
    assert "\n" not in str(raised.value)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=30), st.from_regex(r"[MT-]{0,4}\d\d?:\d\d,[0-9KMoff:]{0,5}")))
def test_any_text_is_a_schedule_or_a_mistake(text):
    """Nothing else comes of it."""
    with suppress(SettingsError):
        parse(text).at(datetime.now(timezone.utc))


def test_a_machine_without_a_zone_is_in_utc(monkeypatch):
    """As for the C library."""
    monkeypatch.setitem(os.environ, "TZ", "")
    assert parse("12:00,1M 13:00,off").at(datetime(2026, 1, 1, 12, tzinfo=timezone.utc))
