"""What an object needs of a kernel, and the first release with it. No system calls.

How its programs are attached is not part of it: that is decided later.
"""

from __future__ import annotations

from typing import Iterable, Iterator, Mapping, NamedTuple, Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import INSN_BYTES, MapType, ProgType
from pybpfthrottle.bpf.obj import disasm, releases
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.obj.disasm import Instruction
from pybpfthrottle.bpf.obj.externs import KCONFIG, Extern
from pybpfthrottle.bpf.obj.helper_names import helper_name
from pybpfthrottle.bpf.obj.specs import FunctionSpec, MapSpec, ObjectSpec, ProgramSpec

_MANY_INSTRUCTIONS = 4096
_LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = 1, 2, 3, 4, 5, 6, 7
_JA, _CALL, _EXIT, _JCOND = 0x0, 0x8, 0x9, 0xE
_LOWER = range(0xA, 0xE)  # <, <=, s<, s<=
_ATOMIC, _MEMSX = 0xC0, 0x80
_XADD, _LOAD_ACQUIRE, _STORE_RELEASE = 0x00, 0x100, 0x110
_DIV, _MOD, _MOV, _END = 0x3, 0x9, 0xB, 0xD
_MAP_FLAGS = (
    (abi.BPF_F_NO_PREALLOC, "BPF_F_NO_PREALLOC", "4.6"),
    (abi.BPF_F_NUMA_NODE, "BPF_F_NUMA_NODE", "4.14"),
    (abi.BPF_F_RDONLY_PROG, "BPF_F_RDONLY_PROG", "5.2"),
    (abi.BPF_F_MMAPABLE, "BPF_F_MMAPABLE", "5.5"),
)


class Need(NamedTuple):
    """Something that a kernel is to have; what is ``optional`` the loader can do without."""

    name: str
    since: str
    optional: bool = False


_V4 = Need("instructions of cpu v4", "6.6")


def needs(
    spec: ObjectSpec,
    btf: Optional[Btf],
    externs: Mapping[str, Extern],
    *,
    has_core: bool,
    longest: int,
) -> list[Need]:
    """All that an object needs, oldest first, each once.

    ``externs`` is what it declares to be the kernel's, ``has_core`` whether it asks for the
    kernel's types, and ``longest`` the number of instructions of its longest program with all that
    this calls.
    """
    found: dict[Need, None] = {}
    for program in spec.programs.values():
        found.update(dict.fromkeys(_of_program(program)))
    for one in spec.maps.values():
        found.update(dict.fromkeys(_of_map(one)))
    for function in spec.functions.values():
        found.update(dict.fromkeys(_of_code(function, spec.byteorder)))
    weak = spec.weak_externs
    for name, extern in externs.items():
        found[_of_extern(extern, name in weak)] = None
    if btf is not None:
        found[Need("BTF of the object's types", "4.18", optional=True)] = None
    if has_core:
        found[Need("BTF of the kernel's types, for CO-RE", "5.4")] = None
    if longest > _MANY_INSTRUCTIONS:
        found[Need(f"programs of more than {_MANY_INSTRUCTIONS} instructions", "5.2")] = None
    return sorted(found, key=lambda need: (releases.order(need.since), need.name))


def oldest(found: Iterable[Need]) -> str:
    """The oldest release that has all that cannot be done without."""
    since = [need.since for need in found if not need.optional]
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


def _of_map(found: MapSpec) -> Iterator[Need]:
    if found.section is not None:
        yield Need("data sections (.data, .rodata, .bss)", "5.2")
        yield Need("data sections in shared memory", "5.5", optional=True)
        return
    if found.type in releases.MAP_TYPES:
        known = MapType(found.type)
        yield Need(f"{known.name.lower()} maps", releases.MAP_TYPES[known])
    for flag, name, since in _MAP_FLAGS:
        if found.flags & flag:
            yield Need(name, since)
    if found.pinned:
        yield Need("pinned maps", "4.4", optional=True)
    if found.inner is not None:
        yield from _of_map(found.inner)


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
    for insn in disasm.instructions(function.code, byteorder):
        if insn.code == abi.BPF_CALL and insn.src == 0:
            if insn.at * INSN_BYTES not in externs and helper_name(insn.imm) != "unknown":
                yield Need(helper_name(insn.imm), releases.of_helper(insn.imm))
        else:
            yield from _of_instruction(insn)


def _of_instruction(insn: Instruction) -> Iterator[Need]:
    kind, operation = insn.code & 7, insn.code >> 4
    if kind in (_JMP, _JMP32):
        yield from _of_jump(insn, operation)
    elif kind in (_ALU, _ALU64):
        yield from _of_arithmetic(insn, operation)
    elif kind == _LDX and insn.code & 0xE0 == _MEMSX:
        yield _V4
    elif kind == _STX and insn.code & 0xE0 == _ATOMIC:
        if insn.imm in (_LOAD_ACQUIRE, _STORE_RELEASE):
            yield Need("load-acquire and store-release", "6.15")
        elif insn.imm != _XADD:
            yield Need("atomic instructions (cpu v3)", "5.12")


def _of_jump(insn: Instruction, operation: int) -> Iterator[Need]:
    is_long = insn.code & 7 == _JMP32 and operation == _JA
    distance = insn.imm if is_long else insn.off
    if operation == _JCOND:
        yield Need("may_goto", "6.9")
    elif operation not in (_CALL, _EXIT) and distance < 0:
        yield Need("jumps backwards (loops)", "5.3")
    if is_long:
        yield _V4
    elif insn.code & 7 == _JMP32:
        yield Need("32-bit jumps (cpu v3)", "5.1")
    elif operation in _LOWER:
        yield Need("jumps if lower (cpu v2)", "4.14")


def _of_arithmetic(insn: Instruction, operation: int) -> Iterator[Need]:
    if operation == _MOV and insn.off == 1 and insn.imm:
        yield Need("address spaces", "6.9")
    elif insn.off if operation in (_DIV, _MOD, _MOV) else _is_swap(insn):
        yield _V4


def _is_swap(insn: Instruction) -> bool:
    return insn.code >> 4 == _END and insn.code & 7 == _ALU64
