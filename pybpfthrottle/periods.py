"""Days, weeks and months of the calendar, in local time.

A day begins at its first moment: at midnight, or where the clock is put forward at midnight, when
it is. So a day has 23 to 25 hours where there is daylight saving time. Times are in seconds since
1970. A time zone of None is that of the machine.
"""

from __future__ import annotations

from calendar import monthrange
from datetime import date, datetime, timedelta, tzinfo
from enum import Enum
from typing import NamedTuple, Optional
from zoneinfo import ZoneInfo

from pybpfthrottle.errors import SettingsError


class Span(NamedTuple):
    """Some days: the ``first`` one, and the one ``after`` the last."""

    first: date
    after: date

    @property
    def last(self) -> date:
        """The last day."""
        return self.after - timedelta(days=1)

    def begins_s(self, zone: Optional[tzinfo] = None) -> float:
        """Return when its first day begins."""
        return start_of(self.first, zone)

    def ends_s(self, zone: Optional[tzinfo] = None) -> float:
        """Return when the day after it begins."""
        return start_of(self.after, zone)


class Period(Enum):
    """What a quota is for."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"

    def around(self, day: date, start_day: int = 1) -> Span:
        """Return the period that a day is in.

        Weeks begin on Monday, months on ``start_day``, or on their last day if they are shorter.
        """
        if self is Period.DAY:
            return Span(day, day + timedelta(days=1))
        if self is Period.WEEK:
            monday = day - timedelta(days=day.weekday())
            return Span(monday, monday + timedelta(days=7))
        this = _in_month(day.year, day.month, start_day)
        if day < this:
            return Span(_in_month(*_before(day.year, day.month), start_day), this)
        return Span(this, _in_month(*_after(day.year, day.month), start_day))


def zone_named(name: object) -> ZoneInfo:
    """Return a time zone. Raises SettingsError."""
    try:
        return ZoneInfo(str(name))
    except (KeyError, ValueError, OSError):  # that has no such zone, no name, or a directory
        raise SettingsError(
            f'there is no time zone {name!r}: write one such as "Europe/Berlin" (timedatectl'
            " list-timezones lists them; they are in the package tzdata)"
        ) from None


def day_of(at_s: float, zone: Optional[tzinfo] = None) -> date:
    """Return the day that a moment is in."""
    return datetime.fromtimestamp(at_s, zone).date()


def start_of(day: date, zone: Optional[tzinfo] = None) -> float:
    """Return when a day begins."""
    # Of a midnight that is twice this is the first; of one that is left out, when that happens.
    return datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()


def _in_month(year: int, month: int, day: int) -> date:
    return date(year, month, min(day, monthrange(year, month)[1]))


def _before(year: int, month: int) -> tuple[int, int]:
    return (year, month - 1) if month > 1 else (year - 1, 12)


def _after(year: int, month: int) -> tuple[int, int]:
    return (year, month + 1) if month < 12 else (year + 1, 1)
