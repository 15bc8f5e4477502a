"""What prevents an object's programs from being attached to one direction of a cgroup."""

from __future__ import annotations

from typing import Iterator

from pybpfthrottle.bpf.abi import ProgType
from pybpfthrottle.bpf.obj.specs import ObjectSpec


def faults(spec: ObjectSpec) -> Iterator[str]:
    """Yield a line for each program whose section does not give its attach type."""
    for program in spec.programs.values():
        if program.type is ProgType.CGROUP_SKB and program.expected_attach_type is None:
            yield (
                f"{program.name}: the section {program.section!r} names no direction;"
                " cgroup_skb/ingress and cgroup_skb/egress do"
            )
