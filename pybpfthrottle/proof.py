"""Whether a limit holds, by two measures that know nothing of each other.

One is what the throttle has counted in the kernel, whichever backend it is of. The other is what
the target's TCP connections say they have carried. What they have carried beyond the first went
past the limit.
"""

from __future__ import annotations

import time
from enum import Enum
from typing import Any, Collection, Iterable, Mapping, NamedTuple, Optional

from pybpfthrottle import witness
from pybpfthrottle.linux import tcp
from pybpfthrottle.linux.tcp import Moved
from pybpfthrottle.model import Counters, Direction, Rate, Verdict, format_bytes, format_rate
from pybpfthrottle.throttle import Throttle

SECONDS = 2.0
# Samples are a second apart, and may be a little early.
_ENOUGH_S = 0.85 * SECONDS
# The two measures are not read at the same moment, and headers may count.
_TOLERANCE_BYTES, _TOLERANCE_SHARE = 1 << 16, 0.05

LOOPBACK, EXEMPT = "loopback", "exempt"
OTHER_CGROUP, MULTIPATH, UNSEEN = "other_cgroup", "mptcp", "unseen"
_WAYS = {
    LOOPBACK: "went over loopback",
    EXEMPT: "is exempt by its address",
    OTHER_CGROUP: "went past, on sockets created in another cgroup",
    MULTIPATH: "went past, by MPTCP",
    UNSEEN: "went past unseen",
}


class Outcome(Enum):
    """What a proof has shown."""

    HOLDS = "holds"
    NOTHING = "nothing to limit yet"
    FAILS = "does not hold"


