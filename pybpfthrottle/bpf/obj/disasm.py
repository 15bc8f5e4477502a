"""Instructions as text, in the words of the kernel's verifier log and of bpftool. No system calls.

All instructions up to cpu version 4 and Linux 6.18; what is none is shown as such.
Source: kernel/bpf/disasm.c, Documentation/bpf/standardization/instruction-set.rst of the kernel.
"""

from __future__ import annotations

import struct
import sys
from typing import Callable, Iterator, NamedTuple

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.obj.helper_names import helper_name
from pybpfthrottle.bpf.obj.specs import FunctionSpec

_LD, _LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = range(8)
_ABS, _IND, _MEM, _MEMSX, _ATOMIC = 0x20, 0x40, 0x60, 0x80, 0xC0
_NEG, _MOV, _END = 0x8, 0xB, 0xD
_JA, _CALL, _EXIT, _JCOND = 0x0, 0x8, 0x9, 0xE

_SIZES = {0x00: "u32", 0x08: "u16", 0x10: "u8", 0x18: "u64"}
_ALU_SIGNS = ["+=", "-=", "*=", "/=", "|=", "&=", "<<=", ">>=", "neg", "%=", "^=", "=", "s>>="]
_SIGNED_ALU_SIGNS = {0x3: "s/=", 0x9: "s%="}
_SIGN_EXTENDED = {8: "(s8)", 16: "(s16)", 32: "(s32)"}
_COMPARISONS = {
    0x1: "==",
    0x2: ">",
    0x3: ">=",
    0x4: "&",
    0x5: "!=",
    0x6: "s>",
    0x7: "s>=",
    0xA: "<",
    0xB: "<=",
    0xC: "s<",
    0xD: "s<=",
}
# The immediate value of an atomic instruction.
_LOCKED = {0x00: "+=", 0x40: "|=", 0x50: "&=", 0xA0: "^="}
_FETCH = {0x01: "add", 0x41: "or", 0x51: "and", 0xA1: "xor"}
_XCHG, _CMPXCHG, _LOAD_ACQUIRE, _STORE_RELEASE = 0xE1, 0xF1, 0x100, 0x110
_PERCPU_ADDRESS, _ADDRESS_SPACE_CAST = -1, 1  # offsets of a move


class Instruction(NamedTuple):
    """One instruction; ``at`` counts in units of eight bytes, ``high`` is a load's other half."""

    at: int
    code: int
    dst: int
    src: int
    off: int
    imm: int
    high: int = 0


class Line(NamedTuple):
    """An instruction as text, and where it is: in units of eight bytes, as jumps count."""

    at: int
    text: str


class Names:
    """What calls and 64-bit immediate values stand for; a subclass may know it better."""

    def call(self, insn: Instruction) -> str:
        """What is called."""
        if insn.src == abi.BPF_PSEUDO_CALL:
            return f"pc{insn.imm:+d}"
        if insn.src == abi.BPF_PSEUDO_KFUNC_CALL:
            return f"kernel-function#{insn.imm}"
        return f"{helper_name(insn.imm)}#{insn.imm}"

    def wide(self, insn: Instruction) -> str:
        """What is loaded; maps are named by what the immediate value is: a descriptor or an id."""
        if insn.src == abi.BPF_PSEUDO_MAP_FD:
            return f"map[id:{insn.imm & 0xFFFFFFFF}]"
        if insn.src == abi.BPF_PSEUDO_MAP_VALUE:
            return f"map[id:{insn.imm & 0xFFFFFFFF}][0]+{insn.high}"
        if insn.src == abi.BPF_PSEUDO_FUNC:
            return f"subprog[{insn.imm:+d}]"
        return f"0x{insn.high << 32 | insn.imm & 0xFFFFFFFF:x}"


_DEFAULT = Names()


