"""Instructions as text, in the words of the kernel's verifier log and of bpftool. No system calls.

All instructions up to cpu version 4 and Linux 6.18; what is none is shown as such.
Source: kernel/bpf/disasm.c, Documentation/bpf/standardization/instruction-set.rst of the kernel.
"""

from __future__ import annotations

import sys
from typing import Callable, Iterator

from pybpfthrottle.bpf.obj.helper_names import helper_name
from pybpfthrottle.bpf.obj.insn import (
    BPF_ABS,
    BPF_ADD,
    BPF_ALU,
    BPF_ALU64,
    BPF_AND,
    BPF_ARSH,
    BPF_ATOMIC,
    BPF_B,
    BPF_CALL,
    BPF_CMPXCHG,
    BPF_DIV,
    BPF_DW,
    BPF_END,
    BPF_EXIT,
    BPF_FETCH,
    BPF_H,
    BPF_IND,
    BPF_JA,
    BPF_JCOND,
    BPF_JEQ,
    BPF_JGE,
    BPF_JGT,
    BPF_JLE,
    BPF_JLT,
    BPF_JMP,
    BPF_JMP32,
    BPF_JNE,
    BPF_JSET,
    BPF_JSGE,
    BPF_JSGT,
    BPF_JSLE,
    BPF_JSLT,
    BPF_LD,
    BPF_LDX,
    BPF_LOAD_ACQ,
    BPF_LSH,
    BPF_MEM,
    BPF_MEMSX,
    BPF_MOD,
    BPF_MOV,
    BPF_MUL,
    BPF_NEG,
    BPF_OR,
    BPF_PSEUDO_CALL,
    BPF_PSEUDO_FUNC,
    BPF_PSEUDO_KFUNC_CALL,
    BPF_PSEUDO_MAP_FD,
    BPF_PSEUDO_MAP_VALUE,
    BPF_RSH,
    BPF_ST,
    BPF_STORE_REL,
    BPF_STX,
    BPF_SUB,
    BPF_W,
    BPF_XCHG,
    BPF_XOR,
    INSN_BYTES,
    LD_IMM64,
    Instruction,
    decoded,
)
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import FunctionSpec

_SIZE_NAMES = {BPF_W: "u32", BPF_H: "u16", BPF_B: "u8", BPF_DW: "u64"}
_ALU_SIGNS = {
    BPF_ADD: "+=",
    BPF_SUB: "-=",
    BPF_MUL: "*=",
    BPF_DIV: "/=",
    BPF_OR: "|=",
    BPF_AND: "&=",
    BPF_LSH: "<<=",
    BPF_RSH: ">>=",
    BPF_MOD: "%=",
    BPF_XOR: "^=",
    BPF_MOV: "=",
    BPF_ARSH: "s>>=",
}
_SIGNED_ALU_SIGNS = {BPF_DIV: "s/=", BPF_MOD: "s%="}
_SIGN_EXTENDED = {8: "(s8)", 16: "(s16)", 32: "(s32)"}
_COMPARISONS = {
    BPF_JEQ: "==",
    BPF_JGT: ">",
    BPF_JGE: ">=",
    BPF_JSET: "&",
    BPF_JNE: "!=",
    BPF_JSGT: "s>",
    BPF_JSGE: "s>=",
    BPF_JLT: "<",
    BPF_JLE: "<=",
    BPF_JSLT: "s<",
    BPF_JSLE: "s<=",
}
# The immediate value of an atomic instruction.
_LOCKED = {BPF_ADD: "+=", BPF_OR: "|=", BPF_AND: "&=", BPF_XOR: "^="}
_FETCH = {
    BPF_ADD | BPF_FETCH: "add",
    BPF_OR | BPF_FETCH: "or",
    BPF_AND | BPF_FETCH: "and",
    BPF_XOR | BPF_FETCH: "xor",
}
_PERCPU_ADDRESS, _ADDRESS_SPACE_CAST = -1, 1  # offsets of a move


class Line(NamedTuple):
    """An instruction as text, and where it is: in units of eight bytes, as jumps count."""

    at: int
    text: str


class Names:
    """The names of calls and 64-bit immediate values; a subclass may know better ones."""

    def call(self, insn: Instruction) -> str:
        """Return what is called."""
        if insn.src == BPF_PSEUDO_CALL:
            return f"pc{insn.imm:+d}"
        if insn.src == BPF_PSEUDO_KFUNC_CALL:
            return f"kernel-function#{insn.imm}"
        return f"{helper_name(insn.imm)}#{insn.imm}"

    def wide(self, insn: Instruction) -> str:
        """Return what is loaded; maps are named by the immediate value, a descriptor or an id."""
        if insn.src == BPF_PSEUDO_MAP_FD:
            return f"map[id:{insn.imm & 0xFFFFFFFF}]"
        if insn.src == BPF_PSEUDO_MAP_VALUE:
            return f"map[id:{insn.imm & 0xFFFFFFFF}][0]+{insn.high}"
        if insn.src == BPF_PSEUDO_FUNC:
            return f"subprog[{insn.imm:+d}]"
        return f"0x{insn.high << 32 | insn.imm & 0xFFFFFFFF:x}"


_DEFAULT = Names()


def disassemble(
    code: bytes, *, byteorder: str = sys.byteorder, names: Names = _DEFAULT
) -> Iterator[Line]:
    """Return each instruction of some code as text, such as ``(b7) r0 = 1``."""
    for insn in decoded(code, byteorder):
        text = _CLASSES[insn.kind](insn, names) or "is not an instruction"
        yield Line(insn.at, f"({insn.code:02x}) {text}")


