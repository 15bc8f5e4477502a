"""What an object file has in it, without loading it: for inspect and for verify-setup."""

from __future__ import annotations

from typing import Any, Iterator

from pybpfthrottle.bpf.abi import INSN_BYTES, MapType, ProgType
from pybpfthrottle.bpf.specs import ObjectSpec


def describe(spec: ObjectSpec) -> dict[str, Any]:
    """All of it, for JSON."""
    return {
        "byteorder": spec.byteorder,
        "license": spec.license,
        "programs": programs(spec),
        "maps": maps(spec),
        "faults": list(faults(spec)),
    }


def programs(spec: ObjectSpec) -> list[dict[str, Any]]:
    """For each program its name, section, type and expected attach type."""
    return [
        {
            "name": program.name,
            "section": program.section,
            "type": program.type.name.lower(),
            "expected_attach_type": (
                None
                if program.expected_attach_type is None
                else program.expected_attach_type.name.lower()
            ),
            "instructions": len(program.function.code) // INSN_BYTES,
            "maps": sorted({reference.map for reference in program.function.map_references}),
        }
        for program in spec.programs.values()
    ]


def maps(spec: ObjectSpec) -> list[dict[str, Any]]:
    """For each map its name, type and sizes in bytes."""
    return [
        {
            "name": found.name,
            "type": _map_type(found.type),
            "key_size": found.key_size,
            "value_size": found.value_size,
            "max_entries": found.max_entries,
            "flags": found.flags,
        }
        for found in spec.maps.values()
    ]


def _map_type(number: int) -> str:
    try:
        return MapType(number).name.lower()
    except ValueError:
        return str(number)


def faults(spec: ObjectSpec) -> Iterator[str]:
    """What keeps programs of an object from being attached to one direction of a cgroup."""
    for program in spec.programs.values():
        if program.type is ProgType.CGROUP_SKB and program.expected_attach_type is None:
            yield (
                f"{program.name}: the section {program.section!r} names no direction;"
                " cgroup_skb/ingress and cgroup_skb/egress do"
            )
