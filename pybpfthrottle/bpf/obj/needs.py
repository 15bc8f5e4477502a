"""The requirements of an object on the kernel, with the first releases. No system calls.

How its programs are attached is not part of it: that is decided later.
"""

from __future__ import annotations

from typing import Iterable, Iterator, Mapping, Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType, ProgType
from pybpfthrottle.bpf.obj import releases, relocate
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.obj.externs import KCONFIG, Extern
from pybpfthrottle.bpf.obj.helper_names import helper_name
from pybpfthrottle.bpf.obj.insn import (
    BPF_ADD,
    BPF_ALU,
    BPF_ALU64,
    BPF_ATOMIC,
    BPF_CALL,
    BPF_DIV,
    BPF_END,
    BPF_EXIT,
    BPF_JCOND,
    BPF_JLE,
    BPF_JLT,
    BPF_JMP,
    BPF_JMP32,
    BPF_JSLE,
    BPF_JSLT,
    BPF_LDX,
    BPF_LOAD_ACQ,
    BPF_MEMSX,
    BPF_MOD,
    BPF_MOV,
    BPF_STORE_REL,
    BPF_STX,
    CALL,
    INSN_BYTES,
    Instruction,
    decoded,
)
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import FunctionSpec, MapSpec, ObjectSpec, ProgramSpec

# BPF_MAXINSNS, the limit for everybody before Linux 5.2.
_MANY_INSTRUCTIONS = 4096
_LOWER = (BPF_JLT, BPF_JLE, BPF_JSLT, BPF_JSLE)
# The only atomic instruction before cpu v3; it has no result.
_XADD = BPF_ADD
_MAP_FLAGS = (
    (abi.BPF_F_NO_PREALLOC, "BPF_F_NO_PREALLOC", "4.6"),
    (abi.BPF_F_NUMA_NODE, "BPF_F_NUMA_NODE", "4.14"),
    (abi.BPF_F_RDONLY_PROG, "BPF_F_RDONLY_PROG", "5.2"),
    (abi.BPF_F_MMAPABLE, "BPF_F_MMAPABLE", "5.5"),
)


class Need(NamedTuple):
    """A requirement on the kernel; the loader can do without one that is ``optional``."""

    name: str
    since: str
    optional: bool = False


_V4 = Need("instructions of cpu v4", "6.6")
_LONG = Need(f"programs of more than {_MANY_INSTRUCTIONS} instructions", "5.2")


def needs(
    spec: ObjectSpec,
    btf: Optional[Btf],
    externs: Mapping[str, Extern],
    *,
    has_core: bool,
    longest: int,
) -> list[Need]:
    """Return all that an object needs, oldest first, each once.

    ``externs`` is what it declares to be the kernel's, ``has_core`` whether it asks for the
    kernel's types, and ``longest`` the number of instructions of its longest program with all that
    this calls.
    """
    collected: dict[Need, None] = {}
    for program in spec.programs.values():
        collected.update(dict.fromkeys(_of_program(program)))
    for map_spec in spec.maps.values():
        collected.update(dict.fromkeys(_of_map(map_spec)))
    for function in spec.functions.values():
        collected.update(dict.fromkeys(_of_code(function, spec.byteorder)))
    weak = spec.weak_externs
    for name, extern in externs.items():
        collected[_of_extern(extern, name in weak)] = None
    if btf is not None:
        collected[Need("BTF of the object's types", "4.18", optional=True)] = None
    if has_core:
        collected[Need("BTF of the kernel's types, for CO-RE", "5.4")] = None
    if longest > _MANY_INSTRUCTIONS:
        collected[_LONG] = None
    return sorted(collected, key=lambda need: (releases.order(need.since), need.name))


def to_load(spec: ObjectSpec, programs: Iterable[str], maps: Iterable[str]) -> list[Need]:
    """Return what some programs and maps cannot do without, oldest first, each once."""
    collected: dict[Need, None] = {}
    for name in maps:
        collected.update(dict.fromkeys(_of_map(spec.maps[name])))
    for name in programs:
        program = spec.programs[name]
        collected.update(dict.fromkeys(_of_program(program)))
        functions = relocate.functions_of(spec, program)
        for function in functions:
            collected.update(dict.fromkeys(_of_code(function, spec.byteorder)))
        if sum(len(function.code) for function in functions) > _MANY_INSTRUCTIONS * INSN_BYTES:
            collected[_LONG] = None
    needed = (need for need in collected if not need.optional)
    return sorted(needed, key=lambda need: (releases.order(need.since), need.name))


