"""When a rule is in force, by the days and hours of a wall clock. Pure, but for the zone's data.

A schedule is written in one of two forms. A timetable, as rclone has it: at each time the limits
change, and they hold until the next one. A pair of rates is ``UPLOAD:DOWNLOAD``::

    schedule = "07:00,1.75M 23:30,off"
    schedule = "Mon-08:00,512K:2M Fri-18:00,off"

Or windows, in which the rule holds, with the limits of the rule or their own. Of several that hold
the first decides::

    schedule = { days = "Mon-Fri", hours = "08:00-18:00", zone = "Europe/Berlin" }
    schedule = [
        { hours = "22:00-06:00", download = "20M" },
        { days = ["Sat", "Sun"], download = "off" },
    ]

Hours over midnight belong to the day on which they begin. Without a zone it is the machine's. What
counts is what a clock on the wall shows, and nothing else: neither how long a window has lasted,
nor what held before. So when summer time begins, a window of 02:00-03:00 has no moment, and one of
02:30-04:00 begins at 03:00; when it ends, the hour from 02:00 to 03:00 is there twice, and so are
the parts of windows in it.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence
from zoneinfo import ZoneInfo

from pybpfthrottle.errors import LimitError, SettingsError
from pybpfthrottle.model import Direction, Limits, Rate
from pybpfthrottle.periods import zone_named

_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_DAY_MIN = 24 * 60
_WEEK_MIN = 7 * _DAY_MIN
_TIME = re.compile(r"([0-9]{1,2}):([0-9]{2})")
_KEYS = ("days", "hours", "zone", "download", "upload")
# One that is there once a week may fall into the hour that is missing in spring.
_FARTHEST_DAYS = 15

_TIMETABLE = '"07:00,1M 23:30,off", with a day as in Mon-07:00,1M and UPLOAD:DOWNLOAD as in 1M:5M'
_ACCEPTED = (
    f"a timetable such as {_TIMETABLE}; or"
    ' { days = "Mon-Fri", hours = "08:00-18:00", zone = "Europe/Berlin" }, or a list of such'
)


class _Span(NamedTuple):
    """A part of the week, in minutes since Monday 00:00, and the limits in it.

    ``end`` may be in the week after. Empty limits mean the rule's own.
    """

    begin: int
    end: int
    zone: Optional[ZoneInfo]
    limits: Limits

    @property
    def lifts_all(self) -> bool:
        """Whether nothing is limited in it."""
        return len(self.limits) == len(Direction) and not any(self.limits.values())

    def has(self, now: datetime) -> bool:
        """Whether a moment is in it."""
        wall = now.astimezone(self.zone)
        minute = wall.weekday() * _DAY_MIN + wall.hour * 60 + wall.minute
        return self.begin <= minute < self.end or minute + _WEEK_MIN < self.end


@dataclass(frozen=True)
class Schedule:
    """When a rule is in force, and with which limits."""

    spans: tuple[_Span, ...]

    def at(self, now: datetime) -> Optional[Limits]:
        """Return the limits at a moment, which replace the rule's own; None if nothing is limited.

        A direction that is not in them has the rule's own limit. ``now`` has a zone.
        """
        time.tzset()  # the machine may have been carried to another zone
        for span in self.spans:
            if span.has(now):
                return None if span.lifts_all else span.limits
        return None

    def next_change(self, now: datetime) -> Optional[datetime]:
        """Return when ``at`` changes next, in UTC, by today's clock; None if it never does.

        Where the clock may be set, ask again from time to time: ``at`` takes microseconds.
        """
        present = self.at(now)
        later = sorted(moment for moment in self._moments(now) if moment > now)
        return next((moment for moment in later if self.at(moment) != present), None)

    def _moments(self, now: datetime) -> Iterator[datetime]:
        """Yield when something may change, for some days to come."""
        minutes = {minute % _WEEK_MIN for span in self.spans for minute in (span.begin, span.end)}
        for zone in {span.zone for span in self.spans}:
            for ahead in range(-1, _FARTHEST_DAYS):  # clocks may be put back to yesterday
                day = now.astimezone(zone).date() + timedelta(days=ahead)
                yield from _clock_changes(day, zone)
                for minute in minutes:
                    if minute // _DAY_MIN == day.weekday():
                        yield from _shown(day, minute % _DAY_MIN, zone)


def parse(value: object) -> Schedule:
    """Return the schedule that a rule has, from TOML. Raises SettingsError, in one line."""
    if isinstance(value, str):
        return Schedule(tuple(_timetable(value)))
    windows = value if isinstance(value, list) else [value]
    if not windows or not all(isinstance(one, dict) for one in windows):
        raise SettingsError(f"schedule is {value!r}: write {_ACCEPTED}")
    return Schedule(tuple(span for one in windows for span in _window(one)))


def _timetable(text: str) -> Iterator[_Span]:
    """Yield the spans between the times of a timetable; the last one goes on into the next week."""
    limits = {minute: found for entry in text.split() for minute, found in _entry(entry)}
    if not limits:
        raise SettingsError(f"schedule is empty: write {_ACCEPTED}")
    times = sorted(limits)
    for begin, end in zip(times, [*times[1:], times[0] + _WEEK_MIN]):
        yield _Span(begin, end, None, limits[begin])


def _entry(text: str) -> Iterator[tuple[int, Limits]]:
    """Yield the minutes of the week that an entry of a timetable begins at, with its limits."""
    when, comma, rates = text.partition(",")
    day, dash, clock = when.rpartition("-")
    if not comma:
        raise SettingsError(f"schedule has {text!r} where a time belongs: write {_TIMETABLE}")
    days = _days(day) if dash else range(7)
    minute = _minute(clock, f"schedule has {text!r}", last=_DAY_MIN - 1)
    upload, colon, download = rates.partition(":")
    found = {Direction.UPLOAD: upload, Direction.DOWNLOAD: download if colon else upload}
    limits = {direction: _bandwidth(rate, text) for direction, rate in found.items()}
    for each in days:
        yield each * _DAY_MIN + minute, limits


def _bandwidth(text: str, entry: str) -> Optional[Rate]:
    """Return a rate of a timetable. One without a unit is refused: for rclone it is KiB."""
    if text.isdigit():
        raise SettingsError(
            f"schedule has {entry!r}: {text} needs a unit, {text}K for KiB per second as rclone"
            f" takes it, or {text}B"
        )
    return _rate(text.removesuffix("B") if text[:-1].isdigit() else text, f"schedule has {entry!r}")


def _rate(text: object, where: str) -> Optional[Rate]:
    if not isinstance(text, str):
        raise SettingsError(f'{where}: write a rate such as "5M", or "off"')
    if text.lower() == "off":
        return None
    try:
        return Rate.parse(text)
    except LimitError as error:
        raise SettingsError(f"{where}: {error}; or off") from error


def _window(table: Mapping[str, Any]) -> Iterator[_Span]:
    """Yield the spans of one window."""
    unknown = [key for key in table if key not in _KEYS]
    if unknown or not table:
        what = f"unknown key {unknown[0]}" if unknown else "nothing in it"
        raise SettingsError(f"schedule has {what}: known are {', '.join(_KEYS)}")
    zone = zone_named(table["zone"]) if "zone" in table else None
    limits = {
        direction: _rate(table[str(direction)], f"{direction} of a schedule")
        for direction in Direction
        if str(direction) in table
    }
    hours = list(_hours(table.get("hours", "00:00-24:00")))
    for day in _days(table.get("days", "Mon-Sun")):
        for begin, end in hours:
            yield _Span(day * _DAY_MIN + begin, day * _DAY_MIN + end, zone, limits)


def _parts(value: object, key: str, accepted: str) -> Sequence[str]:
    """Return what a list has, or a text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(one, str) for one in parts):
        raise SettingsError(f"{key} is {value!r}: write {accepted}")
    return [part.strip() for part in parts]


