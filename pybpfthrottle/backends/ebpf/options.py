"""What may be chosen of the eBPF backend, beside the limits themselves."""

from __future__ import annotations

from types import MappingProxyType
from typing import Mapping

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.model import Direction
from pybpfthrottle.settings import AttachPolicy


class Options(NamedTuple):
    """The options of the eBPF backend.

    ``attach`` tells for a direction how programs are attached; ``egress_verdict`` is one of
    settings.EGRESS_VERDICTS: how an upload's packet is dropped, as if by congestion (Linux 5.3) or
    denied (EPERM for the send of a UDP program). ``shape`` is one of settings.SHAPES for a
    direction. ``guard`` has a child process restore connections if this process is killed.
    ``own_marks``: other programs look at the marks, which therefore are for this limit alone.
    ``company``: how many limits this process is going to have, if that is known: they share their
    programs from the first one on.
    """

    attach: Mapping[Direction, AttachPolicy] = MappingProxyType({})
    egress_verdict: str = "auto"
    shape: Mapping[Direction, str] = MappingProxyType({})
    guard: bool = False
    own_marks: bool = False
    company: int = 1
