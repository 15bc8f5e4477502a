"""Following processes without a gap: programs at the kernel's fork, exec and exit tracepoints."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Iterator, Mapping

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.programs import Role
from pybpfthrottle.bpf import links, loader
from pybpfthrottle.bpf.codecs import U32
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.ringbuf import RingBuffer

_EXECUTION = "sched_process_exec"


class Tracing:
    """Keeps the map PROCESSES: a child of what is in it comes in, and what has ended goes.

    ``maps`` are those of the throttle, with which it shares them.
    With ``executions`` it also tells of each process that executes a program. Linux 5.8, with the
    kernel's BTF; needs CAP_PERFMON. Raises BpfError, ObjectFileError or OSError.
    """

    def __init__(self, maps: Mapping[str, Map[Any, Any]], *, executions: bool) -> None:
        hooks = {
            program.name: str(program.hook)
            for program in programs.with_role(Role.FOLLOW)
            if executions or program.hook != _EXECUTION
        }
        self._stack = ExitStack()
        with ExitStack() as undo:
            loaded: Object = undo.enter_context(
                loader.load(programs.read("processes"), hooks, maps=maps)
            )
            for program, tracepoint in hooks.items():
                link = links.attach_raw_tracepoint(loaded.programs[program], tracepoint)
                undo.callback(link.detach)
            self._executed = (
                undo.enter_context(RingBuffer(loaded.maps["EXECUTED"], U32)) if executions else None
            )
            self._stack = undo.pop_all()

    def fileno(self) -> int:
        """A descriptor that is readable when a process may have executed a program; or -1."""
        return -1 if self._executed is None else self._executed.fileno()

    def executed(self) -> Iterator[int]:
        """The processes that have executed a program since it was asked last."""
        return iter(()) if self._executed is None else self._executed.read(0)

    def close(self) -> None:
        """Detach and close all."""
        self._stack.close()