def _days(value: object) -> Sequence[int]:
    accepted = '"Mon-Fri", "Sat,Sun" or ["Mon", "Wed"]'
    found: dict[int, None] = {}
    for part in _parts(value, "days", accepted):
        ends = [_day(name) for name in part.split("-")]
        if len(ends) > 2 or None in ends:
            raise SettingsError(f"days has {part!r}: write {accepted}")
        first, last = ends[0] or 0, ends[-1] or 0
        found.update(dict.fromkeys((first + i) % 7 for i in range((last - first) % 7 + 1)))
    return sorted(found)


def _day(name: str) -> Optional[int]:
    """Return a weekday by its name or the first three letters of it."""
    known = {length: number for number, day in enumerate(_DAYS) for length in (day, day[:3])}
    return known.get(name.strip().lower())


def _hours(value: object) -> Iterator[tuple[int, int]]:
    accepted = '"08:00-18:00", or several: "08:00-12:00, 13:00-17:00"'
    for part in _parts(value, "hours", accepted):
        begin_text, dash, end_text = part.partition("-")
        if not dash:
            raise SettingsError(f"hours has {part!r}: write {accepted}")
        begin = _minute(begin_text, f"hours has {part!r}", last=_DAY_MIN - 1)
        end = _minute(end_text, f"hours has {part!r}", last=_DAY_MIN)
        if begin == end:
            raise SettingsError(f"hours has {part!r}, no time at all: leave hours out for all day")
        yield begin, end + _DAY_MIN if end < begin else end


def _minute(text: str, where: str, *, last: int) -> int:
    """Return a time of day in minutes."""
    match = _TIME.fullmatch(text.strip())
    minute = int(match[1]) * 60 + int(match[2]) if match else -1
    if not match or int(match[2]) > 59 or minute > last:
        raise SettingsError(f"{where}: {text.strip()!r} is no time from 00:00 to {_clock(last)}")
    return minute


def _clock(minute: int) -> str:
    return f"{minute // 60:02}:{minute % 60:02}"


def _shown(day: date, minute: int, zone: Optional[ZoneInfo]) -> Iterator[datetime]:
    """Yield when a clock on the wall shows a time: twice when summer time ends."""
    wall = datetime(day.year, day.month, day.day, minute // 60, minute % 60)
    for fold in (0, 1):
        yield wall.replace(tzinfo=zone, fold=fold).astimezone(timezone.utc)


def _clock_changes(day: date, zone: Optional[ZoneInfo]) -> Iterator[datetime]:
    """Yield when a zone's clocks are put forward or back, on a day in UTC."""
    before = datetime(day.year, day.month, day.day, tzinfo=timezone.utc)
    after = before + timedelta(days=1)
    if _offset(before, zone) == _offset(after, zone):
        return
    while after - before > timedelta(seconds=1):
        middle = (before + (after - before) / 2).replace(microsecond=0)
        if _offset(middle, zone) == _offset(before, zone):
            before = middle
        else:
            after = middle
    yield after


def _offset(moment: datetime, zone: Optional[ZoneInfo]) -> Optional[timedelta]:
    return moment.astimezone(zone).utcoffset()
