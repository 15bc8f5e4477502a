"""The part that this machine has of a limit that many machines share.

Each machine writes once a second what it wants into a hash in Redis, reads what all want, and takes
its max-min fair part: everybody works out the same. The server's clock says who is still there. If
the server is gone, each machine keeps its part for a while; then it takes an equal one of those
that there were last. Whatever the server answers, the part is never above the total, and nobody
waits for it but a thread of its own.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from contextlib import suppress
from typing import Callable, Mapping, NamedTuple, Optional

from pybpfthrottle.fleet import fair, redis
from pybpfthrottle.fleet.redis import Connection, Value
from pybpfthrottle.model import MIN_RATE, Rate

_PERIOD_S = 1.0
_PATIENCE_S = 2.0
# To leave a server that answers takes milliseconds; for another one nobody waits.
_FAREWELL_S = 0.2
_LONGEST_PAUSE_S = 15.0
# Who has not written for so long is gone, and the others get its part.
_GONE_S = 5.0
# How long the last part holds without a server, which may just be restarted.
_KEEP_S = 30.0
_FORGOTTEN_S = 60.0
_MOST_FORGOTTEN = 100
_MOST_DIGITS = 16


class _Agreed(NamedTuple):
    """What was agreed on last: when, on which part, among how many."""

    at_s: float
    part: int
    machines: int


class _Entry(NamedTuple):
    """What one machine wants, and when it said so, by the server's clock."""

    at_ms: int
    demand: int


_UNREADABLE = _Entry(0, 0)


class FleetShare:
    """The part of a total that this machine may use, by agreement through a Redis at ``url``.

    ``start`` or ``with`` begins, ``close`` ends. ``group`` names the total: all machines that give
    the same name and total share it. While the server does not answer, there are taken to be as
    many of them as there were last, and ``machines`` at least.
    """

    def __init__(
        self,
        url: str,
        group: str,
        total: Rate,
        *,
        machines: int = 1,
        clock: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        """Raises SettingsError for an address that is none."""
        self._server = redis.parse(url)
        self._key = f"pybpfthrottle:{group}"
        self._total = total.bytes_per_s
        self._name = redis.name_of_this_machine()
        self._clock = clock
        self._demand = self._total
        self._least = max(1, machines)
        self._agreed = _Agreed(-_KEEP_S, 0, self._least)
        self._trouble = ""
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="pybpfthrottle-fleet", daemon=True)

    @property
    def total(self) -> int:
        """What all machines share, in bytes per second."""
        return self._total

    def start(self) -> None:
        """Begin to agree with the others, in a thread."""
        self._thread.start()

    def part(self, demand: Optional[int] = None) -> Rate:
        """Return this machine's part now, and say what it wants, in bytes per second; None: all.

        It waits for nothing.
        """
        wanted = self._total if demand is None else demand
        self._demand = max(0, min(wanted, self._total))
        agreed = self._agreed
        stale = self._clock() - agreed.at_s > _KEEP_S
        part = self._total // agreed.machines if stale else agreed.part
        return Rate(max(MIN_RATE.bytes_per_s, min(part, self._total)))

    def notes(self) -> list[str]:
        """Return why nothing can be agreed on at the moment."""
        trouble = self._trouble
        return [f"no agreement through {self._server}: {trouble}"] if trouble else []

    def close(self) -> None:
        """Leave the fleet; the others get this part. It waits for a moment, if at all."""
        self._leaving.set()
        if not self._trouble:
            self._thread.join(_FAREWELL_S)

    def __enter__(self) -> FleetShare:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> None:
        """Agree once a second; after a failure less often, so that a fleet is no flood."""
        failures = 0
        while not self._leaving.is_set():
            try:
                with Connection(self._server, _PATIENCE_S) as connection:
                    while not self._leaving.is_set():
                        self._agree(connection)
                        failures = 0
                        self._leaving.wait(_PERIOD_S)
                    connection.ask(("HDEL", self._key, self._name))
            except (OSError, ValueError) as error:  # the latter for a host's name
                self._trouble = getattr(error, "strerror", None) or str(error) or "no answer"
                failures += 1
                pause_s = min(2.0 ** min(failures, 5) / 2, _LONGEST_PAUSE_S)
                self._leaving.wait(pause_s * random.uniform(0.5, 1.0))  # noqa: S311

    def _agree(self, connection: Connection) -> None:
        """Tell what is wanted here, and take the part that follows from what all want."""
        [time_of_day] = connection.ask(("TIME",))
        now_ms = _milliseconds(time_of_day)
        [_, _, told] = connection.ask(
            ("HSET", self._key, self._name, f"{now_ms} {self._demand}"),
            ("PEXPIRE", self._key, str(int(_FORGOTTEN_S * 1000))),
            ("HGETALL", self._key),
        )
        entries = _entries(told)
        entries[self._name.encode()] = _Entry(now_ms, self._demand)
        self._forget(connection, entries, now_ms)
        demands = {
            name: min(entry.demand, self._total)
            for name, entry in entries.items()
            if abs(now_ms - entry.at_ms) <= _GONE_S * 1000
        }
        machines = max(self._least, len(demands))
        self._agreed = _Agreed(self._clock(), self._part_of(demands), machines)
        self._trouble = ""

    def _part_of(self, demands: Mapping[bytes, int]) -> int:
        # In the same order everywhere: then equal demands are rounded alike.
        names = sorted(demands)
        parts = fair.parts(self._total, [demands[name] for name in names])
        return parts[names.index(self._name.encode())]

    def _forget(self, connection: Connection, entries: Mapping[bytes, _Entry], now_ms: int) -> None:
        """Delete what machines have left behind that are gone for long."""
        old = [
            name.decode(errors="surrogateescape")
            for name, entry in entries.items()
            if abs(now_ms - entry.at_ms) > _FORGOTTEN_S * 1000
        ]
        if old:
            connection.ask(("HDEL", self._key, *old[:_MOST_FORGOTTEN]))


def _entries(told: Value) -> dict[bytes, _Entry]:
    """Return what each machine has written; what cannot be read is long forgotten."""
    flat = [one for one in told if isinstance(one, bytes)] if isinstance(told, list) else []
    return {name: _entry(value) for name, value in zip(flat[::2], flat[1::2])}


def _entry(value: bytes) -> _Entry:
    with suppress(ValueError):
        at_ms, demand = (_digits(word) for word in value.split(b" ")[:2])
        return _Entry(at_ms, demand)
    return _UNREADABLE


def _digits(word: Value) -> int:
    """Return a number. Raises ValueError for anything else, and if it is too long."""
    if not isinstance(word, bytes) or len(word) > _MOST_DIGITS or not word.isdigit():
        raise ValueError
    return int(word)


def _milliseconds(time_of_day: Value) -> int:
    """Return the server's time, from its answer to TIME. Raises OSError."""
    words = time_of_day if isinstance(time_of_day, list) else []
    if len(words) == 2:
        with suppress(ValueError):
            seconds, microseconds = (_digits(word) for word in words)
            return seconds * 1000 + microseconds // 1000
    raise OSError(errno.EPROTO, "it does not tell the time as Redis does")
