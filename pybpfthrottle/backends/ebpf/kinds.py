"""The programs for all packets of a cgroup, and those for marked sockets."""

from __future__ import annotations

from functools import cache
from typing import Callable, NamedTuple

from pybpfthrottle.backends.ebpf import features, objects
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.model import Direction

# Marks the new sockets of processes.
MARKER = "pybpft_create"


class Kind(NamedTuple):
    """Whose packets programs are for: all of a cgroup, or those of marked sockets."""

    letter: str  # in front of the hook in the programs' names
    read: Callable[[], ObjectSpec]

    def policer(self, direction: Direction, verdict: str) -> str:
        """The program for a direction; ``verdict`` is one of EGRESS_VERDICTS."""
        if direction is Direction.DOWNLOAD:
            return f"pybpft_{self.letter}ingress"
        if verdict == "auto":
            verdict = "congestion" if features.CONGESTION_VERDICT.available() else "deny"
        return f"pybpft_{self.letter}egress{'cn' if verdict == 'congestion' else ''}"

    @property
    def shaper(self) -> str:
        """The program that shapes."""
        return f"pybpft_{self.letter}sockops"


@cache
def read_object() -> ObjectSpec:
    """The object for all packets: the faster one, where this kernel takes it."""
    direct = features.DIRECT_PACKET_ACCESS.available()
    return objects.read("throttle-direct" if direct else "throttle")


@cache
def read_marked() -> ObjectSpec:
    """The object for marked sockets."""
    return objects.read("throttle-marked")


ALL, MARKED = Kind("", read_object), Kind("m", read_marked)
