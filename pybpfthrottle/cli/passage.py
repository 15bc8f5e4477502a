"""Whether limited processes have exchanged packets that no program has seen."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Optional

from pybpfthrottle import witness
from pybpfthrottle.errors import Error
from pybpfthrottle.linux import traffic
from pybpfthrottle.throttle import Throttle

# Checking a process at every sample costs more than it tells: check at samples 1, 2, 4, 8 ...
_FIRST_LOOK = 1
_MOST_PROCESSES = 100


class Passage:
    """Collects signs of packets from connections, and from devices that nobody else uses."""

    def __init__(self, throttle: Throttle) -> None:
        self._throttle = throttle
        self._pids = witness.processes(throttle)
        self._before = self._devices()
        self._looked_s = time.monotonic()
        self._samples = 0
        self._next = _FIRST_LOOK
        self._seen = False

    def look(self) -> None:
        """Look for signs if that is due; call this at each sample."""
        self._samples += 1
        if self._samples >= self._next:
            self._next *= 2
            self.seen()

    @property
    def was_seen(self) -> bool:
        """Whether there were signs at a look so far."""
        return self._seen

    def seen(self, *, thorough: bool = False) -> bool:
        """Whether there have been signs so far."""
        if not self._seen:
            since_s = time.monotonic() - self._looked_s
            self._looked_s += since_s
            self._pids = witness.processes(self._throttle) or self._pids
            some = self._pids[:_MOST_PROCESSES]
            self._seen = traffic.tcp_moved(some, since_s) or self._devices_moved(some, thorough)
        return self._seen

    def _devices(self) -> Optional[traffic.DeviceBytes]:
        return traffic.device_bytes(self._pids[0]) if self._pids else None

    def _devices_moved(self, pids: list[int], thorough: bool) -> bool:
        if not traffic.differ(self._before, self._devices()):
            return False
        if not traffic.share_network(pids):
            return True
        # If others use these devices too, only a socket that is not limited is a sign.
        return thorough and _some_escape(pids)


def _some_escape(pids: list[int]) -> bool:
    from pybpfthrottle.coverage import LOOPBACK, NOT_IP, Coverage  # a look that is rarely taken

    with suppress(Error, OSError), Coverage() as coverage:
        for pid in pids:
            with suppress(Error):
                for one in coverage.report(pid).sockets:
                    reason = one.reason.code if one.reason else None
                    if one.covered is False and reason not in (NOT_IP.code, LOOPBACK.code):
                        return True
    return False
