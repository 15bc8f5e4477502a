"""What a running throttle did, as records for machines and lines for people."""

from __future__ import annotations

import json
from typing import Any, Mapping, TextIO

from pybpfthrottle.backends.protocol import Backend
from pybpfthrottle.cli.say import say
from pybpfthrottle.meter import Reading
from pybpfthrottle.model import Verdict
from pybpfthrottle.throttle import Throttle

SCHEMA_VERSION = 1


class JsonLines:
    """Writes one JSON object per line: ``start``, ``sample`` once a second, ``note``, ``end``.

    Each has the fields in ``common``.
    """

    def __init__(self, file: TextIO, common: Mapping[str, Any]) -> None:
        self._file = file
        self._common = common
        self.failed = False

    def start(self, throttle: Throttle, **fields: Any) -> None:
        """What was put in force."""
        self._write(
            "start",
            schema=SCHEMA_VERSION,
            cgroups=[cgroup.path for cgroup in throttle.cgroups],
            id=throttle.id,
            how={str(direction): how for direction, how in throttle.how().items()},
            **fields,
        )

    def sample(self, elapsed_s: float, readings: list[Reading]) -> None:
        """The rates of the last seconds, the counters since the start."""
        self._write("sample", elapsed_s=round(elapsed_s, 3), **_by_direction(readings))

    def note(self, text: str) -> None:
        """Something about what is covered."""
        self._write("note", text=text)

    def end(self, elapsed_s: float, readings: list[Reading], **fields: Any) -> None:
        """The rates over the whole time."""
        self._write("end", elapsed_s=round(elapsed_s, 3), **_by_direction(readings), **fields)

    def _write(self, event: str, **fields: Any) -> None:
        if self.failed:
            return
        try:
            self._file.write(json.dumps({"event": event, **self._common, **fields}) + "\n")
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            # A full disk must not end the limit, nor the limited command.
            self.failed = True
            say(f"cannot write to {self._file.name}: {error.strerror}; JSON lines end here")


def _by_direction(readings: list[Reading]) -> dict[str, Any]:
    return {str(reading.direction): reading.record() for reading in readings}


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
