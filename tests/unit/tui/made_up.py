"""A machine that is made up: processes that move something in each second, and limits."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Awaitable, Callable, Optional, Sequence

from pybpfthrottle.backends.protocol import Match, Record
from pybpfthrottle.errors import Error
from pybpfthrottle.inforce import InForce
from pybpfthrottle.linux.connections import Connection
from pybpfthrottle.linux.endpoints import Description, Endpoint, Kind
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.meter import Reading
from pybpfthrottle.model import Counters, Direction, Limits, Rate, Target, ThrottleSpec
from pybpfthrottle.traffic import ProcessTraffic, Scope, Usage
from pybpfthrottle.tui.app import Top
from pybpfthrottle.tui.machine import Connections, Force, Look
from pybpfthrottle.tui.view import View
from pybpfthrottle.usage import Interval

SCREENS = Path(__file__).parent / "screens"
HOSTILE = "\x1b[31m[bold]x\n"
K, M = 1024, 1024**2


def moving(
    pid: Optional[int], name: str, down: int, up: int, *, user: int = 0, cgroup: str = "/a"
) -> ProcessTraffic:
    """A process that has moved this much over the internet, and a little on loopback."""
    usage = {Scope.INTERNET: Usage(1, down, 1, up), Scope.LOOPBACK: Usage(1, 7, 1, 7)}
    where = f"/sys/fs/cgroup{cgroup}" if cgroup else ""
    return ProcessTraffic(pid or 0, pid, name, user, where, True, usage)


def limited(target: Target, *, key: str = "abc123", owner: int = 1, **limits: Rate) -> InForce:
    """A throttle of a target, with limits by the names of directions."""
    given = {Direction[direction.upper()]: rate for direction, rate in limits.items()}
    spec = ThrottleSpec(target, given)
    return InForce((Record(key, spec, Identity(owner, 0, 0), "ebpf", Match.MARKS),))


class Covers:
    """Which throttles limit which processes: those that are told."""

    def __init__(self, throttles: Sequence[InForce]) -> None:
        self.throttles = throttles

    def of(self, pid: Optional[int], cgroup: str) -> list[InForce]:
        """As Cover.of."""
        return [one for one in self.throttles if pid in one.record.spec.target.pids]


class MadeUp:
    """A source for the full screen. What it is asked to do is noted in ``asked``."""

    def __init__(self, *processes: ProcessTraffic) -> None:
        self.processes = list(processes)
        self.throttles: list[InForce] = []
        self.asked: list[tuple[Any, ...]] = []
        self.foreseen: list[str] = ["By ebpf: the sockets."]
        self.notes: list[str] = []
        self.refusal: Optional[Error] = None
        self.mine: list[str] = []
        self.actual = 900 * K
        self.dropped = 3
        self.failure: Optional[Exception] = None
        self.seconds = 0

    def look(self) -> Look:
        """One second later, all have moved the same again."""
        if self.failure is not None:
            raise self.failure
        interval = Interval([], self.processes, 1.0, Covers(self.throttles))
        return Look(interval, {one.id: self._forces(one) for one in self.throttles})

    def connections(self, members: Sequence[ProcessTraffic]) -> Connections:
        """Two connections and a listener of each process."""
        kind = Kind(2, 1, 6)
        self.seconds += 1
        moved = M * self.seconds, K * self.seconds
        local, remote = Endpoint("192.0.2.1", 40000), Endpoint("198.51.100.7", 443)
        found = [
            Connection(1, 1, Description(kind, local, remote, "established"), *moved, 0.02),
            Connection(1, 2, Description(kind, local, remote, "close-wait"), K, 0, 0.0015),
            Connection(1, 3, Description(kind, Endpoint("0.0.0.0", 80), None, "listen")),  # noqa: S104
        ]
        return Connections(self.seconds, found if members[0].pid is not None else [])

    def foresee(self, target: Target, limits: Limits) -> Sequence[str]:
        """Say what was told."""
        return self._answer("foresee", target, limits) or self.foreseen

    def limit(self, target: Target, limits: Limits) -> Sequence[str]:
        """Limit it from the next look on."""
        self._answer("limit", target, limits)
        given = {str(direction): rate for direction, rate in limits.items()}
        self.throttles.append(limited(target, **given))
        self.mine.append("what is limited here")
        return self.notes

    def change(self, throttles: Sequence[InForce], target: Target, limits: Limits) -> Sequence[str]:
        """Note it."""
        self._answer("change", [one.id for one in throttles], target, limits)
        return self.notes

    def pause(self, throttles: Sequence[InForce]) -> str:
        """Note it."""
        self._answer("pause", [one.id for one in throttles])
        return "It was paused."

    def remove(self, throttles: Sequence[InForce]) -> None:
        """Remove them."""
        self._answer("remove", [one.id for one in throttles])
        self.throttles = [one for one in self.throttles if one not in throttles]

    def own(self) -> Sequence[str]:
        """Say what was told."""
        return self.mine

    def close(self) -> None:
        """Do nothing."""

    def done(self) -> list[tuple[Any, ...]]:
        """Return what it was asked to do but to look ahead."""
        return [one for one in self.asked if one[0] != "foresee"]

    def _answer(self, *asked: Any) -> None:
        self.asked.append(asked)
        if self.refusal is not None:
            raise self.refusal

    def _forces(self, one: InForce) -> dict[Direction, Force]:
        counters = Counters(1, 100, M, self.dropped, 10)
        return {
            direction: Force(
                Reading(direction, rate, self.actual, counters, dropped=self.dropped),
                "ebpf",
                "gate" if direction is Direction.DOWNLOAD else "pace",
            )
            for direction, rate in one.limits.items()
        }


def some() -> MadeUp:
    """Five processes, one of them with a hostile name, and what belongs to nobody."""
    return MadeUp(
        moving(26235, "curl", 4 * M, 12 * K, cgroup="/user.slice"),
        moving(1840, "rsync", 3 * K, M, cgroup="/system.slice/backup.service"),
        moving(77, HOSTILE, 2 * K, K),
        moving(4194000, "日本語プロセス", 500, 100, user=4242),
        moving(9, "rsync", 90, 80),
        moving(None, "unknown", 60, 50, cgroup=""),
    )


class Shown:
    """A running full screen, its keys, and what it shows."""

    def __init__(self, app: Top, source: MadeUp, view: View, pilot: Any) -> None:
        self.app, self.source, self.view, self._pilot = app, source, view, pilot

    async def press(self, *keys: str) -> None:
        """Press keys, and wait until nothing more happens."""
        await self._pilot.press(*keys)
        await self.settle()

    async def type(self, text: str) -> None:
        """Press the keys of a text."""
        await self.press(*text)

    async def settle(self) -> None:
        """Wait for what is going on but for the looks."""
        await self._pilot.pause()
        waiting = [one for one in self.app.workers if one.name != "watch"]
        if waiting:  # of none it would wait for all
            await self.app.workers.wait_for_complete(waiting)
        await self._pilot.pause()

    async def look(self) -> None:
        """Have a second go by."""
        await self.app.look()
        await self.settle()

    async def resize(self, width: int, height: int) -> None:
        """Give the terminal another size."""
        await self._pilot.resize_terminal(width, height)
        await self.settle()

    def strips(self) -> list[Any]:
        """Return the lines with their styles."""
        return list(self.app.screen._compositor.render_strips())

    def lines(self) -> list[str]:
        """Return the lines."""
        return ["".join(segment.text for segment in strip).rstrip() for strip in self.strips()]

    def text(self) -> str:
        """Return the whole screen."""
        return "\n".join(self.lines()) + "\n"

    def labels(self) -> list[str]:
        """Return what the rows are, from the top."""
        return [self.view.name(row) for row in self.view.rows]


def screen(
    test: Callable[[Shown], Awaitable[None]],
    source: Optional[MadeUp] = None,
    view: Optional[View] = None,
    size: tuple[int, int] = (80, 24),
) -> Top:
    """Run a test with a full screen that has looked once; return the app after its end."""
    source, view = source or some(), view or View()
    app = Top(source, view, interval_s=3600.0)

    async def run() -> None:
        async with running(app, source, view, size) as shown:
            await test(shown)

    asyncio.run(run())
    app.close()
    return app


@asynccontextmanager
async def running(app: Top, source: MadeUp, view: View, size: tuple[int, int]) -> Any:
    """Yield the full screen once it has looked."""
    async with app.run_test(size=size) as pilot:
        shown = Shown(app, source, view, pilot)
        while view.look is None and app.failure is None:
            await asyncio.sleep(0.01)
        await shown.settle()
        yield shown