class Evidence(NamedTuple):
    """What one direction has moved in some seconds.

    ``passed`` and ``dropped`` are the throttle's bytes, ``at_sockets`` those of the target's TCP
    connections, ``retransmitted`` what they have sent again. These two are None if unknown: only
    the sender knows of retransmissions. ``past`` has what the limit does not cover, by the way it
    took. ``burst`` may pass at once.
    """

    direction: Direction
    asked: Optional[Rate]
    seconds: float
    passed: int
    dropped: int
    at_sockets: Optional[int]
    retransmitted: Optional[int]
    past: Mapping[str, int]
    burst: int = 0

    @property
    def moved(self) -> int:
        """All that the target has moved, as far as known, except what is exempt on request."""
        return self.passed + sum(self._past())

    @property
    def outcome(self) -> Outcome:
        """Whether the target as a whole keeps to the limit, whichever way its bytes took.

        A limit that sees nothing of what goes past does not hold however little that is; loopback
        is left out on purpose.
        """
        counted = self.passed or self.dropped
        unseen = sum(self._past(LOOPBACK))
        if self.asked is not None and (self._is_over(self.asked) or (unseen and not counted)):
            return Outcome.FAILS
        return Outcome.HOLDS if counted else Outcome.NOTHING

    def _past(self, *but: str) -> list[int]:
        return [count for way, count in self.past.items() if way not in (EXEMPT, *but)]

    def _is_over(self, limit: Rate) -> bool:
        allowed = limit.bytes_per_s * self.seconds
        if not allowed:
            return self.moved > 0
        steady = max(0, self.moved - self.burst) / allowed
        verdict = Verdict.judge(self.moved / allowed, steady, dropped=bool(self.dropped))
        return verdict in (Verdict.OVER_LIMIT, Verdict.NOT_WORKING)

    @property
    def conclusion(self) -> str:
        """The outcome for people, with what went past."""
        text = self.outcome.value
        if self.asked is None:
            text = "no limit"
        elif self.outcome is Outcome.FAILS and not any(self._past()) and not self.asked.is_blocked:
            text += f": {self.moved / self.asked.bytes_per_s / self.seconds:.2f} times the limit"
        elif self.outcome is Outcome.HOLDS and self._is_below():
            text += ", far below the limit"
        ways = [f"{format_bytes(count)} {_WAYS[way]}" for way, count in self.past.items() if count]
        return f"{text}: {', '.join(ways)}" if ways else text

    def _is_below(self) -> bool:
        limit = self.asked.bytes_per_s * self.seconds if self.asked else 0
        return not self.dropped and self.moved < limit / 2

    def __str__(self) -> str:
        """``download: asked 1.0 MB/s, in the kernel 1.0 MB/s, ...``."""
        parts = [
            f"{self.direction}: asked {self.asked or 'none'}",
            f"in the kernel {self._rate(self.passed)}",
            f"at the sockets {self._rate(self.at_sockets)}",
        ]
        if self.dropped:
            parts.append(f"{format_bytes(self.dropped)} dropped")
        if self.retransmitted is not None:
            parts.append(f"{format_bytes(self.retransmitted)} retransmitted")
        return f"{', '.join(parts)}: {self.conclusion}"

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; rates are in bytes per second."""
        at_sockets = self.at_sockets
        return {
            "asked": self.asked.bytes_per_s if self.asked else None,
            "kernel": round(self.passed / self.seconds),
            "sockets": None if at_sockets is None else round(at_sockets / self.seconds),
            "bytes_passed": self.passed,
            "bytes_dropped": self.dropped,
            "bytes_at_sockets": at_sockets,
            "bytes_retransmitted": self.retransmitted,
            "past": dict(self.past),
            "holds": _HOLDS[self.outcome],
            "conclusion": self.conclusion,
        }

    def _rate(self, count: Optional[int]) -> str:
        return "unknown" if count is None else format_rate(count / self.seconds)


_HOLDS = {Outcome.HOLDS: True, Outcome.NOTHING: None, Outcome.FAILS: False}


class Proof(NamedTuple):
    """The evidence for all directions of a throttle."""

    evidence: tuple[Evidence, ...]

    @property
    def seconds(self) -> float:
        """The time that was measured."""
        return self.evidence[0].seconds

    @property
    def outcome(self) -> Outcome:
        """It fails if one direction does; there is something to limit if one has something."""
        found = {one.outcome for one in self.evidence}
        return next(one for one in (Outcome.FAILS, Outcome.HOLDS, Outcome.NOTHING) if one in found)

    @property
    def fails(self) -> bool:
        """Whether a limit does not hold."""
        return self.outcome is Outcome.FAILS

    @property
    def moved(self) -> int:
        """All that was moved or dropped, in both directions."""
        return sum(one.moved + one.dropped for one in self.evidence)

    def __str__(self) -> str:
        """One line."""
        return f"Proof of {self.seconds:.1f} s: {'; '.join(map(str, self.evidence))}"

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; ``holds`` is null if nothing has moved."""
        own = {str(one.direction): one.to_json() for one in self.evidence}
        holds, conclusion = _HOLDS[self.outcome], self.outcome.value
        return {"seconds": round(self.seconds, 3), "holds": holds, "conclusion": conclusion, **own}


class _Moment(NamedTuple):
    at_s: float
    counters: Mapping[Direction, Counters]
    look: Optional[tcp.Look]
    runs: bool = True  # a process of the target


