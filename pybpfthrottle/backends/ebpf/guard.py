"""A process that gives connections back what they had when this one is killed."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import Any, Callable, Iterable

from pybpfthrottle.backends.ebpf import connections
from pybpfthrottle.bpf.maps import Map

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_MOST_DESCRIPTORS = 1 << 20


class Guard:
    """Waits in a child for the end of this process. ``end`` sends it away.

    The kernel detaches programs whose link ends with its holder, but a pacing rate that was set
    stays with its socket.
    """

    def __init__(self, pids: Callable[[], Iterable[int]], shaped: Map[Any, Any]) -> None:
        reading, self._writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                _wait_and_restore(reading, pids, shaped)
            finally:
                os._exit(0)
        os.close(reading)

    def end(self) -> None:
        """It is not needed any more."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._writing)


def _wait_and_restore(
    reading: int, pids: Callable[[], Iterable[int]], shaped: Map[Any, Any]
) -> None:
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    # A link that this process held would not end with the other one.
    kept = sorted({reading, shaped.fd})
    for first, last in zip([-1, *kept], [*kept, _MOST_DESCRIPTORS]):
        os.closerange(first + 1, last)
    with suppress(OSError):
        os.read(reading, 1)
    connections.restore(pids(), shaped)
