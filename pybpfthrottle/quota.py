"""Quotas: how much a rule may pass in a day, week or month, and what happens then. Pure.

A rule has one as ``quota = { month = "100G", then = "limit", rate = "500K" }``::

    quota = quota.parse(table)
    decision = quota.decide(lambda span: ledger.used("video", span), time.time())
    if decision.then == "limit":
        ...  # to decision.rate, until decision.until_s

What has passed is counted by ``ledger.Ledger``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, tzinfo
from typing import Any, Callable, Mapping, NamedTuple, Optional

from pybpfthrottle.errors import LimitError, SettingsError
from pybpfthrottle.model import BLOCKED, Direction, Limits, Rate, format_bytes, parse_bytes
from pybpfthrottle.periods import Period, Span, day_of, zone_named

THEN = ("limit", "block", "warn")
_PERIODS = tuple(one.value for one in Period)
_KEYS = (*_PERIODS, "then", "rate", "start_day", "zone")
_ACCEPTED = '{ month = "100G", then = "limit", rate = "500K" }'


class Standing(NamedTuple):
    """How much of one period's quota is used. Times are in seconds since 1970."""

    period: Period
    span: Span
    begins_s: float
    ends_s: float
    used_bytes: int
    quota_bytes: int

    @property
    def left_bytes(self) -> int:
        """How much may still pass."""
        return max(0, self.quota_bytes - self.used_bytes)

    @property
    def exceeded(self) -> bool:
        """Whether nothing is left."""
        return self.used_bytes >= self.quota_bytes

    def __str__(self) -> str:
        used, most, left = map(format_bytes, (self.used_bytes, self.quota_bytes, self.left_bytes))
        return f"{used} of {most} a {self.period.value} are used, {left} are left"

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "period": self.period.value,
            "begins": self.begins_s,
            "ends": self.ends_s,
            "quota_bytes": self.quota_bytes,
            "used_bytes": self.used_bytes,
            "left_bytes": self.left_bytes,
        }


@dataclass(frozen=True)
class Decision:
    """How a quota stands at a moment, a standing for each of its periods."""

    quota: Quota
    standings: tuple[Standing, ...]

    @property
    def exceeded(self) -> Optional[Standing]:
        """The standing that decides: of those that are exceeded the one that ends last."""
        found = (one for one in self.standings if one.exceeded)
        return max(found, key=lambda one: one.ends_s, default=None)

    @property
    def then(self) -> str:
        """What applies now: one of THEN, or empty while something is left."""
        return self.quota.then if self.exceeded else ""

    @property
    def rate(self) -> Optional[Rate]:
        """The limit that applies now, None if none does."""
        return self.quota.rate if self.then == "limit" else None

    def limits(self, own: Limits) -> Limits:
        """Return the limits of a rule that has these, of both directions."""
        found = {direction: own.get(direction) for direction in Direction}
        if self.then in ("", "warn"):
            return found
        most = self.rate or BLOCKED
        return {
            direction: most if rate is None else min(rate, most)
            for direction, rate in found.items()
        }

    @property
    def until_s(self) -> Optional[float]:
        """When it applies no longer."""
        return self.exceeded.ends_s if self.exceeded else None

    def text(self, rule: str) -> str:
        """Return in a sentence that a rule's quota is used up, and what happens; else empty."""
        one = self.exceeded
        if one is None:
            return ""
        what = {
            "limit": f"it is limited to {self.quota.rate} until",
            "block": "it is blocked until",
            "warn": f"the next {one.period.value} begins",
        }[self.quota.then]
        ends = datetime.fromtimestamp(one.ends_s, self.quota.zone).strftime("%Y-%m-%d %H:%M")
        return (
            f"{rule} has used {format_bytes(one.used_bytes)} of its"
            f" {format_bytes(one.quota_bytes)} a {one.period.value}; {what} {ends}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "then": self.then or None,
            "rate": self.rate.bytes_per_s if self.rate else None,
            "until": self.until_s,
            "periods": [one.to_json() for one in self.standings],
        }


@dataclass(frozen=True)
class Quota:
    """How many bytes may pass in a period, in both directions together, and what happens then.

    ``then`` is one of THEN; ``rate`` is the limit of "limit", and "block" lets nothing pass. Months
    begin on ``start_day``. ``zone`` is the time zone, None that of the machine.
    """

    amounts: Mapping[Period, int]
    then: str = "block"
    rate: Optional[Rate] = None
    start_day: int = 1
    zone: Optional[tzinfo] = None

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON, with amounts in bytes."""
        return {
            **{period.value: amount for period, amount in self.amounts.items()},
            "then": self.then,
            "rate": self.rate.bytes_per_s if self.rate else None,
            "start_day": self.start_day,
            "zone": None if self.zone is None else str(self.zone),
        }

    def day(self, now_s: float) -> str:
        """Return the day that something is counted on, in the quota's time zone."""
        return day_of(now_s, self.zone).isoformat()

    def decide(self, used: Callable[[Span], int], now_s: float) -> Decision:
        """Return how it stands; ``used`` returns the bytes that have passed on some days."""
        today = day_of(now_s, self.zone)
        spans = {period: period.around(today, self.start_day) for period in self.amounts}
        return Decision(
            self,
            tuple(
                Standing(
                    *(period, span, span.begins_s(self.zone), span.ends_s(self.zone)),
                    used_bytes=used(span),
                    quota_bytes=self.amounts[period],
                )
                for period, span in spans.items()
            ),
        )


def parse(value: Any) -> Quota:
    """Read the quota of a rule. Raises SettingsError with what is accepted."""
    if not isinstance(value, dict) or not value:
        raise SettingsError(f"it must be a table such as {_ACCEPTED}")
    unknown = [key for key in value if key not in _KEYS]
    if unknown:
        raise SettingsError(f"unknown key {unknown[0]}: known are {', '.join(_KEYS)}")
    try:
        amounts = {one: parse_bytes(str(value[one.value])) for one in Period if one.value in value}
        rate = Rate.parse(str(value["rate"])) if "rate" in value else None
    except LimitError as error:
        raise SettingsError(str(error)) from error
    if not amounts:
        raise SettingsError(f"it has no {' or '.join(_PERIODS)}: write {_ACCEPTED}")
    zone = zone_named(value["zone"]) if "zone" in value else None
    return Quota(amounts, _then(value), rate, _start_day(value, amounts), zone)


def _then(value: Mapping[str, Any]) -> str:
    then = value.get("then", "block")
    if then not in THEN:
        raise SettingsError(f"then is {then!r}: it must be one of {', '.join(THEN)}")
    if (then == "limit") != ("rate" in value):
        raise SettingsError(f'it has a rate if then is "limit", and only then: {_ACCEPTED}')
    return str(then)


def _start_day(value: Mapping[str, Any], amounts: Mapping[Period, int]) -> int:
    day = value.get("start_day", 1)
    if type(day) is not int or not 1 <= day <= 31:
        raise SettingsError(f"start_day is {day!r}: it must be from 1 to 31")
    if "start_day" in value and Period.MONTH not in amounts:
        raise SettingsError("start_day is for a month, which is missing")
    return day
