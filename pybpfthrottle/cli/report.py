"""What is said of a limit that has counted nothing."""

from __future__ import annotations

from pybpfthrottle.backends.protocol import Backend
from pybpfthrottle.model import Verdict

NOTHING_PASSED = "Nothing was sent or received, so there was nothing to limit."


def not_working(backend: Backend) -> str:
    """Return what to say while packets pass that a throttle does not see."""
    return (
        f"{Verdict.NOT_WORKING.value}: packets pass, and none of them is limited."
        f" {backend.counted_nothing}. Connections that were open before may be the cause: start"
        " them again; pybpfthrottle backends --try tests the backends"
    )


def never_ran(*, pid: object, cgroup: str, backend: Backend, marked: bool = False) -> str:
    """Return what to say if packets have passed that a throttle has not seen.

    ``marked``: the limit was for the sockets of processes, not for a cgroup.
    """
    why = (
        "   Packets have passed, but none from a marked socket: pybpfthrottle sockets --pid N"
        " shows\n   which sockets of a process can be limited; verify-setup looks for other"
        " causes."
        if marked
        else "   Packets have passed, but none from a socket of this cgroup: a socket belongs to"
        " the\n   cgroup that it was created in, so a connection that was opened before the"
        " process\n   entered this cgroup is not limited here; verify-setup looks for"
        " other causes."
    )
    return f"⚠️  PID {pid} cgroup {cgroup}: {backend.counted_nothing}\n{why}"
