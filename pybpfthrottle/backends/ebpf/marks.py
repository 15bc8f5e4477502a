"""Marks on the sockets of selected processes, present and future.

Once a process id is in the map PROCESSES, the kernel marks each socket that the process creates or
accepts. Sockets that it had before, or that others hand over to it, are found by scanning its
descriptors.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import ExitStack, suppress
from functools import cache
from typing import (
    Any,
    Callable,
    Collection,
    ContextManager,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    Sequence,
)

from pybpfthrottle.backends.ebpf import features, programs
from pybpfthrottle.backends.ebpf.programs import Role
from pybpfthrottle.backends.ebpf.records import ThrottleProcess, ThrottleProcessFlags
from pybpfthrottle.bpf import abi, links
from pybpfthrottle.bpf.codecs import RAW, U32, StructureCodec
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.loader import Loadable
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.ringbuf import RingBuffer
from pybpfthrottle.errors import Error, NoMarksError, ProcessError
from pybpfthrottle.linux import descendants, process, sockets
from pybpfthrottle.linux.endpoints import IPPROTO_MPTCP
from pybpfthrottle.linux.sockets import Borrowed, Scan, descriptors, why_refused
from pybpfthrottle.logger import Logger
from pybpfthrottle.supervisor import LOOKS, Frequent
from pybpfthrottle.targets import Selection

log = Logger(__name__)

MARKS, PROCESSES = "MARKS", "PROCESSES"
PERIOD_S = 1.0
# While there are none: there may be hundreds of throttles that wait.
_WAITING_PERIOD_S = 8.0
_REPORTER = "pybpft_exec"
# As long as the kernel keeps it, with the byte that ends it.
_NAME_BYTES = 16

_OTHER_NAMESPACE = (
    "the kernel does not compare the process ids of this pid namespace (of a container)"
)

# Shapes a connection that was open before; only valid within the context.
Adopting = Callable[[], ContextManager[Callable[[Borrowed], None]]]


def processes_in(maps: Mapping[str, Map[Any, Any]]) -> Map[int, ThrottleProcess]:
    """Return the map of processes, by process id."""
    return maps[PROCESSES].typed(U32, StructureCodec(ThrottleProcess))


class Processes:
    """The processes of a throttle in a map that it has for itself; ``slot`` is the throttle's."""

    def __init__(self, maps: Mapping[str, Map[Any, Any]], slot: int) -> None:
        self.slot = slot
        self._maps = maps
        self._map = processes_in(maps)
        self._tracing: Optional[Tracing] = None
        self._expects = False

    def pids(self) -> list[int]:
        """Return them."""
        return list(self._map)

    def add(self, pid: int, *, follow: bool) -> None:
        """Add one; with ``follow`` the kernel adds what it starts."""
        flags = ThrottleProcessFlags.FOLLOW if follow else 0
        self._map[pid] = ThrottleProcess(flags=flags, slot=self.slot)

    def expect(self, names: Iterable[str], *, follow: bool) -> bool:
        """Have the kernel add each process that begins to have such a name, as far as it keeps it.

        Names that another throttle expects remain that one's until its end. Returns False where the
        kernel does not follow processes: then nothing is done.
        """
        if self._tracing is None:
            return False
        flags = ThrottleProcessFlags.BY_NAME | (ThrottleProcessFlags.FOLLOW if follow else 0)
        for name in names:
            self._tracing.expect(name, ThrottleProcess(flags=flags, slot=self.slot))
            self._expects = True
        return True

    def by_name(self, pids: Iterable[int]) -> list[int]:
        """Return those of some processes that the kernel has added, and nobody else since."""
        return [pid for pid in pids if self._is_by_name(pid)] if self._expects else []

    def _is_by_name(self, pid: int) -> bool:
        found = self._map.get(pid)
        return (
            found is not None
            and found.slot == self.slot
            and bool(found.flags & ThrottleProcessFlags.BY_NAME)
        )

    def discard(self, pid: int) -> None:
        """Remove one, if it is there."""
        self._map.pop(pid, None)

    def are_others(self, pid: int) -> bool:
        """Whether another throttle limits a process by the same map."""
        return False

    def may_replace(self, mark: int) -> bool:
        """Whether the throttle that a socket is marked for has ended."""
        return False

    def follow(self, *, executions: bool) -> Optional[Tracing]:
        """Have the kernel follow them; the caller closes what is returned.

        Raises what Tracing.begin raises.
        """
        self._tracing = Tracing.begin(self._maps, executions=executions)
        return self._tracing

    def end(self) -> None:
        """Remove all, where others go on to use the map."""


