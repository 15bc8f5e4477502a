"""The instructions of BPF as bytes, in either byte order: the one module that knows their layout.

An instruction is struct bpf_insn of eight bytes: an opcode, two registers of four bits each, an
offset of 16 bits and an immediate value of 32. A 64-bit load takes the room of two; the immediate
value of the other half is its upper part. Offsets of code are in bytes, unless something is said
to be in units of eight.

``Code`` is a view over bytes that reads and changes single instructions. ``decoded`` makes an
object of each instruction, which takes a third of a microsecond: loading never does it.

Source: linux/bpf.h, linux/bpf_common.h, and of the kernel's documentation
bpf/standardization/instruction-set.rst and bpf/llvm_reloc.rst.
"""

from __future__ import annotations

import struct
import sys
from enum import IntEnum
from typing import Iterator, Union

from pybpfthrottle.bpf.obj.plain import NamedTuple

INSN_BYTES = 8

# BPF_CLASS: the low three bits of an opcode.
CLASS_MASK = 0x07
BPF_LD, BPF_LDX, BPF_ST, BPF_STX, BPF_ALU, BPF_JMP, BPF_JMP32, BPF_ALU64 = range(8)
LOADS_AND_STORES = frozenset((BPF_LDX, BPF_ST, BPF_STX))

# BPF_SIZE and BPF_MODE, of loads and stores.
SIZE_MASK = 0x18
BPF_W, BPF_H, BPF_B, BPF_DW = 0x00, 0x08, 0x10, 0x18
SIZES = {1: BPF_B, 2: BPF_H, 4: BPF_W, 8: BPF_DW}
MODE_MASK = 0xE0
BPF_IMM, BPF_ABS, BPF_IND, BPF_MEM, BPF_MEMSX, BPF_ATOMIC = 0x00, 0x20, 0x40, 0x60, 0x80, 0xC0

# BPF_SRC: the other operand of arithmetic and jumps, the immediate value or a register.
SOURCE_MASK = 0x08
BPF_K, BPF_X = 0x00, 0x08

# BPF_OP, of arithmetic ...
OPERATION_MASK = 0xF0
BPF_ADD, BPF_SUB, BPF_MUL, BPF_DIV, BPF_OR, BPF_AND, BPF_LSH, BPF_RSH = range(0x00, 0x80, 0x10)
BPF_NEG, BPF_MOD, BPF_XOR, BPF_MOV, BPF_ARSH, BPF_END = range(0x80, 0xE0, 0x10)
# ... and of jumps.
BPF_JA, BPF_JEQ, BPF_JGT, BPF_JGE, BPF_JSET, BPF_JNE, BPF_JSGT, BPF_JSGE = range(0x00, 0x80, 0x10)
BPF_CALL, BPF_EXIT, BPF_JLT, BPF_JLE, BPF_JSLT, BPF_JSLE, BPF_JCOND = range(0x80, 0xF0, 0x10)

# The immediate value of an atomic instruction; others are the operation of arithmetic.
BPF_FETCH = 0x01
BPF_XCHG, BPF_CMPXCHG = 0xE0 | BPF_FETCH, 0xF0 | BPF_FETCH
BPF_LOAD_ACQ, BPF_STORE_REL = 0x100, 0x110

# Whole opcodes.
LD_IMM64 = BPF_LD | BPF_IMM | BPF_DW
CALL = BPF_JMP | BPF_CALL
EXIT = BPF_JMP | BPF_EXIT

# What the source register of a 64-bit load means ...
BPF_PSEUDO_MAP_FD = 1
BPF_PSEUDO_MAP_VALUE = 2
BPF_PSEUDO_BTF_ID = 3
BPF_PSEUDO_FUNC = 4
# ... and that of a call.
BPF_PSEUDO_CALL = 1
BPF_PSEUDO_KFUNC_CALL = 2


class RelocationType(IntEnum):
    """The types of relocations in objects for BPF; the last one is gcc's."""

    R_BPF_64_64 = 1
    R_BPF_64_ABS64 = 2
    R_BPF_64_ABS32 = 3
    R_BPF_64_NODYLD32 = 4
    R_BPF_64_32 = 10
    R_BPF_DATA_64 = 12


class _Layout(NamedTuple):
    """The differences of a byte order: the four bits of the source register, and numbers."""

    source_shift: int
    whole: struct.Struct
    off: struct.Struct
    imm: struct.Struct
    unsigned: struct.Struct

    @classmethod
    def of(cls, mark: str, source_shift: int) -> _Layout:
        return cls(source_shift, *(struct.Struct(mark + text) for text in ("BBhi", "h", "i", "I")))


_LAYOUTS = {"little": _Layout.of("<", 4), "big": _Layout.of(">", 0)}


class Instruction(NamedTuple):
    """One instruction; ``at`` counts in units of eight bytes, ``high`` is a 64-bit load's rest."""

    at: int
    code: int
    dst: int
    src: int
    off: int
    imm: int
    high: int = 0

    @property
    def kind(self) -> int:
        """The class, such as BPF_JMP."""
        return self.code & CLASS_MASK

    @property
    def operation(self) -> int:
        """The operation of arithmetic or of a jump, such as BPF_ADD."""
        return self.code & OPERATION_MASK

    @property
    def mode(self) -> int:
        """The mode of a load or store, such as BPF_MEM."""
        return self.code & MODE_MASK

    @property
    def size(self) -> int:
        """The size of a load or store, such as BPF_DW."""
        return self.code & SIZE_MASK

    @property
    def takes_register(self) -> bool:
        """Whether the other operand is a register and not the immediate value."""
        return self.code & SOURCE_MASK == BPF_X

    @property
    def is_long_jump(self) -> bool:
        """Whether this is a jump whose distance is the immediate value (cpu v4)."""
        return self.code == BPF_JMP32 | BPF_JA

    @property
    def distance(self) -> int:
        """How far a jump goes on from the next instruction, in units of eight bytes."""
        return self.imm if self.is_long_jump else self.off