def oldest(collected: Iterable[Need]) -> str:
    """Return the oldest release that has all that cannot be done without."""
    since = [need.since for need in collected if not need.optional]
    return max(since, key=releases.order, default="3.19")


def _of_program(program: ProgramSpec) -> Iterator[Need]:
    if program.type != ProgType.UNSPEC:
        yield Need(f"{program.type.name.lower()} programs", releases.PROGRAM_TYPES[program.type])
    attach = program.expected_attach_type
    if attach in releases.ATTACH_TYPES:
        yield Need(f"attach type {attach.name.lower()}", releases.ATTACH_TYPES[attach])
    if program.flags & abi.BPF_F_SLEEPABLE:
        yield Need("sleepable programs", "5.10")
    if program.flags & abi.BPF_F_XDP_HAS_FRAGS:
        yield Need("xdp programs for packets in fragments", "5.18")


def _of_map(spec: MapSpec) -> Iterator[Need]:
    if spec.section is not None:
        yield Need("data sections (.data, .rodata, .bss)", "5.2")
        yield Need("data sections in shared memory", "5.5", optional=True)
        return
    if spec.type in releases.MAP_TYPES:
        known = MapType(spec.type)
        yield Need(f"{known.name.lower()} maps", releases.MAP_TYPES[known])
    for flag, name, since in _MAP_FLAGS:
        if spec.flags & flag:
            yield Need(name, since)
    if spec.pinned:
        yield Need("pinned maps", "4.4", optional=True)
    if spec.inner is not None:
        yield from _of_map(spec.inner)


def _of_extern(extern: Extern, weak: bool) -> Need:
    if extern.section == KCONFIG:
        return Need("data sections (.data, .rodata, .bss)", "5.2")
    if extern.declared.kind == Kind.FUNC:
        return Need("calls of kernel functions", "5.13", weak)
    return Need("addresses of kernel variables", "5.10", weak)


def _of_code(function: FunctionSpec, byteorder: str) -> Iterator[Need]:
    if any(call.address for call in function.call_references):
        yield Need("callbacks", "5.13")
    if any(not call.address for call in function.call_references):
        yield Need("calls of the object's own functions", "4.16")
    externs = {reference.offset for reference in function.extern_references}
    for insn in decoded(function.code, byteorder):
        if insn.code == CALL and insn.src == 0:
            if insn.at * INSN_BYTES not in externs and helper_name(insn.imm) != "unknown":
                yield Need(helper_name(insn.imm), releases.of_helper(insn.imm))
        else:
            yield from _of_instruction(insn)


def _of_instruction(insn: Instruction) -> Iterator[Need]:
    kind = insn.kind
    if kind in (BPF_JMP, BPF_JMP32):
        yield from _of_jump(insn)
    elif kind in (BPF_ALU, BPF_ALU64):
        yield from _of_arithmetic(insn)
    elif kind == BPF_LDX and insn.mode == BPF_MEMSX:
        yield _V4
    elif kind == BPF_STX and insn.mode == BPF_ATOMIC:
        if insn.imm in (BPF_LOAD_ACQ, BPF_STORE_REL):
            yield Need("load-acquire and store-release", "6.15")
        elif insn.imm != _XADD:
            yield Need("atomic instructions (cpu v3)", "5.12")


def _of_jump(insn: Instruction) -> Iterator[Need]:
    operation = insn.operation
    if operation == BPF_JCOND:
        yield Need("may_goto", "6.9")
    elif operation not in (BPF_CALL, BPF_EXIT) and insn.distance < 0:
        yield Need("jumps backwards (loops)", "5.3")
    if insn.is_long_jump:
        yield _V4
    elif insn.kind == BPF_JMP32:
        yield Need("32-bit jumps (cpu v3)", "5.1")
    elif operation in _LOWER:
        yield Need("jumps if lower (cpu v2)", "4.14")


def _of_arithmetic(insn: Instruction) -> Iterator[Need]:
    operation = insn.operation
    if operation == BPF_MOV and insn.off == 1 and insn.imm:
        yield Need("address spaces", "6.9")
    elif insn.off if operation in (BPF_DIV, BPF_MOD, BPF_MOV) else _is_swap(insn):
        yield _V4


def _is_swap(insn: Instruction) -> bool:
    return insn.operation == BPF_END and insn.kind == BPF_ALU64
