"""A network namespace of a command's own, and the line by which it reaches this one's networks."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Collection, Optional, Sequence

from pybpfthrottle import wayout
from pybpfthrottle.conditions.model import Conditions, Impairment, Injected
from pybpfthrottle.diversion.tally import Tally
from pybpfthrottle.errors import LaunchError, NamespaceError
from pybpfthrottle.line import resolver
from pybpfthrottle.line.keeping import LineKeeper
from pybpfthrottle.linux import devices, libc, netns, tuntap
from pybpfthrottle.model import Direction
from pybpfthrottle.supervisor import Chore, Periodic
from pybpfthrottle.wayout import Upkeep, WayOut

_INNER = "net0"
_CLONE_NEWNET = 0x40000000
_NOT_ENTERED = 125
_DRAINED_S, _LOOK_S = 10.0, 0.01
# How long this machine may be a router for others, after somebody has removed our rules.
_REPAIRED_S = 1.0
# A device keeps what was not read yet in a ring of this size: 100 ms at 1 Gbit/s.
_QUEUE_PACKETS = 10_000


class OwnNetwork:
    """A new network namespace. ``open`` gives it its line, ``close`` or ``with`` ends that.

    The namespace itself ends with its last process.
    """

    def __init__(self) -> None:
        """Make the namespace, with nothing but a loopback device. Raises NamespaceError."""
        self._closing = ExitStack()
        self._keeper: Optional[LineKeeper] = None
        self._tallies: list[Tally] = []
        self._way: Optional[WayOut] = None
        self._device = ""
        self._repairing: list[Chore] = []
        self._resolver = resolver.choose()
        self._notes = [self._resolver.note] if self._resolver.note else []
        self._impairments = [Impairment(), Impairment()]
        try:
            self._namespace = netns.new()
        except OSError as error:
            raise NamespaceError(
                f"cannot make a network namespace: {error.strerror}; --netns needs root"
            ) from error
        self._closing.callback(os.close, self._namespace)

    def enter(self) -> None:
        """Move this process in; for a command that is about to be executed. Raises LaunchError."""
        try:
            libc.setns(self._namespace, _CLONE_NEWNET)
            self._resolver.enter()
        except OSError as error:
            raise LaunchError(
                f"cannot enter the command's network namespace: {error}", status=_NOT_ENTERED
            ) from error

    def open(self, way_id: str) -> None:
        """Lay the line. ``way_id`` is an id that no other line has.

        Raises NamespaceError; then nothing is left of it.
        """
        with ExitStack() as undo:
            try:
                self._open(way_id, undo)
            except OSError as error:
                raise NamespaceError(
                    f"the command's network cannot be set up: {error}; this needs root, and TUN"
                    " devices (CONFIG_TUN)"
                ) from error
            self._closing.push(undo.pop_all())

    def _open(self, way_id: str, undo: ExitStack) -> None:
        keeper = LineKeeper.join()
        undo.callback(keeper.leave)
        self._way = way = wayout.begin(way_id)
        undo.callback(wayout.end, way)
        keeper.restore_later(way.id)
        outer, device = tuntap.create(tuntap.IFF_TUN, f"{wayout.DEVICES}%d")
        undo.callback(os.close, outer)
        self._device = device
        devices.keep_quiet(device)
        devices.set_up(device, queue=_QUEUE_PACKETS)
        for each in way.ends:
            devices.add_address(device, each.outer)
        inner = netns.inside(self._namespace, lambda: _lay_inside(way))
        undo.callback(os.close, inner)
        upkeep = wayout.finish(way, device)
        self._notes += wayout.firewalls()
        if len(way.networks) == 1:
            self._notes.append(f"the command has no IPv6: {wayout.why_no_ipv6()}")
        self._tallies = [Tally.create() for _ in Direction]
        for tally in self._tallies:
            undo.callback(tally.close)
        keeper.serve((inner, outer), self._tallies, self._impairments)
        self._keeper = keeper
        self._repairing = [Periodic(_REPAIRED_S, lambda: self._repair(upkeep))]

    def _repair(self, upkeep: Upkeep) -> None:
        for note in upkeep.run():
            if note not in self._notes:
                self._notes.append(note)

    def set(self, conditions: Conditions, *, anew: bool = True) -> None:
        """Impair what passes from now on, in both directions; before ``open`` from its begin on.

        That is ``anew`` or with the chances that are running.
        """
        both = conditions.both_ways()
        self._impairments = [both.impairment(direction) for direction in Direction]
        if self._keeper is not None:
            self._keeper.change(self._impairments, anew=anew)

    def follow(self) -> None:
        """Do nothing: all that the command starts is in the namespace."""

    def attached(self) -> Sequence[tuple[object, int]]:
        """Return that no programs are attached for it."""
        return ()

    def serves(self) -> Collection[Direction]:
        """Return the directions whose packets get lost here, if they are to."""
        return tuple(Direction)

    def counts(self) -> dict[Direction, Injected]:
        """Return what was done to each direction's packets, and what else became of them."""
        if not self._tallies:
            return {}
        outer, inner, unread = self._overflowed()
        found = dict(zip(Direction, map(Tally.injected, self._tallies, (outer, inner))))
        found[Direction.DOWNLOAD] = replace(found[Direction.DOWNLOAD], unread=unread)
        return found

    def _overflowed(self) -> tuple[int, int, int]:
        """Return what the devices had no room for, this machine's first, and the sockets."""

        def look() -> tuple[int, int]:
            return devices.unsent(_INNER), netns.unread()

        return (devices.unsent(self._device), *netns.inside(self._namespace, look))

    def addresses(self) -> dict[str, list[str]]:
        """Return the addresses of the command, and those by which it reaches this machine."""
        ends = [] if self._way is None else self._way.ends
        return {
            "command": [str(each.inner.ip) for each in ends],
            "machine": [str(each.outer.ip) for each in ends],
        }

    def __str__(self) -> str:
        """Return its addresses, for people."""
        inner, outer = map(" and ".join, self.addresses().values())
        return f"a network namespace of its own: its address is {inner}, this machine's {outer}"

    def notes(self) -> list[str]:
        """Return what is otherwise than may be expected, a line each."""
        why = self._why_down()
        return [*self._notes, *([f"the command's network is down: {why}"] if why else [])]

    def _why_down(self) -> str:
        if self._keeper is None:
            return ""
        of = {Direction.DOWNLOAD: self._device, Direction.UPLOAD: f"{_INNER} of the command"}
        gone = [name for direction, name in of.items() if direction in self._keeper.gone]
        if gone:
            return f"somebody has removed the device {' and '.join(gone)}"
        return self._keeper.ended or ""

    def chores(self) -> list[Chore]:
        """Return what a supervisor has to do for it."""
        return [] if self._keeper is None else [self._keeper, *self._repairing]

    def close(self) -> None:
        """End the line, and restore what it changed. Doing so twice is no error.

        What the command has sent before its end arrives first, if that takes no longer than 10 s.
        """
        keeper, self._keeper = self._keeper, None
        with self._closing:  # which ends it although somebody does not want to wait
            if keeper is not None and not keeper.gone and self.counts()[Direction.UPLOAD].seen:
                self._drain(keeper)

    def _drain(self, keeper: LineKeeper) -> None:
        deadline_s = time.monotonic() + _DRAINED_S
        with suppress(OSError):
            while keeper.ended is None and netns.inside(self._namespace, netns.is_sending):
                keeper.wait_until(lambda: False, _LOOK_S)
                if time.monotonic() >= deadline_s:
                    return
        keeper.drain(deadline_s - time.monotonic())

    def __enter__(self) -> OwnNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _lay_inside(way: WayOut) -> int:
    """Set up the devices in the new namespace; return the descriptor of the line's end."""
    inner, device = tuntap.create(tuntap.IFF_TUN, _INNER)
    try:
        devices.set_up("lo")
        devices.keep_quiet(device)
        devices.set_up(device, queue=_QUEUE_PACKETS)
        for each in way.ends:
            devices.add_address(device, each.inner)
            devices.add_default_route(device, each.inner)
    except BaseException:
        os.close(inner)
        raise
    return inner