class Code:
    """Instructions in the byte order of an object; changed in place where they are a bytearray.

    Nothing is checked: an offset must be the beginning of an instruction that is there whole.
    """

    __slots__ = ("_code", "_layout")

    def __init__(self, code: Union[bytes, bytearray], byteorder: str) -> None:
        self._code: bytearray = code  # type: ignore[assignment]  # bytes are only read
        self._layout = _LAYOUTS[byteorder]

    def __len__(self) -> int:
        """Return the length in bytes."""
        return len(self._code)

    def opcode(self, at: int) -> int:
        """Return the opcode."""
        return self._code[at]

    def source(self, at: int) -> int:
        """Return the source register, or what stands in its place."""
        return self._code[at + 1] >> self._layout.source_shift & 0xF

    def off(self, at: int) -> int:
        """Return the offset, a number with a sign."""
        return int(self._layout.off.unpack_from(self._code, at + 2)[0])

    def imm(self, at: int) -> int:
        """Return the immediate value, a number with a sign."""
        return int(self._layout.imm.unpack_from(self._code, at + 4)[0])

    def imm64(self, at: int) -> int:
        """Return the immediate value of a 64-bit load, without a sign."""
        low, high = (self._layout.unsigned.unpack_from(self._code, at + n)[0] for n in (4, 12))
        return int(low | high << 32)

    def is_wide(self, at: int) -> bool:
        """Return whether a 64-bit load begins here, and is there whole."""
        return self._code[at] == LD_IMM64 and at + 2 * INSN_BYTES <= len(self._code)

    def width(self, at: int) -> int:
        """Return the length of the instruction in bytes."""
        return 2 * INSN_BYTES if self.is_wide(at) else INSN_BYTES

    def target(self, at: int) -> int:
        """Return the byte that a call by distance reaches."""
        return at + INSN_BYTES * (self.imm(at) + 1)

    def calls(self) -> Iterator[int]:
        """Return where calls are, of any kind; a search of bytes, since most code is no call."""
        code = self._code
        at = code.find(CALL)
        while at >= 0:
            # The same byte may be another part of an instruction, or of a 64-bit load's rest.
            if at % INSN_BYTES == 0 and (at < INSN_BYTES or code[at - INSN_BYTES] != LD_IMM64):
                yield at
            at = code.find(CALL, at + 1)

    def set_opcode(self, at: int, opcode: int) -> None:
        """Set the opcode."""
        self._code[at] = opcode

    def set_source(self, at: int, source: int) -> None:
        """Set the source register, or what stands in its place."""
        shift = self._layout.source_shift
        self._code[at + 1] = self._code[at + 1] & ~(0xF << shift) | source << shift

    def set_off(self, at: int, off: int) -> None:
        """Set the offset."""
        self._layout.off.pack_into(self._code, at + 2, off)

    def set_imm(self, at: int, imm: int) -> None:
        """Set the immediate value, with or without a sign."""
        self._layout.unsigned.pack_into(self._code, at + 4, imm & 0xFFFFFFFF)

    def set_imm64(self, at: int, value: int) -> None:
        """Set the immediate value of a 64-bit load, with or without a sign."""
        self.set_imm(at, value)
        self.set_imm(at + INSN_BYTES, value >> 32)

    def set_target(self, at: int, target: int) -> None:
        """Let a call by distance, or the load of a function's address, reach another byte."""
        self.set_imm(at, (target - at) // INSN_BYTES - 1)

    def put(self, at: int, opcode: int, *, imm: int = 0) -> None:
        """Put an instruction without registers and offset in the place of another."""
        self._layout.whole.pack_into(self._code, at, opcode, 0, 0, imm)


def encoded(
    opcode: int,
    *,
    dst: int = 0,
    src: int = 0,
    off: int = 0,
    imm: int = 0,
    byteorder: str = sys.byteorder,
) -> bytes:
    """Return the eight bytes of an instruction."""
    layout = _LAYOUTS[byteorder]
    registers = src << layout.source_shift | dst << 4 - layout.source_shift
    return layout.whole.pack(opcode, registers, off, imm)


def decoded(code: bytes, byteorder: str = sys.byteorder) -> Iterator[Instruction]:
    """Return the instructions of some code; a 64-bit load is one.

    Bytes at the end that make no whole instruction are left out.
    """
    source_shift, whole, *_ = _LAYOUTS[byteorder]
    target_shift = 4 - source_shift
    rows = enumerate(whole.iter_unpack(code[: len(code) // INSN_BYTES * INSN_BYTES]))
    for at, (opcode, registers, off, imm) in rows:
        dst, src = registers >> target_shift & 0xF, registers >> source_shift & 0xF
        high = 0
        if opcode == LD_IMM64:
            _, (*_, rest) = next(rows, (0, (0,)))
            high = rest & 0xFFFFFFFF
        yield Instruction(at, opcode, dst, src, off, imm, high)
