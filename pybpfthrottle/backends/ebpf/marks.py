"""Marks on the sockets of selected processes: those that they have, and those that come.

The kernel marks what a process makes or accepts once its id is in the map PROCESSES. What it had
before, and what others hand over to it, is found by looking through its descriptors.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import ExitStack, suppress
from typing import Any, Callable, ContextManager, Iterable, Iterator, Mapping, Optional

from pybpfthrottle.backends.ebpf import features, programs
from pybpfthrottle.backends.ebpf.programs import Role
from pybpfthrottle.backends.ebpf.records import ThrottleProcess
from pybpfthrottle.bpf import abi, links, loader
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.ringbuf import RingBuffer
from pybpfthrottle.errors import Error, NoMarksError, ProcessError
from pybpfthrottle.linux import process
from pybpfthrottle.linux.sockets import Borrowed, Scan, descriptors, why_refused
from pybpfthrottle.targets import Selection

log = logging.getLogger(__name__)

MARKS, PROCESSES = "MARKS", "PROCESSES"
PERIOD_S = 1.0
# Looking through processes takes no more than this part of one CPU's time.
_MOST_OF_TIME = 0.01
_IPPROTO_MPTCP = 262
_MARK = b"\0\0\0\0"
_EXECUTION = "sched_process_exec"

_OTHER_NAMESPACE = (
    "process ids of this pid namespace (of a container) are not those that the kernel compares"
)

# Has a connection that was open before shaped; only while the context lasts.
Adopting = Callable[[], ContextManager[Callable[[Borrowed], None]]]


class Marks:
    """The marks of one limit."""

    def __init__(
        self,
        selection: Selection,
        maps: Mapping[str, Map[Any, Any]],
        adopting: Adopting,
        spares: Callable[[Borrowed], bool] = lambda found: False,
    ) -> None:
        """``spares`` tells which sockets are limited otherwise, and get no mark."""
        self._selection = selection
        self._maps = maps
        self._marks = maps[MARKS].elements
        self._processes: Map[int, ThrottleProcess] = maps[PROCESSES].typed(
            U32, StructureCodec(ThrottleProcess)
        )
        self._adopting = adopting
        self._spares = spares
        self._scan = Scan()
        self._inodes: set[int] = set()
        # Who seemed to share sockets at the first look, which a cleanup may do for a moment.
        self._suspects: Optional[list[int]] = None
        self.due_s = time.monotonic()
        self._tracing: Optional[Tracing] = None
        # Whether the kernel takes in whatever those in the map start from now on.
        self._all_followed = False
        self._notes: dict[str, None] = {}

    def follow(self) -> None:
        """Have what is started from now on followed, whoever its parent is by then.

        Raises NoMarksError where the kernel knows processes by other ids.
        """
        if self._selection.new_sockets:
            if not process.in_first_namespace():
                raise NoMarksError(_OTHER_NAMESPACE)
            self._trace()

    def begin(self, selection: Selection) -> None:
        """Mark all that is there. The programs have to be attached, and processes followed.

        Raises ProcessError for a process that has ended, or that may not be looked into.
        """
        self._selection = selection
        chosen = [one.pid for one in self._selection.processes]
        self._take_in([*chosen, *self._selection.matching()])
        for one in self._selection.processes:
            if not one.alive():
                raise ProcessError(f"process {one.pid} ({one.name}) has ended")
        # What appears while the first pass is under way belongs to it.
        while self._mark_new():
            pass
        for pid in chosen:
            refused = self._scan.refused.get(pid)
            # What more rights would not change is no error: what can be limited is.
            if isinstance(refused, PermissionError) and why_refused(refused).capability:
                raise ProcessError(
                    f"may not look into process {process.listed([pid])}: {refused.strerror};"
                    " for the sockets that it has open already CAP_SYS_PTRACE is needed"
                )

    def take_in(self, pids: Iterable[int]) -> None:
        """Limit more processes."""
        self._take_in(pids)
        self._mark_new()

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program, or -1."""
        return -1 if self._tracing is None else self._tracing.fileno()

    def run(self) -> None:
        """Take in what has begun to match; and once in a while, look through all of them again."""
        begin_s = time.thread_time()
        if self._tracing is not None:
            self._started(self._tracing.executed())
        if time.monotonic() < self.due_s:
            return
        self.due_s = time.monotonic() + PERIOD_S
        self._pass()
        # A pass that had to wait for the CPU does not put off the next one.
        pause_s = (time.thread_time() - begin_s) / _MOST_OF_TIME
        self.due_s = time.monotonic() + max(PERIOD_S, pause_s)
        self._look_for_sharing()

    def pids(self) -> list[int]:
        """The processes that are limited now."""
        return [pid for pid in self._processes if not process.has_ended(pid)]

    def notes(self) -> tuple[str, ...]:
        """What was found that the user should know, a line each; more may come."""
        return tuple(self._notes)

    def close(self) -> None:
        """Follow no more processes."""
        if self._tracing is not None:
            self._tracing.close()
            self._tracing = None

    def _trace(self) -> None:
        try:
            self._tracing = Tracing.begin(self._maps, executions=self._selection.matches_some)
        except (Error, OSError) as error:
            if self._selection.children or self._selection.matches_some:
                self._note(
                    f"processes that are started from now on are looked for every {PERIOD_S:g} s"
                    f" and not followed at once, since the kernel refused that: {error}"
                )

    def _started(self, executed: Iterable[int]) -> None:
        """Take in what matches of the processes that have executed a program."""
        found = [pid for pid in set(executed) if self._selection.matches(pid)]
        if found:
            self._take_in(found)
            self._mark_new()

    def _pass(self) -> None:
        """Once more: what has ended, what matches now, and what it has open."""
        for pid in list(self._processes):
            if process.has_ended(pid):
                self._processes.pop(pid, None)
        self._take_in(self._selection.matching())
        self._mark_new()

    def _take_in(self, pids: Iterable[int]) -> None:
        """These, and what they have started; without tracing also what those before have."""
        known = set(self._processes)
        new = set(pids) - known
        parents = new if self._all_followed else known | new
        value = ThrottleProcess(follow=self._selection.children)
        while new or parents:
            for pid in new:
                self._processes[pid] = value
                if process.has_ended(pid):  # before it was in the map: nobody else takes it out
                    self._processes.pop(pid, None)
            known |= new
            if not self._selection.children:
                return
            # Once its parent is in the map the kernel takes a process in; those before are here.
            families = process.families()
            new = {child for pid in parents for child in families.get(pid, ())} - known
            parents = new
        self._all_followed = self._tracing is not None

    def _mark_new(self) -> int:
        """Mark the sockets that have none; how many there were."""
        count = 0
        with self._adopting() as adopt:
            for found in self._scan.new(self._processes):
                if self._mark(found):
                    count += 1
                    adopt(found)
        for pid, error in self._scan.refused.items():
            self._note(
                f"the sockets that {process.listed([pid])} had open before are not limited,"
                " nor what they accept: they cannot be looked at"
                f" ({_why_not_looked_at(error)}). A limit of its whole cgroup covers them"
            )
        return count

    def mark(self, found: Borrowed) -> None:
        """Mark a socket, and have it shaped."""
        with self._adopting() as adopt:
            if self._mark(found):
                adopt(found)

    def _mark(self, found: Borrowed) -> bool:
        """Whether it had no mark and has one now."""
        owner = found.place.pid
        if not found.is_ip:
            if found.socket.family == socket.AF_PACKET:
                self._note(f"what {process.listed([owner])} sends by AF_PACKET is not limited")
            return False
        if found.socket.proto == _IPPROTO_MPTCP and not features.MPTCP_SOCKET.available():
            self._note(
                f"{process.listed([owner])} uses MPTCP: this kernel does not tell whose packets"
                " those are (Linux 5.19 and its BTF do), and neither its connections nor what its"
                " listeners accept is limited. --whole-cgroup limits them"
            )
        if self._spares(found):
            return False
        self._inodes.add(found.place.inode)
        try:
            self._marks.update(U32.encode(found.socket.fileno()), _MARK, abi.BPF_NOEXIST)
        except FileExistsError:
            return False
        except OSError as error:
            number = found.place.number
            self._note(f"descriptor {number} of {process.listed([owner])} is not limited: {error}")
            return False
        return True

    def _look_for_sharing(self) -> None:
        """Say who else uses marked sockets: a mark belongs to a socket, whoever uses it.

        After the first pass, and once more for those who did.
        """
        if self._suspects is None:
            self._suspects = self._sharing(process.running())
        else:
            for pid in self._sharing(self._suspects):
                self._note(
                    f"{process.listed([pid])} uses some of the sockets too: these are limited for"
                    " all who do"
                )
            self._suspects = []
        if not self._suspects:
            self._inodes.clear()

    def _sharing(self, pids: Iterable[int]) -> list[int]:
        """Those that have a marked socket open, and are not limited."""
        found = []
        for pid in pids:
            if pid != os.getpid() and pid not in self._processes:
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