class Marks(Frequent):
    """The marks of one limit."""

    def __init__(
        self,
        selection: Selection,
        maps: Mapping[str, Map[Any, Any]],
        adopting: Adopting,
        spares: Callable[[Borrowed], bool] = lambda found: False,
        *,
        processes: Optional[Processes] = None,
    ) -> None:
        """``spares`` tells which sockets are limited by other means, and get no mark.

        ``processes`` has those of the throttle, if it does not have all maps for itself.
        """
        self._selection = selection
        self._marks = maps[MARKS]
        self._processes = processes or Processes(maps, 0)
        self._mark_for = U32.encode(self._processes.slot)
        self._adopting = adopting
        self._spares = spares
        self._scan = Scan()
        self._inodes: set[int] = set()
        self._began_s = time.monotonic()
        self._has_passed = False
        # Processes that shared sockets at the first check; a cleanup does so for a moment.
        self._suspects: Optional[list[int]] = None
        self.due_s = time.monotonic()
        self._tracing: Optional[Tracing] = None
        self._is_traced = False
        # Whether the kernel adds all new children of processes in the map.
        self._all_followed = False
        # Those that were let go: whoever looks for children finds them below their parents.
        self._let_go: set[int] = set()
        # Whether the last pass found no processes.
        self._is_empty = False
        self._notes: dict[str, None] = {}

    def follow(self) -> None:
        """Follow the children started from now on, even if their parent ends.

        Raises NoMarksError if the kernel uses other process ids than this namespace.
        """
        if self._selection.new_sockets:
            if not process.in_first_namespace():
                raise NoMarksError(_OTHER_NAMESPACE)
            self._trace()

    def begin(self, selection: Selection) -> None:
        """Mark all existing sockets. Requires attached programs, and ``follow``.

        Raises ProcessError for a process that has ended or may not be inspected.
        """
        self._selection = selection
        chosen = [one.pid for one in self._selection.processes]
        self._take_in([*chosen, *self._selection.matching()])
        for one in self._selection.processes:
            if not one.alive():
                raise ProcessError(f"process {one.pid} ({one.name}) has ended")
        # Sockets that appear during the first pass count as part of it.
        while self._mark_new():
            pass
        for pid in chosen:
            refused = self._scan.refused.get(pid)
            # An error only if more rights would help; otherwise limit what can be limited.
            if isinstance(refused, PermissionError) and why_refused(refused).capability:
                raise ProcessError(
                    f"may not look into process {process.listed([pid])}: {refused.strerror};"
                    " CAP_SYS_PTRACE is needed for the sockets that it has open already"
                )

    def take_in(self, pids: Iterable[int]) -> None:
        """Limit more processes."""
        self._take_in(pids)
        self._mark_new()

    def expect(self, names: Iterable[str]) -> bool:
        """Have processes that begin to have such a name limited before anybody looks at them.

        Returns whether the kernel can.
        """
        return self._processes.expect(names, follow=self._selection.children)

    def by_name(self, pids: Iterable[int]) -> list[int]:
        """Return those of some processes that are limited for their names alone, as expected."""
        return self._processes.by_name(pids)

    def let_go(self, pids: Iterable[int]) -> Iterator[socket.socket]:
        """Limit some processes no longer; yield each of their sockets that had a mark."""
        pids = list(pids)
        self._let_go.update(pids)
        for pid in pids:
            self._processes.discard(pid)
        for found in Scan().new(pids):
            with suppress(KeyError, OSError):
                if self._marks.elements.lookup(U32.encode(found.socket.fileno())) == self._mark_for:
                    self._marks.elements.delete(U32.encode(found.socket.fileno()))
                    yield found.socket

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program, or -1."""
        return -1 if self._tracing is None else self._tracing.fileno()

    def run(self) -> None:
        """Limit processes that have begun to match; now and then, scan all of them again."""
        begin_s = time.thread_time()
        self.changes_chores = False
        if self._tracing is not None:
            self._started(self._tracing.executed())
        if time.monotonic() < self.due_s:
            return
        self.due_s = time.monotonic() + PERIOD_S
        self._pass()
        # Whoever chooses by a rule tells when there is a process.
        waits = self._is_empty and not self._selection.matches_some
        period_s = _WAITING_PERIOD_S if waits else PERIOD_S
        # A pass that had to wait for the CPU does not delay the next one.
        self.due_s = LOOKS.next_due_s(self, time.thread_time() - begin_s, period_s)
        self._look_for_sharing()

    def pids(self) -> list[int]:
        """Return the processes that are limited now."""
        return [pid for pid in self._processes.pids() if not process.has_ended(pid)]

    def notes(self) -> tuple[str, ...]:
        """Return what the user should know, a line each; more may come."""
        return tuple(self._notes)

    def links(self) -> Sequence[Link]:
        """Return what keeps the map of processes up to date in the kernel."""
        return () if self._tracing is None else self._tracing.links

    def close(self) -> None:
        """Follow no more processes."""
        self._processes.end()
        if self._tracing is not None:
            self._tracing.close()
            self._tracing = None

    def _trace(self) -> None:
        try:
            self._tracing = self._processes.follow(executions=self._selection.matches_some)
            self._is_traced = True
            self.expect(self._selection.certain_names)
        except (Error, OSError) as error:
            if self._selection.children or self._selection.waits:
                self._note(
                    f"processes that are started from now on are looked for every {PERIOD_S:g} s"
                    f" and not followed at once, since the kernel refused that: {error}"
                )

    def _started(self, executed: Iterable[int]) -> None:
        """Limit the matching ones among processes that have executed a program."""
        found = [pid for pid in set(executed) if self._selection.matches(pid)]
        if found:
            self._take_in(found)
            self._mark_new()

    def _pass(self) -> None:
        """Scan again: which processes have ended, which match now, and their sockets."""
        pids, matching = self._processes.pids(), list(self._selection.matching())
        was_empty, self._is_empty = self._is_empty, not (pids or matching)
        self._let_go = {pid for pid in self._let_go if not process.has_ended(pid)}
        if was_empty and self._is_empty:
            return  # it waits
        for pid in pids:
            if process.has_ended(pid):
                self._processes.discard(pid)
        self._take_in(matching)
        self._mark_new()

    def _take_in(self, pids: Iterable[int]) -> None:
        """Limit processes and their children; without tracing, also earlier ones' new children."""
        pids, known = set(pids), set(self._processes.pids())
        self._let_go -= pids
        new = (pids - known) | set(self._processes.by_name(pids & known))
        if new:
            self.due_s = min(self.due_s, time.monotonic() + PERIOD_S)
        parents = new if self._all_followed else known | new
        while new or parents:
            for pid in new:
                self._processes.add(pid, follow=self._selection.children)
                if process.has_ended(pid):  # before it was in the map: nobody else removes it
                    self._processes.discard(pid)
            known |= new
            if not self._selection.children:
                return
            # The kernel adds children started once their parent is in the map; these are earlier.
            below = descendants.of(parents) - known - self._let_go
            below -= descendants.of(self._let_go)
            new = {pid for pid in below if not self._processes.are_others(pid)}
            parents = new
        self._all_followed = self._is_traced

    def _mark_new(self) -> int:
        """Mark the sockets that have no mark; return how many there were."""
        count = 0
        with self._adopting() as adopt:
            for found in self._scan.new(self._processes.pids()):
                if self._mark(found):
                    count += 1
                    adopt(found)
        self.changes_chores |= count > 0
        for pid, error in self._scan.refused.items():
            self._note(
                f"the sockets that {process.listed([pid])} had open before are not limited, and"
                " neither is what they accept: they cannot be examined"
                f" ({_why_not_looked_at(error)}). A limit of its whole cgroup covers them"
            )
        return count

    def mark(self, found: Borrowed) -> None:
        """Mark a socket and shape it."""
        with self._adopting() as adopt:
            if self._mark(found):
                adopt(found)

    def _mark(self, found: Borrowed) -> bool:
        """Mark a socket; return whether the mark is new."""
        owner = found.place.pid
        if not found.is_ip:
            if found.socket.family == socket.AF_PACKET:
                self._note(f"what {process.listed([owner])} sends by AF_PACKET is not limited")
            return False
        if found.socket.proto == IPPROTO_MPTCP and not features.MPTCP_SOCKET.available():
            self._note(
                f"{process.listed([owner])} uses MPTCP: this kernel does not tell whose packets"
                " those are (Linux 5.19 and its BTF do), and neither its connections nor what its"
                " listeners accept is limited. --whole-cgroup limits them"
            )
        if self._spares(found):
            return False
        self._inodes.add(found.place.inode)
        try:
            self._put_mark(U32.encode(found.socket.fileno()))
        except FileExistsError:
            return False
        except OSError as error:
            number = found.place.number
            self._note(f"descriptor {number} of {process.listed([owner])} is not limited: {error}")
            return False
        return True

    def _put_mark(self, key: bytes) -> None:
        """Mark a socket, unless it has a mark that counts: then raise FileExistsError."""
        try:
            self._marks.elements.update(key, self._mark_for, abi.BPF_NOEXIST)
        except FileExistsError:
            if not self._processes.may_replace(U32.decode(self._marks.elements.lookup(key))):
                raise
            self._marks.elements.update(key, self._mark_for)

    def _look_for_sharing(self) -> None:
        """Note which other processes use marked sockets: a mark applies to all users of a socket.

        Checked a while after the first pass, in the same moment as for other limits, and again for
        the processes found then.
        """
        if not self._has_passed:
            self._has_passed = True
            return
        if self._suspects is None:
            shared = sockets.shared(self._began_s) if self._inodes else {}
            users = {pid for inode in self._inodes for pid in shared.get(inode, ())}
            self._suspects = self._sharing(users)
        else:
            for pid in self._sharing(self._suspects):
                self._note(
                    f"{process.listed([pid])} uses some of the sockets too: these are limited for"
                    " it as well"
                )
            self._suspects = []
        if not self._suspects:
            self._inodes.clear()

    def _sharing(self, pids: Collection[int]) -> list[int]:
        """Return the processes that have a marked socket open and are not limited."""
        if not pids:
            return []
        found = []
        limited = set(self._processes.pids())
        for pid in pids:
            if pid != os.getpid() and pid not in limited:
                with suppress(OSError):
                    if any(one.inode in self._inodes for one in descriptors(pid)):
                        found.append(pid)
        return found

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes[text] = None
            log.info("%s", text)


