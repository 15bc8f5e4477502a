"""Specs -> instructions that the kernel takes. No system calls."""

from __future__ import annotations

import struct
from typing import Mapping, NamedTuple

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.specs import FunctionKey, MapReference, ObjectSpec, ProgramSpec
from pybpfthrottle.errors import ObjectFileError


class LinkedProgram(NamedTuple):
    """A program with all functions that it calls behind it, and the maps that it refers to."""

    byteorder: str
    code: bytes
    map_references: tuple[MapReference, ...]

    @property
    def maps(self) -> frozenset[str]:
        """The names of the maps that the program needs."""
        return frozenset(reference.map for reference in self.map_references)


def link(spec: ObjectSpec, program: ProgramSpec) -> LinkedProgram:
    """Append each function that is called once, and set the distances of the calls."""
    starts: dict[FunctionKey, int] = {}
    pending = [program.function]
    placed = []
    length = 0
    while pending:
        function = pending.pop(0)
        if function.key in starts:
            continue
        starts[function.key] = length
        length += len(function.code)
        placed.append(function)
        for call in function.call_references:
            callee = spec.functions.get(call.target)
            if callee is None:
                raise ObjectFileError(
                    f"{function.name!r} calls what is no function:"
                    f" {call.target.section!r} + {call.target.offset:#x}",
                    section=function.key.section,
                    offset=function.key.offset + call.offset,
                )
            pending.append(callee)
    code = bytearray().join(function.code for function in placed)
    references = []
    for function in placed:
        start = starts[function.key]
        for call in function.call_references:
            at = start + call.offset
            distance = (starts[call.target] - at) // abi.INSN_BYTES - 1
            _put(spec.byteorder, code, at, abi.BPF_PSEUDO_CALL, distance)
        references += [
            reference._replace(offset=start + reference.offset)
            for reference in function.map_references
        ]
    return LinkedProgram(spec.byteorder, bytes(code), tuple(references))


def resolve(linked: LinkedProgram, map_fds: Mapping[str, int]) -> bytes:
    """Put the maps' descriptors in."""
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