class Tracing:
    """Keeps the map PROCESSES: a child of what is in it comes in, and what has ended goes.

    These are programs at the kernel's tracepoints of fork, exit and, with ``executions``, exec.
    """

    def __init__(self, executed: Optional[RingBuffer], attached: ExitStack) -> None:
        self._executed = executed
        self._attached = attached

    @classmethod
    def begin(
        cls, maps: Mapping[str, Map[Any, Any]], *, executions: bool, processes: bool = True
    ) -> Tracing:
        """Attach the programs, which share the throttle's ``maps``.

        With ``executions`` they also tell of each process that executes a program, without
        ``processes`` they do nothing else. Linux 5.8, with the kernel's BTF; needs CAP_PERFMON.
        Raises BpfError, ObjectFileError or OSError.
        """
        hooks = {
            program.name: str(program.hook)
            for program in programs.with_role(Role.FOLLOW)
            if (executions if program.hook == _EXECUTION else processes)
        }
        with ExitStack() as undo:
            loaded = undo.enter_context(loader.load(programs.read("processes"), hooks, maps=maps))
            for program, tracepoint in hooks.items():
                link = links.attach_raw_tracepoint(loaded.programs[program], tracepoint)
                undo.callback(link.detach)
            executed = None
            if executions:
                executed = undo.enter_context(RingBuffer(loaded.maps["EXECUTED"], U32))
            return cls(executed, undo.pop_all())

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program, or -1."""
        return -1 if self._executed is None else self._executed.fileno()

    def executed(self) -> Iterator[int]:
        """Return the processes that have executed a program since it was asked last."""
        return iter(()) if self._executed is None else self._executed.read(0)

    def close(self) -> None:
        """Detach and close all."""
        self._attached.close()