def instructions(code: bytes, byteorder: str = sys.byteorder) -> Iterator[Instruction]:
    """The instructions of some code; a 64-bit load is one. Bytes that make no whole one are cut."""
    layout = struct.Struct(("<" if byteorder == "little" else ">") + "BBhi")
    end = len(code) // abi.INSN_BYTES
    index = 0
    while index < end:
        opcode, registers, off, imm = layout.unpack_from(code, abi.INSN_BYTES * index)
        low, high = registers & 0xF, registers >> 4
        dst, src = (low, high) if byteorder == "little" else (high, low)
        if opcode == abi.BPF_LD_IMM64 and index + 1 < end:
            upper = layout.unpack_from(code, abi.INSN_BYTES * (index + 1))[3] & 0xFFFFFFFF
            yield Instruction(index, opcode, dst, src, off, imm, upper)
            index += 2
        else:
            yield Instruction(index, opcode, dst, src, off, imm)
            index += 1


def disassemble(
    code: bytes, *, byteorder: str = sys.byteorder, names: Names = _DEFAULT
) -> Iterator[Line]:
    """Each instruction of some code as text, such as ``(b7) r0 = 1``."""
    for insn in instructions(code, byteorder):
        text = _CLASSES[insn.code & 7](insn, names) or "is no instruction"
        yield Line(insn.at, f"({insn.code:02x}) {text}")


def _load(insn: Instruction, names: Names) -> str:
    size, mode = _SIZES[insn.code & 0x18], insn.code & 0xE0
    if mode == _ABS:
        return f"r0 = *({size} *)skb[{insn.imm}]"
    if mode == _IND:
        return f"r0 = *({size} *)skb[r{insn.src} + {insn.imm}]"
    if insn.code == abi.BPF_LD_IMM64:
        return f"r{insn.dst} = {names.wide(insn)}"
    return ""


def _load_memory(insn: Instruction, _: Names) -> str:
    size, mode = _SIZES[insn.code & 0x18], insn.code & 0xE0
    if mode == _MEMSX:
        size = size.replace("u", "s")
    if mode not in (_MEM, _MEMSX):
        return ""
    return f"r{insn.dst} = *({size} *)(r{insn.src} {insn.off:+d})"


def _store(insn: Instruction, _: Names) -> str:
    if insn.code & 0xE0 == _MEM:
        return f"{_memory(insn)} = {insn.imm}"
    return "nospec" if insn.code & 0xE0 == _ATOMIC else ""


def _store_register(insn: Instruction, _: Names) -> str:
    mode = insn.code & 0xE0
    if mode == _MEM:
        return f"{_memory(insn)} = r{insn.src}"
    return _atomic(insn) if mode == _ATOMIC else ""


def _atomic(insn: Instruction) -> str:
    size = _SIZES[insn.code & 0x18]
    place = f"({size} *)(r{insn.dst} {insn.off:+d})"
    wide = "64" if size == "u64" else ""
    if insn.imm in _LOCKED:
        return f"lock *{place} {_LOCKED[insn.imm]} r{insn.src}"
    if insn.imm in _FETCH:
        return f"r{insn.src} = atomic{wide}_fetch_{_FETCH[insn.imm]}({place}, r{insn.src})"
    if insn.imm == _XCHG:
        return f"r{insn.src} = atomic{wide}_xchg({place}, r{insn.src})"
    if insn.imm == _CMPXCHG:
        return f"r0 = atomic{wide}_cmpxchg({place}, r0, r{insn.src})"
    if insn.imm == _LOAD_ACQUIRE:
        return f"r{insn.dst} = load_acquire(({size} *)(r{insn.src} {insn.off:+d}))"
    if insn.imm == _STORE_RELEASE:
        return f"store_release({place}, r{insn.src})"
    return ""


def _memory(insn: Instruction) -> str:
    return f"*({_SIZES[insn.code & 0x18]} *)(r{insn.dst} {insn.off:+d})"