class Prover:
    """Measures a throttle from the moment that this is made. Call ``sample`` about every second.

    ``waits`` tells that nothing has moved in the first seconds; the proof is then made with the
    first that moves.
    That a limit does not hold is told only if a second look finds the same.
    """

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self._spending = witness.Spending()
        self._done = self._doubts = False
        self.waits = False
        # What the counters tell contains what the sockets tell: they are read before, and after.
        counters = throttle.counters()
        self._first = self._begin = _Moment(time.monotonic(), counters, witness.look(throttle))

    def sample(self) -> Optional[Proof]:
        """Return the proof once, when there is one."""
        if self._done or time.monotonic() < self._begin.at_s + _ENOUGH_S or not self._spending.due:
            return None
        with self._spending:
            now = self._now()
            proof = self._between(self._begin, now)
        if not proof.moved:
            self.waits = True
            self._begin = now
            return None
        if proof.fails and not self._doubts:
            # Rules that somebody changes at this moment may have told old counts.
            self._doubts = True
            return None
        self._done = True
        return proof

    def end(self) -> Optional[Proof]:
        """Return the proof of the time until now, if ``sample`` has returned none."""
        if self._done:
            return None
        self._done = True
        now = self._now()
        proof = self._between(self._begin, now)
        return proof if proof.moved else self._between(self._first, now)

    def _now(self) -> _Moment:
        look = witness.look(self._throttle)
        runs = bool(witness.processes(self._throttle))
        return _Moment(time.monotonic(), self._throttle.counters(), look, runs)

    def _between(self, begin: _Moment, now: _Moment) -> Proof:
        moved = None
        if begin.look is not None and now.look is not None:
            moved = tcp.between(begin.look, now.look)
        evidence = [self._evidence(direction, begin, now, moved) for direction in now.counters]
        return Proof(tuple(evidence))

    def _evidence(
        self, direction: Direction, begin: _Moment, now: _Moment, moved: Optional[list[Moved]]
    ) -> Evidence:
        before, after = begin.counters[direction], now.counters[direction]
        passed = after.bytes_passed - before.bytes_passed
        dropped = after.bytes_dropped - before.bytes_dropped
        download = direction is Direction.DOWNLOAD
        # Connections that are closed tell nothing any more.
        known = now.look is not None and (now.look.connections or (now.runs and not passed))
        own = moved if known else None
        return Evidence(
            direction,
            self._throttle.limits[direction],
            max(now.at_s - begin.at_s, 1e-3),
            passed,
            dropped,
            None if own is None else sum(_bytes(direction, own)),
            None if own is None or download else sum(one.retransmitted for one in own),
            # TCP tells of what it has sent before it is dropped.
            self._past(direction, moved or [], now, passed if download else passed + dropped),
            self._throttle.burst_bytes(direction),
        )

    def _past(
        self, direction: Direction, moved: list[Moved], now: _Moment, counted: int
    ) -> dict[str, int]:
        """Return what has gone past the limit, by the way it took."""
        own = list(moved)
        past: dict[str, int] = {}
        for way, spared in self._spared(own, now):
            past[way] = sum(_bytes(direction, (o for o in own if o.connection.cookie in spared)))
            own = [one for one in own if one.connection.cookie not in spared]
        rest = sum(_bytes(direction, own))
        if rest - counted <= max(_TOLERANCE_BYTES, rest * _TOLERANCE_SHARE):
            return past
        rest -= counted
        # More was carried than the throttle has seen: by what it may miss, as far as that goes.
        for way, suspects in self._suspects(own):
            past[way] = min(rest, sum(_bytes(direction, suspects)))
            rest -= past[way]
        past[UNSEEN] = rest
        return past

    def _spared(
        self, moved: Collection[Moved], now: _Moment
    ) -> Iterable[tuple[str, Collection[int]]]:
        """Yield the cookies of connections that the limit is not for."""
        traffic = self._throttle.spec.traffic
        if not traffic.loopback:
            yield LOOPBACK, now.look.on_loopback if now.look is not None else ()
        if not traffic.everywhere:
            yield EXEMPT, witness.exempt(self._throttle, [one.connection for one in moved])

    def _suspects(self, moved: Collection[Moved]) -> Iterable[tuple[str, list[Moved]]]:
        """Yield the connections that a throttle may miss, by the reason."""
        if self._throttle.cgroups:
            ids = witness.cgroup_ids(self._throttle)
            yield (
                OTHER_CGROUP,
                [one for one in moved if one.connection.cgroup_id not in (None, *ids)],
            )
        multipath = tcp.multipath(witness.processes(self._throttle))
        yield MULTIPATH, [one for one in moved if one.connection.inode in multipath]


def _bytes(direction: Direction, moved: Iterable[Moved]) -> Iterable[int]:
    download = direction is Direction.DOWNLOAD
    return (one.received if download else one.sent for one in moved)
