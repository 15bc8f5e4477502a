"""Specs -> instructions that the kernel takes. No system calls."""

from __future__ import annotations

from bisect import bisect_right
from typing import Mapping

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.insn import (
    BPF_PSEUDO_CALL,
    BPF_PSEUDO_FUNC,
    BPF_PSEUDO_MAP_FD,
    BPF_PSEUDO_MAP_VALUE,
    Code,
)
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import (
    CallReference,
    ExternReference,
    FunctionKey,
    FunctionSpec,
    MapReference,
    MapSpec,
    ObjectSpec,
    ProgramSpec,
)

_U64 = (1 << 64) - 1


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
        """Return where byte ``offset`` of the code was in the object: section, and offset there."""
        index = bisect_right([placed.start for placed in self.placed], offset) - 1
        start, function = self.placed[index]
        return FunctionKey(function.key.section, function.key.offset + offset - start)


def link(spec: ObjectSpec, program: ProgramSpec) -> LinkedProgram:
    """Append each function that is called once, and set the distances of the calls."""
    placed = _place(spec, program.function)
    _refuse_addresses(spec, placed)
    starts = {function.key: start for start, function in placed}
    # One join, and changes in place: there may be a million instructions.
    code = bytearray().join(function.code for _, function in placed)
    instructions = Code(code, spec.byteorder)
    for start, function in placed:
        for call in function.call_references:
            at = start + call.offset
            instructions.set_source(at, BPF_PSEUDO_FUNC if call.address else BPF_PSEUDO_CALL)
            instructions.set_target(at, starts[call.target])
        for constant in function.constant_references:
            value = spec.constants.get(constant.name, 0)
            instructions.set_imm64(start + constant.offset, value & _U64)
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
    """Return the names of the maps that a program, with all that it calls, needs."""
    return frozenset(
        reference.map
        for function in functions_of(spec, program)
        for reference in function.map_references
    )


def functions_of(spec: ObjectSpec, program: ProgramSpec) -> list[FunctionSpec]:
    """Return a program's own function, and all that it calls. Raises ObjectFileError."""
    return [function for _, function in _place(spec, program.function)]


def _place(spec: ObjectSpec, entry: FunctionSpec) -> list[Placed]:
    """Return the functions in libbpf's order: each before those that it calls.

    The one that is called when the program throws comes last.
    """
    placed: list[Placed] = []
    seen = set()
    length = 0
    callback = entry.exception_callback
    pending = [spec.functions[callback], entry] if callback else [entry]
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


def _refuse_addresses(spec: ObjectSpec, placed: list[Placed]) -> None:
    """Refuse code that uses a pointer in data: it would be null, as BPF's data has no addresses."""
    for _, function in placed:
        for at, name, value_offset in function.map_references:
            data_map = spec.maps.get(name)
            if data_map and _holds_address(spec, data_map, value_offset or 0):
                raise ObjectFileError(
                    f"{function.name!r} uses pointers in section {data_map.section!r}, which no"
                    " loader can fill in; use arrays of a fixed length (char names[][16]), or a"
                    " switch, instead of an array of pointers",
                    section=function.key.section,
                    offset=function.key.offset + at,
                )


def _holds_address(spec: ObjectSpec, data_map: MapSpec, offset: int) -> bool:
    """Return whether the variable at a place of a data section has pointers in it."""
    if not data_map.addresses:
        return False
    begin, end = next(
        (
            (variable.offset, variable.offset + variable.size)
            for variable in spec.variables.values()
            if variable.map is data_map
            and variable.offset <= offset < variable.offset + variable.size
        ),
        (0, data_map.value_size),
    )
    return any(begin <= address < end for address in data_map.addresses)


def _callee(spec: ObjectSpec, caller: FunctionSpec, call: CallReference) -> FunctionSpec:
    callee = spec.functions.get(call.target)
    if callee is None:
        raise ObjectFileError(
            f"{caller.name!r} calls {call.target.section!r} + {call.target.offset:#x},"
            " which is not a function",
            section=caller.key.section,
            offset=caller.key.offset + call.offset,
        )
    return callee


def resolve(linked: LinkedProgram, map_fds: Mapping[str, int]) -> bytes:
    """Put the maps' descriptors in. Raises ObjectFileError for what only the kernel could have."""
    for at, extern, _ in linked.extern_references:
        origin = linked.origin(at)
        raise ObjectFileError(
            f"{extern!r} must come from a running kernel; load the object to resolve it",
            section=origin.section,
            offset=origin.offset,
        )
    code = bytearray(linked.code)
    instructions = Code(code, linked.byteorder)
    for at, name, value_offset in linked.map_references:
        in_value = value_offset is not None
        instructions.set_source(at, BPF_PSEUDO_MAP_VALUE if in_value else BPF_PSEUDO_MAP_FD)
        instructions.set_imm64(at, map_fds[name] | (value_offset or 0) << 32)
    return bytes(code)
