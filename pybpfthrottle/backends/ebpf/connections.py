"""TCP connections that were open before a limit: adopt, pace or police, and restore them."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.attach import attach, refuse_to_override
from pybpfthrottle.backends.ebpf.bucket import Bucket
from pybpfthrottle.backends.ebpf.programs import Role, Scope, Shipped
from pybpfthrottle.backends.ebpf.records import (
    ThrottleGateWindow,
    ThrottleLevel,
    ThrottleSlack,
    ThrottleSocket,
)
from pybpfthrottle.backends.ebpf.unadopted import Unadopted
from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.errors import AttachError, BpfError, CgroupError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import sockets
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.sockets import Borrowed, TcpInfo
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.settings import AttachPolicy
from pybpfthrottle.supervisor import Chore

log = Logger(__name__)

# The socket storage map: from a socket's descriptor to its ThrottleSocket.
SOCKETS = "SOCKETS"

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_MOST_DESCRIPTORS = 1 << 20

Pids = Callable[[], Iterable[int]]
Load = Callable[[Scope, str], Object]


class Connections:
    """The connections of a throttle that were open when it began.

    The kernel adopts them (Linux 6.12). Otherwise they are shaped from user space (Linux 5.10):
    their uploads are paced, and their downloads go through the gate, or are policed if there is
    none. Both are policed for a Python of 32 bits on a kernel of 64 bits. ``limited`` returns the
    processes whose sockets are limited, ``holders`` all that may have one of these sockets open, as
    they may be handed over.
    """

    def __init__(
        self,
        maps: Mapping[str, Map[Any, Any]],
        bucket: Bucket,
        *,
        load: Load,
        limited: Pids,
        holders: Pids,
        advertised: Callable[[Rate], int],
        policed: Callable[[], None],
        policy: AttachPolicy = AttachPolicy(),  # noqa: B008 - an immutable value
        slot: int = 0,
    ) -> None:
        """``load`` loads a program for a scope with the throttle's maps; ``slot`` is its place.

        ``advertised`` returns, for a rate, the window that the kernel may advertise by itself, or 0
        where no gate is in force. ``policed`` is called when there are downloads that are policed.
        """
        self._shaped = maps[SOCKETS]
        self._bucket = bucket
        self._load = load
        self._advertised = advertised
        self._policed = policed
        self._holders = holders
        self._policy = policy
        self._slot = slot
        self._unadopted = Unadopted(
            *(limited, maps[SOCKETS], bucket.seen),
            advertised=self._window,
            policed=policed,
            slot=slot,
        )
        # How many are not shaped in any way.
        self._not_asked = 0
        # What the user should know of it, a line each.
        self.notes: tuple[str, ...] = ()

    @contextmanager
    def adopting(
        self, scope: Scope, cgroups: Sequence[Cgroup]
    ) -> Iterator[Callable[[Borrowed], None]]:
        """Yield a function that shapes the connection it is called with, if possible."""
        load = partial(self._load, scope)
        with ExitStack() as stack:
            adoption = _Adoption(
                lambda program: _attach(load, program, cgroups, self._policy, stack),
                self._unadopted.take,
            )
            yield adoption
        if adoption.refused is not None and adoption.not_adopted:
            self.notes = (f"connections that were open before are not shaped: {adoption.refused}",)
        if adoption.not_adopted:
            self._not_asked += adoption.not_asked
            self.follow()

    def follow(self) -> None:
        """Shape connections from user space by the limits as they are now."""
        if not self._not_asked and not len(self._unadopted):
            return
        upload = Direction.UPLOAD
        if upload in self._bucket.rates:
            rate = self._bucket.in_force(upload) if self._bucket.paces(upload) else None
            self._unadopted.rate = rate
        self._unadopted.run()
        for direction, limit in self._bucket.rates.items():
            if limit is not None and not limit.is_blocked:
                self._leave_room(direction)
                log.info("%s: open connections: %s", direction, self.describe(direction))

    def _leave_room(self, direction: Direction) -> None:
        """Allow as much debt as it takes; where nothing slows connections down, as the policer."""
        if direction is Direction.UPLOAD:
            self._bucket.leave_room(direction, ThrottleSlack.PACING_SLACK_NS)
        elif self._shapes(direction):
            self._bucket.leave_room(direction, ThrottleGateWindow.GATE_SLACK_NS)
        else:
            self._bucket.leave_room(direction)
        if direction is Direction.DOWNLOAD and (self._not_asked or not self._shapes(direction)):
            self._policed()

    def move_rate(self, rate: Rate) -> None:
        """Pace uploads at another rate from the next round on."""
        self._unadopted.rate = rate

    def _window(self) -> int:
        """Return the window that the kernel may advertise, or 0 where no gate is in force."""
        download = Direction.DOWNLOAD
        rate = self._bucket.rates.get(download) and self._bucket.in_force(download)
        if rate is None or self._bucket.shaping(download).method != "gate":
            return 0
        return self._advertised(rate)

    def _shapes(self, direction: Direction) -> bool:
        """Whether connections are shaped from user space in a direction."""
        if direction is Direction.UPLOAD:
            return self._bucket.paces(direction)
        return bool(self._window())

    def describe(self, direction: Direction) -> Optional[str]:
        """Return how the connections not adopted by the kernel are limited; None without any."""
        shaped, policed = 0, self._not_asked + len(self._unadopted)
        if self._shapes(direction):
            refused = self._unadopted.policed if direction is Direction.DOWNLOAD else 0
            shaped, policed = len(self._unadopted) - refused, self._not_asked + refused
        how = "paced" if direction is Direction.UPLOAD else "gated"
        found = [f"{shaped} {how} from user space"] if shaped else []
        found += [f"{policed} policed"] if policed else []
        return ", ".join(found) or None

    def chores(self) -> Sequence[Chore]:
        """Return the chore for connections that are shaped from user space, if there are any."""
        return [self._unadopted] if len(self._unadopted) else []

    def forget(self, own: socket.socket) -> None:
        """Give one connection back what it had, and have nothing to do with it any more."""
        self._unadopted.forget(own)
        records: Map[int, ThrottleSocket] = self._shaped.typed(U32, StructureCodec(ThrottleSocket))
        with suppress(KeyError, OSError):
            _restore(own, records[own.fileno()])
            del records[own.fileno()]

    def release(self) -> None:
        """Give back what was set from user space: that is known of sockets that have moved, too."""
        self._unadopted.release()

    def restore(self) -> None:
        """Restore the pacing and window of all shaped connections."""
        restore(self._holders(), self._shaped, self._slot)


class _Adoption:
    """Shapes connections by the first program that works at the setsockopt hook.

    ``attach_program`` returns what detaches it again, and ``take`` is called with each connection
    that is to be shaped from user space. ``not_adopted`` counts them, with those of which no
    program could be asked, ``not_asked``; ``refused`` says why none was attached.
    """

    def __init__(
        self,
        attach_program: Callable[[Shipped], Callable[[], None]],
        take: Callable[[Borrowed], None],
    ) -> None:
        self._attach_program = attach_program
        self._detach: Callable[[], None] = lambda: None
        self._take = take
        self._untried = [
            *programs.with_role(Role.ADOPT),
            *programs.with_role(Role.BELONGS),
        ]
        self._program: Optional[Shipped] = None
        self.not_adopted = self.not_asked = 0
        self.refused: Optional[AttachError] = None
        if syscall.is_compatible_mode():  # net/socket.c, do_sock_setsockopt()
            self._untried.clear()
            self.refused = AttachError(
                "for a Python of 32 bits on a kernel of 64 bits, no program is asked"
            )

    def __call__(self, found: Borrowed) -> None:
        """Shape a socket if it is a connection."""
        with suppress(OSError):  # no longer connected
            if found.is_tcp and (info := TcpInfo.of(found.socket)).is_connected:
                self._shape(found, info.receive_window)

    def _shape(self, found: Borrowed, window: int) -> None:
        while not found.is_local and (self._program or self._attach_next()):
            answer = _ask(found.socket, window)
            if answer is None:
                return
            if self._program is not None and self._program.role is Role.BELONGS:
                if answer:
                    self._take(found)
                    self.not_adopted += 1
                return  # otherwise the shaper has adopted it
            if answer:
                return
            self._detach()
            self._program = None
        self.not_adopted += 1
        self.not_asked += 1

    def _attach_next(self) -> bool:
        while self._untried:
            program = self._untried.pop(0)
            try:
                self._detach = self._attach_program(program)
            except (BpfError, CgroupError) as error:
                if isinstance(error, AttachError):
                    # Without the frames that it came through: they hold megabytes.
                    self.refused = error.with_traceback(None)
                log.debug("Connections that are open are not for %s: %s", program.name, error)
                continue
            self._program = program
            return True
        return False


def _attach(
    load: Callable[[str], Object],
    program: Shipped,
    cgroups: Sequence[Cgroup],
    policy: AttachPolicy,
    stack: ExitStack,
) -> Callable[[], None]:
    """Load and attach a program temporarily; ``stack`` or the returned function detaches it."""
    with ExitStack() as undo:
        loaded = undo.enter_context(load(program.name))
        for target in cgroups:
            live = loaded.programs[program.name]
            refuse_to_override(live, target, program.attach_type, policy)
            attachment = attach(live, target, program.attach_type, policy, repeats=True)
            undo.callback(attachment.detach)
        attached = stack.enter_context(undo.pop_all())
    return attached.close


def _ask(own: socket.socket, window: int) -> Optional[bool]:
    """Ask the program at the setsockopt hook to adopt a connection; return whether it did.

    ``window`` is the receive window. None if no program answers: the socket belongs to another
    cgroup, and is neither limited nor shaped.
    """
    try:
        # The window may move before the program sees it.
        own.setsockopt(ThrottleLevel.ADOPT, window + window // 4, 0)
    except OSError as error:
        return False if error.errno == errno.EPERM else None
    return True


def restore(pids: Iterable[int], shaped: Map[Any, Any], slot: Optional[int] = None) -> None:
    """Give the connections of processes back the pacing and window they had.

    ``shaped`` is the map SOCKETS, by descriptor. Closed sockets need no restoring. Only those of
    the throttle in a ``slot``, if one is given: then another one may shape them.
    """
    records: Map[int, ThrottleSocket] = shaped.typed(U32, StructureCodec(ThrottleSocket))
    for own in sockets.tcp_of(pids):
        with suppress(KeyError, OSError):
            record = records[own.fileno()]
            if slot in (None, record.slot):
                _restore(own, record)
                if slot:
                    del records[own.fileno()]


def _restore(own: socket.socket, record: ThrottleSocket) -> None:
    if record.pacing:
        pacing = record.original_pacing.to_bytes(4, sys.byteorder)
        own.setsockopt(socket.SOL_SOCKET, sockets.SO_MAX_PACING_RATE, pacing)
    if record.clamp and record.original_clamp:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, record.original_clamp)


def pids(cgroups: Iterable[Cgroup]) -> list[int]:
    """Return the processes in cgroups and their descendants, except this process."""
    found: set[int] = set()
    for cgroup in cgroups:
        with suppress(OSError):
            found.update(cgroup.pids_below())
    # 0 stands for a process of another pid namespace; our own sockets carry no user traffic.
    return sorted(found - {0, os.getpid()})


class Guard:
    """A child process that restores connections if this process is killed.

    When a process dies the kernel detaches its links, but a pacing rate stays with the socket.
    The child waits for the end of this process; ``end`` dismisses it. It also holds the map of the
    record, so that others see that the throttle is still being cleared up.
    """

    def __init__(
        self, holders: Pids, maps: Mapping[str, Map[Any, Any]], record: str, slot: int = 0
    ) -> None:
        kept = [maps[SOCKETS].fd, maps[record].fd]
        reading, self._writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _wait_and_restore(reading, holders, maps[SOCKETS], kept, slot)
            finally:
                os._exit(0)
        os.close(reading)

    def end(self) -> None:
        """Dismiss the child: it is no longer needed."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._writing)


def _wait_and_restore(
    reading: int, holders: Pids, shaped: Map[Any, Any], kept: Sequence[int], slot: int
) -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    # A link that this process held would not end with the other one.
    open_ones = sorted({reading, *kept, *cgroups_v2.descriptors()})
    for first, last in zip([-1, *open_ones], [*open_ones, _MOST_DESCRIPTORS]):
        os.closerange(first + 1, last)
    with suppress(OSError):
        os.read(reading, 1)
    restore(holders(), shaped, slot)
