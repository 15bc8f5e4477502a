"""Specs -> instructions that the kernel takes. No system calls."""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import Mapping, NamedTuple

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.specs import (
    CallReference,
    ExternReference,
    FunctionKey,
    FunctionSpec,
    MapReference,
    ObjectSpec,
    ProgramSpec,
)


class Placed(NamedTuple):
    """A function, and at which byte of the linked code it begins."""

    start: int
    function: FunctionSpec


class LinkedProgram(NamedTuple):
    """A program with all functions that it calls behind it, and what it refers to.

    The offsets of the references are bytes of ``code``.
    """

    byteorder: str
    code: bytes
    map_references: tuple[MapReference, ...]
    extern_references: tuple[ExternReference, ...]
    placed: tuple[Placed, ...]

    @property
    def maps(self) -> frozenset[str]:
        """The names of the maps that the program needs."""
        return frozenset(reference.map for reference in self.map_references)

    def origin(self, offset: int) -> FunctionKey:
        """Where byte ``offset`` of the code was in the object: its section, and offset there."""
        index = bisect_right([placed.start for placed in self.placed], offset) - 1
        start, function = self.placed[index]
        return FunctionKey(function.key.section, function.key.offset + offset - start)


def link(spec: ObjectSpec, program: ProgramSpec) -> LinkedProgram:
    """Append each function that is called once, and set the distances of the calls."""
    placed = _place(spec, program.function)
    starts = {function.key: start for start, function in placed}
    code = bytearray().join(function.code for _, function in placed)
    for start, function in placed:
        for call in function.call_references:
            at = start + call.offset
            distance = (starts[call.target] - at) // abi.INSN_BYTES - 1
            source = abi.BPF_PSEUDO_FUNC if call.address else abi.BPF_PSEUDO_CALL
            _put(spec.byteorder, code, at, source, distance)
    return LinkedProgram(
        spec.byteorder,
        bytes(code),
        tuple(
            reference._replace(offset=start + reference.offset)
            for start, function in placed
            for reference in function.map_references
        ),
        tuple(
            reference._replace(offset=start + reference.offset)
            for start, function in placed
            for reference in function.extern_references
        ),
        tuple(placed),
    )


def maps_of(spec: ObjectSpec, program: ProgramSpec) -> frozenset[str]:
    """The names of the maps that a program, with all that it calls, needs."""
    functions = functions_of(spec, program)
    return frozenset(found.map for one in functions for found in one.map_references)


def functions_of(spec: ObjectSpec, program: ProgramSpec) -> list[FunctionSpec]:
    """A program's own function, and all that it calls. Raises ObjectFileError."""
    return [function for _, function in _place(spec, program.function)]


def _place(spec: ObjectSpec, entry: FunctionSpec) -> list[Placed]:
    """The functions in libbpf's order: each before those that it calls, in the order of calls."""
    placed: list[Placed] = []
    seen = set()
    length = 0
    pending = [entry]
    while pending:
        function = pending.pop()
        if function.key in seen:
            continue
        seen.add(function.key)
        placed.append(Placed(length, function))
        length += len(function.code)
        # The first call is to be taken from the stack first.
        calls = sorted(function.call_references, key=lambda call: -call.offset)
        pending += [_callee(spec, function, call) for call in calls]
    return placed


def _callee(spec: ObjectSpec, caller: FunctionSpec, call: CallReference) -> FunctionSpec:
    callee = spec.functions.get(call.target)
    if callee is None:
        raise ObjectFileError(
            f"{caller.name!r} calls what is no function:"
            f" {call.target.section!r} + {call.target.offset:#x}",
            section=caller.key.section,
            offset=caller.key.offset + call.offset,
        )
    return callee


def resolve(linked: LinkedProgram, map_fds: Mapping[str, int]) -> bytes:
    """Put the maps' descriptors in. Raises ObjectFileError for what only the kernel could have."""
    for at, extern, _ in linked.extern_references:
        origin = linked.origin(at)
        raise ObjectFileError(
            f"{extern!r} is to be found in the kernel, which is not known here",
            section=origin.section,
            offset=origin.offset,
        )
    code = bytearray(linked.code)
    for at, name, value_offset in linked.map_references:
        if value_offset is None:
            _put(linked.byteorder, code, at, abi.BPF_PSEUDO_MAP_FD, map_fds[name])
        else:
            _put(linked.byteorder, code, at, abi.BPF_PSEUDO_MAP_VALUE, map_fds[name])
            struct.pack_into(_order(linked.byteorder) + "i", code, at + 12, value_offset)
    return bytes(code)


def _put(byteorder: str, code: bytearray, at: int, src_register: int, imm: int) -> None:
    """Set the source register and the immediate value of the instruction at byte ``at``."""
    registers = code[at + 1]
    if byteorder == "little":
        code[at + 1] = registers & 0x0F | src_register << 4
    else:
        code[at + 1] = registers & 0xF0 | src_register
    struct.pack_into(_order(byteorder) + "i", code, at + 4, imm)


def _order(byteorder: str) -> str:
    return "<" if byteorder == "little" else ">"