def _why_not_looked_at(error: OSError) -> str:
    text = str(error.strerror)
    return f"{text}: {why_refused(error).text}" if isinstance(error, PermissionError) else text


@cache
def _tracers(names: tuple[str, ...]) -> Loadable:
    """Return programs that keep maps of processes up to date, fitted to this kernel once."""
    return Loadable(programs.read("processes"), names)


class Tracing:
    """Keeps the map PROCESSES up to date: adds children, removes processes that have ended.

    Programs at the kernel's tracepoints for fork, exit and, with ``executions``, exec do so.
    """

    def __init__(
        self,
        executed: Optional[RingBuffer],
        names: Optional[Map[Any, Any]],
        links: Sequence[Link],
        attached: ExitStack,
    ) -> None:
        self._executed = executed
        self._names = names
        # What the kernel has for somebody else, or no room for, by the name and the slot.
        self._refused: dict[tuple[str, int], ThrottleProcess] = {}
        # Throttles that share it may be in several threads.
        self._busy = threading.Lock()
        self.links = links
        self._attached = attached

    @classmethod
    def begin(
        cls, maps: Mapping[str, Map[Any, Any]], *, executions: bool, processes: bool = True
    ) -> Tracing:
        """Attach the programs, which share the throttle's ``maps``.

        With ``executions`` they also report each process that executes a program; without
        ``processes`` they do only that. Linux 5.8, with the kernel's BTF; needs CAP_PERFMON.
        Raises BpfError, ObjectFileError or OSError.
        """
        hooks = {
            program.name: str(program.hook)
            for program in programs.with_role(Role.FOLLOW)
            if (executions if program.name == _REPORTER else processes)
        }
        with ExitStack() as undo:
            loaded = undo.enter_context(_tracers(tuple(hooks)).load(maps=maps))
            made = [
                undo.enter_context(
                    links.attach_raw_tracepoint(loaded.programs[program], tracepoint)
                )
                for program, tracepoint in hooks.items()
            ]
            executed = None
            if executions:
                executed = undo.enter_context(RingBuffer(loaded.maps["EXECUTED"], U32))
            names = None
            if processes:
                names = loaded.maps["NAMES"].typed(RAW, StructureCodec(ThrottleProcess))
            return cls(executed, names, made, undo.pop_all())

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program, or -1."""
        return -1 if self._executed is None else self._executed.fileno()

    def executed(self) -> Iterator[int]:
        """Return the processes that have executed a program since the last call."""
        return iter(()) if self._executed is None else self._executed.read(0)

    def expect(self, name: str, expected: ThrottleProcess) -> None:
        """Have the kernel add each process that begins to have a name.

        The first to ask has it, and after its end the next.
        """
        with self._busy:
            self._expect(name, expected)

    def _expect(self, name: str, expected: ThrottleProcess) -> None:
        if self._names is None:
            return
        key = _name_key(name)
        try:
            self._names.elements.update(key, bytes(expected), abi.BPF_NOEXIST)
        except OSError as error:
            known = self._names.get(key)
            if known is None or known.slot != expected.slot:
                self._refused[name, expected.slot] = expected
                log.info("Processes named %s are limited only a moment later: %s", name, error)

    def forget(self, slot: int) -> None:
        """Expect no more processes for a throttle; others that expect the same may have them."""
        if self._names is None:
            return
        with self._busy:
            for name, expected in list(self._names.items()):
                if expected.slot == slot:
                    self._names.pop(name, None)
            waiting, self._refused = self._refused, {}
            for (name, other), wanted in waiting.items():
                if other != slot:
                    self._expect(name, wanted)

    def close(self) -> None:
        """Detach and close all."""
        self._attached.close()


def _name_key(name: str) -> bytes:
    return os.fsencode(name)[: _NAME_BYTES - 1].ljust(_NAME_BYTES, b"\0")
