"""The gate of a throttle: the program that diverts acknowledgements to the keeper process."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.connections import SOCKETS
from pybpfthrottle.backends.ebpf.crowd import Crowd
from pybpfthrottle.backends.ebpf.keeping import RING, KeeperProcess, Kept, Pids
from pybpfthrottle.backends.ebpf.programs import Scope
from pybpfthrottle.backends.ebpf.records import ThrottleGateWindow
from pybpfthrottle.backends.ebpf.shared import GATE, Seat
from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.abi import BPF_F_MMAPABLE
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.errors import Error
from pybpfthrottle.model import Rate
from pybpfthrottle.supervisor import Chore

_MAPS = (GATE, "CGROUP_BUCKETS", "CGROUP_CONFIGS")


# By the words of the keeper.
_WHY_UNGATED = {
    "options": "acknowledgements are signed (TCP-MD5, TCP-AO), and only the kernel can sign them",
    "unanswered": "acknowledgements that the gate's keeper sent did not reach their senders (a"
    " firewall or a policy route may stop packets of raw sockets)",
    "unsent": "acknowledgements of the gate's keeper are refused (a firewall or a policy route"
    " stops packets of raw sockets)",
}


class Gate:
    """The gate of one throttle, or why it has none (``refused``). ``close`` opens all windows."""

    def __init__(self, scope: Scope, pids: Pids, refused: Optional[str]) -> None:
        """Begin to start the keeper, which takes a while, unless the gate is refused already.

        ``pids`` returns the processes whose connections may go through the gate.
        """
        self.program = programs.gate(scope)
        self.refused = refused
        self._pids = pids
        self._keeper: Optional[KeeperProcess] = None
        self._kept: Optional[Kept] = None
        if refused is None:
            try:
                self._keeper = KeeperProcess.join()
                self._keeper.ring()
            except OSError as error:
                self.refused = f"its keeper cannot be started: {error}"
            except Error as error:
                self.refuse(str(error))

    def spec(self, name: str) -> ObjectSpec:
        """Return a shipped object, such as "throttle": with a gate, as its keeper needs it.

        Raises ObjectFileError.
        """
        spec = programs.read(name)
        if self._keeper is None or GATE not in spec.maps:
            return spec
        # The keeper maps it into its memory (Linux 5.5).
        shared = spec.maps[GATE].changed(flags=BPF_F_MMAPABLE)
        return spec.changed(maps={**spec.maps, GATE: shared})

    def load(
        self,
        maps: Mapping[str, Map[Any, Any]],
        seat: Optional[Seat] = None,
        *,
        of_crowd: bool = False,
    ) -> Optional[Object]:
        """Load the program with a throttle's maps, and have the keeper serve it.

        Return None if it is refused. With a ``seat`` the maps are shared; ``of_crowd`` leaves the
        program to ``enter``.
        """
        if self._keeper is None:
            return None
        if SOCKETS not in maps:
            self.refuse("nothing is shaped")
            return None
        gate, *limits = (maps[name] for name in _MAPS)
        slot = 0 if seat is None else seat.slot
        try:
            ring = self._keeper.ring()
            # The keeper gets ready while the program is loaded.
            self._kept = self._keeper.serve(gate, limits, self._pids, slot)
            if of_crowd:
                return Object({}, {})
            if seat is not None:
                return seat.load([self.program.name], maps, ring)
            used = {**maps, RING: ring}
            return loader.load(self.spec("gate"), [self.program.name], maps=used)
        except (Error, OSError) as error:
            self.refuse(str(error))
            return None

    def enter(self, crowd: Crowd) -> None:
        """Share the program of a crowd. Raises Error or OSError."""
        if self._keeper is not None:
            crowd.open_gate(self._keeper.ring())

    def wait(self) -> None:
        """Wait until the keeper serves the gate; connections that begin earlier would stall."""
        if self._keeper is not None and self._kept is not None:
            self._keeper.wait(self._kept)

    def refuse(self, why: str) -> None:
        """Do without the gate."""
        self.close()
        self.refused = why

    def on_datagram(self, call: Callable[[], object]) -> None:
        """Call something once a large datagram has left, if there is a gate."""
        if self._kept is not None:
            self._kept.on_datagram = call

    def advertised(self, rate: Rate) -> int:
        """Return the window that the kernel may advertise by itself, in bytes.

        0 if no keeper opens windows. By the same law as in ebpf_src/shape.h.
        """
        way_us = None if self._kept is None else self._kept.way_us
        if way_us is None:
            return 0
        ways_us = 2 * min(way_us, ThrottleGateWindow.MOST_GATE_WAY_US)
        return rate.bytes_per_s * (ThrottleGateWindow.GATE_WINDOW_US + ways_us) // 1_000_000

    def share(self) -> None:
        """Get its part of the limit beside connections that are policed."""
        if self._keeper is not None and self._kept is not None and not self._kept.is_shared:
            self._keeper.share(self._kept)

    def chores(self) -> Sequence[Chore]:
        """Return the keeper's chore, which all gates of this process share."""
        return [] if self._keeper is None else [self._keeper]

    def notes(self) -> list[str]:
        """Return which connections the gate does not cover, a line each."""
        found = []
        if self._keeper is not None and self._keeper.ended is not None:
            found.append(
                f"downloads are policed, because the gate's keeper has ended: {self._keeper.ended}"
            )
        if self._kept is not None:
            for why, count in self._kept.ungated.items():
                who = "1 connection was" if count == 1 else f"{count} connections were"
                found.append(f"{who} left to the policer: {_WHY_UNGATED[why]}")
        return found

    def close(self) -> None:
        """Have the keeper open all windows. Doing so twice is no error."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        if self._kept is not None:
            keeper.drop(self._kept)
        keeper.leave()