def _alu(insn: Instruction, _: Names) -> str:
    operation = insn.code >> 4
    letter = "w" if insn.code & 7 == _ALU else "r"
    dst, src = f"{letter}{insn.dst}", f"{letter}{insn.src}"
    if operation == _END:
        return _byte_swap(insn)
    if operation == _NEG:
        return f"{dst} = -{dst}"
    if operation >= len(_ALU_SIGNS):
        return ""
    sign = _ALU_SIGNS[operation]
    if insn.off == 1:
        sign = _SIGNED_ALU_SIGNS.get(operation, sign)
    if not insn.code & 8:
        return f"{dst} {sign} {insn.imm}"
    if operation == _MOV:
        return _move(insn, dst, src)
    return f"{dst} {sign} {src}"


def _move(insn: Instruction, dst: str, src: str) -> str:
    if insn.code & 7 == _ALU64 and insn.off == _ADDRESS_SPACE_CAST:
        return f"{dst} = addr_space_cast({src}, {insn.imm >> 16 & 0xFFFF}, {insn.imm & 0xFFFF})"
    if insn.code & 7 == _ALU64 and insn.off == _PERCPU_ADDRESS:
        return f"{dst} = &(void __percpu *)({src})"
    return f"{dst} = {_SIGN_EXTENDED.get(insn.off, '')}{src}"


def _byte_swap(insn: Instruction) -> str:
    order = "be" if insn.code & 8 else "le"
    if insn.code & 7 == _ALU64:
        order = "bswap"
    return f"r{insn.dst} = {order}{insn.imm} r{insn.dst}"


def _jump(insn: Instruction, names: Names) -> str:
    operation, is_wide = insn.code >> 4, insn.code & 7 == _JMP
    if operation in (_CALL, _EXIT, _JCOND):
        return _call_or_exit(insn, names) if is_wide else ""
    if operation == _JA:
        return f"goto pc{insn.off:+d}" if is_wide else f"gotol pc{insn.imm:+d}"
    if operation not in _COMPARISONS:
        return ""
    letter = "r" if is_wide else "w"
    other = f"{letter}{insn.src}" if insn.code & 8 else f"0x{insn.imm & 0xFFFFFFFF:x}"
    return f"if {letter}{insn.dst} {_COMPARISONS[operation]} {other} goto pc{insn.off:+d}"


def _call_or_exit(insn: Instruction, names: Names) -> str:
    operation = insn.code >> 4
    if operation == _EXIT:
        return "exit"
    if operation == _JCOND:
        return f"may_goto pc{insn.off:+d}"
    return f"callx r{insn.dst}" if insn.code & 8 else f"call {names.call(insn)}"


_CLASSES: dict[int, Callable[[Instruction, Names], str]] = {
    _LD: _load,
    _LDX: _load_memory,
    _ST: _store,
    _STX: _store_register,
    _ALU: _alu,
    _ALU64: _alu,
    _JMP: _jump,
    _JMP32: _jump,
}


def function_lines(function: FunctionSpec, byteorder: str) -> Iterator[Line]:
    """The instructions of an object's function; what they refer to has the object's names."""
    return disassemble(function.code, byteorder=byteorder, names=_ObjectNames(function))


class _ObjectNames(Names):
    def __init__(self, function: FunctionSpec) -> None:
        self._names = {}
        for reference in function.map_references:
            inside = reference.value_offset
            offset = "" if inside is None else f"[0]+{inside}"
            self._names[reference.offset] = f"map[{reference.map}]{offset}"
        for call in function.call_references:
            self._names[call.offset] = f"{call.target.section}+{call.target.offset:#x}"
        for extern in function.extern_references:
            self._names[extern.offset] = extern.name

    def call(self, insn: Instruction) -> str:
        return self._names.get(insn.at * abi.INSN_BYTES) or super().call(insn)

    def wide(self, insn: Instruction) -> str:
        return self._names.get(insn.at * abi.INSN_BYTES) or super().wide(insn)
