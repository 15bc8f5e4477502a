"""TCP connections that were open before a limit: adopted, paced or policed, and all restored."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.attach import attach, refuse_to_override
from pybpfthrottle.backends.ebpf.bucket import Bucket
from pybpfthrottle.backends.ebpf.pacer import Pacer
from pybpfthrottle.backends.ebpf.programs import Role, Scope, Shipped
from pybpfthrottle.backends.ebpf.records import ThrottleLevel, ThrottleSlack, ThrottleSocket
from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.errors import AttachError, BpfError, CgroupError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import sockets
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.sockets import Borrowed, TcpInfo
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.settings import AttachPolicy
from pybpfthrottle.supervisor import Chore

log = logging.getLogger(__name__)

# The map of the socket storage; by a descriptor of a socket it has a ThrottleSocket.
SOCKETS = "SOCKETS"

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_MOST_DESCRIPTORS = 1 << 20

Pids = Callable[[], Iterable[int]]


class Connections:
    """The connections of a throttle that were open when it began.

    The kernel adopts them (Linux 6.12). Where it does not, their uploads are paced from user space
    (Linux 5.10), and their downloads are policed. ``limited`` returns the processes whose sockets
    are limited, ``holders`` all that may have one of those open: it may be handed over.
    """

    def __init__(
        self,
        maps: Mapping[str, Map[Any, Any]],
        bucket: Bucket,
        *,
        limited: Pids,
        holders: Pids,
        policy: AttachPolicy = AttachPolicy(),  # noqa: B008 - an immutable value
    ) -> None:
        self._maps = maps
        self._bucket = bucket
        self._holders = holders
        self._policy = policy
        self._pacer = Pacer(limited, maps[SOCKETS], bucket.seen)
        self._unadopted = 0
        # What the user should know of it, a line each.
        self.notes: tuple[str, ...] = ()

    @contextmanager
    def adopting(
        self, scope: Scope, cgroups: Sequence[Cgroup]
    ) -> Iterator[Callable[[Borrowed], None]]:
        """Have each connection shaped that what this returns is called with, if it can be."""
        spec = programs.read(programs.object_for(scope))
        with ExitStack() as stack:
            adoption = _Adoption(
                lambda program: _attach(spec, program, self._maps, cgroups, self._policy, stack),
                self._pacer,
            )
            yield adoption
        if adoption.refused is not None and adoption.unadopted:
            self.notes = (f"connections that were open before are not shaped: {adoption.refused}",)
        if adoption.unadopted:
            self._unadopted += adoption.unadopted
            self._make_do()

    def _make_do(self) -> None:
        """Pace uploads, and let what nothing slows down owe as much as the policer allows."""
        for direction in self._bucket.rates:
            paced = direction is Direction.UPLOAD
            if paced and self._bucket.paces(direction):
                self._pacer.set_rate(self._bucket.rates[direction])
            self._bucket.leave_room(direction, ThrottleSlack.PACING_SLACK_NS if paced else 0)
            log.info("%s: of open connections %s", direction, self.describe(direction))

    def set_rate(self, rate: Optional[Rate]) -> None:
        """Pace uploads at another rate; None gives connections back what they had."""
        self._pacer.set_rate(rate)

    def describe(self, direction: Direction) -> Optional[str]:
        """Return what is done about those that the kernel did not adopt; None if it adopted all."""
        if not self._unadopted:
            return None
        if direction is Direction.UPLOAD and self._bucket.paces(direction):
            return f"{len(self._pacer)} paced from user space"
        return f"{self._unadopted} policed"

    def chores(self) -> Sequence[Chore]:
        """Return the next round of pacing, if any is paced."""
        return [self._pacer] if len(self._pacer) else []

    def restore(self) -> None:
        """Give all connections that are shaped back what they had."""
        restore(self._holders(), self._maps[SOCKETS])


class _Adoption:
    """Has connections shaped, by the first program at the setsockopt hook that works.

    ``attach_program`` returns what detaches it again. ``unadopted`` counts the connections whose
    downloads, at least, are policed; ``refused`` says what kept a program from being attached.
    """

    def __init__(
        self, attach_program: Callable[[Shipped], Callable[[], None]], pacer: Pacer
    ) -> None:
        self._attach_program = attach_program
        self._detach: Callable[[], None] = lambda: None
        self._pacer = pacer
        self._untried = [
            *programs.with_role(Role.ADOPT),
            *programs.with_role(Role.BELONGS),
        ]
        self._program: Optional[Shipped] = None
        self.unadopted = 0
        self.refused: Optional[AttachError] = None

    def __call__(self, found: Borrowed) -> None:
        """Have a socket shaped, if it is a connection."""
        with suppress(OSError):  # it is none any more
            if found.is_tcp and (info := TcpInfo.of(found.socket)).sends:
                self._shape(found, info.receive_window)

    def _shape(self, found: Borrowed, window: int) -> None:
        while not found.is_local and (self._program or self._attach_next()):
            answer = _ask(found.socket, window)
            if answer is None:
                return
            if self._program is not None and self._program.role is Role.BELONGS:
                if answer:
                    self._pacer.take(found)
                    break
                return  # the shaper has it
            if answer:
                return
            self._detach()
            self._program = None
        self.unadopted += 1

    def _attach_next(self) -> bool:
        while self._untried:
            program = self._untried.pop(0)
            try:
                self._detach = self._attach_program(program)
            except (BpfError, CgroupError) as error:
                self.refused = error if isinstance(error, AttachError) else self.refused
                log.debug("Connections that are open are not for %s: %s", program.name, error)
                continue
            self._program = program
            return True
        return False


def _attach(
    spec: Any,
    program: Shipped,
    maps: Mapping[str, Map[Any, Any]],
    cgroups: Sequence[Cgroup],
    policy: AttachPolicy,
    stack: ExitStack,
) -> Callable[[], None]:
    """Load a program for a moment; ``stack`` detaches it, or what is returned does."""
    with ExitStack() as undo:
        loaded = undo.enter_context(loader.load(spec, [program.name], maps=maps))
        for target in cgroups:
            live = loaded.programs[program.name]
            refuse_to_override(live, target, program.attach_type, policy)
            attachment = attach(live, target, program.attach_type, policy, repeats=True)
            undo.callback(attachment.detach)
        attached = stack.enter_context(undo.pop_all())
    return attached.close


def _ask(own: socket.socket, window: int) -> Optional[bool]:
    """Return what the program at the setsockopt hook says of a connection with a receive window.

    None if no program answers: it belongs to another cgroup, and is neither limited nor shaped.
    """
    try:
        # It may move before the program has it in hand.
        own.setsockopt(ThrottleLevel.ADOPT, window + window // 4, 0)
    except OSError as error:
        return False if error.errno == errno.EPERM else None
    return True


def restore(pids: Iterable[int], shaped: Map[Any, Any]) -> None:
    """Give the connections of processes back the pacing and window they had.

    ``shaped`` is the map SOCKETS, by descriptor. What nobody has open any more needs nothing.
    """
    records: Map[int, ThrottleSocket] = shaped.typed(U32, StructureCodec(ThrottleSocket))
    for own in sockets.tcp_of(pids):
        with suppress(KeyError, OSError):
            _restore(own, records[own.fileno()])


def _restore(own: socket.socket, record: ThrottleSocket) -> None:
    if record.pacing:
        pacing = record.original_pacing.to_bytes(4, sys.byteorder)
        own.setsockopt(socket.SOL_SOCKET, sockets.SO_MAX_PACING_RATE, pacing)
    if record.clamp and record.original_clamp:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, record.original_clamp)


def pids(cgroups: Iterable[Cgroup]) -> list[int]:
    """Return the processes in cgroups and below them, but for this one."""
    found: set[int] = set()
    for cgroup in cgroups:
        with suppress(OSError):
            found.update(cgroup.pids_below())
    # 0 stands for a process of another pid namespace; our own sockets are nobody's traffic.
    return sorted(found - {0, os.getpid()})


class Guard:
    """A process that gives connections back what they had when this one is killed.

    The kernel detaches programs whose link ends with its holder, but a pacing rate that was set
    stays with its socket. It waits in a child for the end of this process; ``end`` sends it away.
    It holds the map of the record too: so others see that a throttle is still cleared up.
    """

    def __init__(self, holders: Pids, maps: Mapping[str, Map[Any, Any]], record: str) -> None:
        kept = [maps[SOCKETS].fd, maps[record].fd]
        reading, self._writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _wait_and_restore(reading, holders, maps[SOCKETS], kept)
            finally:
                os._exit(0)
        os.close(reading)

    def end(self) -> None:
        """It is not needed any more."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._writing)


def _wait_and_restore(
    reading: int, holders: Pids, shaped: Map[Any, Any], kept: Sequence[int]
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
    restore(holders(), shaped)