def _load(insn: Instruction, names: Names) -> str:
    size, mode = _SIZE_NAMES[insn.size], insn.mode
    if mode == BPF_ABS:
        return f"r0 = *({size} *)skb[{insn.imm}]"
    if mode == BPF_IND:
        return f"r0 = *({size} *)skb[r{insn.src} + {insn.imm}]"
    if insn.code == LD_IMM64:
        return f"r{insn.dst} = {names.wide(insn)}"
    return ""


def _load_memory(insn: Instruction, _: Names) -> str:
    size, mode = _SIZE_NAMES[insn.size], insn.mode
    if mode == BPF_MEMSX:
        size = size.replace("u", "s")
    if mode not in (BPF_MEM, BPF_MEMSX):
        return ""
    return f"r{insn.dst} = *({size} *)(r{insn.src} {insn.off:+d})"


def _store(insn: Instruction, _: Names) -> str:
    if insn.mode == BPF_MEM:
        return f"{_memory(insn)} = {insn.imm}"
    return "nospec" if insn.mode == BPF_ATOMIC else ""


def _store_register(insn: Instruction, _: Names) -> str:
    mode = insn.mode
    if mode == BPF_MEM:
        return f"{_memory(insn)} = r{insn.src}"
    return _atomic(insn) if mode == BPF_ATOMIC else ""


def _atomic(insn: Instruction) -> str:
    size = _SIZE_NAMES[insn.size]
    place = f"({size} *)(r{insn.dst} {insn.off:+d})"
    wide = "64" if size == "u64" else ""
    if insn.imm in _LOCKED:
        return f"lock *{place} {_LOCKED[insn.imm]} r{insn.src}"
    if insn.imm in _FETCH:
        return f"r{insn.src} = atomic{wide}_fetch_{_FETCH[insn.imm]}({place}, r{insn.src})"
    if insn.imm == BPF_XCHG:
        return f"r{insn.src} = atomic{wide}_xchg({place}, r{insn.src})"
    if insn.imm == BPF_CMPXCHG:
        return f"r0 = atomic{wide}_cmpxchg({place}, r0, r{insn.src})"
    if insn.imm == BPF_LOAD_ACQ:
        return f"r{insn.dst} = load_acquire(({size} *)(r{insn.src} {insn.off:+d}))"
    if insn.imm == BPF_STORE_REL:
        return f"store_release({place}, r{insn.src})"
    return ""


def _memory(insn: Instruction) -> str:
    return f"*({_SIZE_NAMES[insn.size]} *)(r{insn.dst} {insn.off:+d})"


def _alu(insn: Instruction, _: Names) -> str:
    operation = insn.operation
    letter = "w" if insn.kind == BPF_ALU else "r"
    dst, src = f"{letter}{insn.dst}", f"{letter}{insn.src}"
    if operation == BPF_END:
        return _byte_swap(insn)
    if operation == BPF_NEG:
        return f"{dst} = -{dst}"
    sign = _ALU_SIGNS.get(operation, "")
    if not sign:
        return ""
    if insn.off == 1:
        sign = _SIGNED_ALU_SIGNS.get(operation, sign)
    if not insn.takes_register:
        return f"{dst} {sign} {insn.imm}"
    if operation == BPF_MOV:
        return _move(insn, dst, src)
    return f"{dst} {sign} {src}"


def _move(insn: Instruction, dst: str, src: str) -> str:
    if insn.kind == BPF_ALU64 and insn.off == _ADDRESS_SPACE_CAST:
        return f"{dst} = addr_space_cast({src}, {insn.imm >> 16 & 0xFFFF}, {insn.imm & 0xFFFF})"
    if insn.kind == BPF_ALU64 and insn.off == _PERCPU_ADDRESS:
        return f"{dst} = &(void __percpu *)({src})"
    return f"{dst} = {_SIGN_EXTENDED.get(insn.off, '')}{src}"


def _byte_swap(insn: Instruction) -> str:
    order = "be" if insn.takes_register else "le"
    if insn.kind == BPF_ALU64:
        order = "bswap"
    return f"r{insn.dst} = {order}{insn.imm} r{insn.dst}"


def _jump(insn: Instruction, names: Names) -> str:
    operation, is_wide = insn.operation, insn.kind == BPF_JMP
    if operation in (BPF_CALL, BPF_EXIT, BPF_JCOND):
        return _call_or_exit(insn, names) if is_wide else ""
    if operation == BPF_JA:
        return f"goto pc{insn.off:+d}" if is_wide else f"gotol pc{insn.imm:+d}"
    if operation not in _COMPARISONS:
        return ""
    letter = "r" if is_wide else "w"
    other = f"{letter}{insn.src}" if insn.takes_register else f"0x{insn.imm & 0xFFFFFFFF:x}"
    return f"if {letter}{insn.dst} {_COMPARISONS[operation]} {other} goto pc{insn.off:+d}"


def _call_or_exit(insn: Instruction, names: Names) -> str:
    operation = insn.operation
    if operation == BPF_EXIT:
        return "exit"
    if operation == BPF_JCOND:
        return f"may_goto pc{insn.off:+d}"
    return f"callx r{insn.dst}" if insn.takes_register else f"call {names.call(insn)}"


_CLASSES: dict[int, Callable[[Instruction, Names], str]] = {
    BPF_LD: _load,
    BPF_LDX: _load_memory,
    BPF_ST: _store,
    BPF_STX: _store_register,
    BPF_ALU: _alu,
    BPF_ALU64: _alu,
    BPF_JMP: _jump,
    BPF_JMP32: _jump,
}


def function_lines(function: FunctionSpec, byteorder: str) -> Iterator[Line]:
    """Return the instructions of an object's function as text, with the object's names."""
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
        return self._names.get(insn.at * INSN_BYTES) or super().call(insn)

    def wide(self, insn: Instruction) -> str:
        return self._names.get(insn.at * INSN_BYTES) or super().wide(insn)
