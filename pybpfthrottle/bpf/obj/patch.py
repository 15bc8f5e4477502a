"""Answers of CO-RE and of externs -> changed instructions. Pure.

Source: Documentation/bpf/standardization/instruction-set.rst of the kernel.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from pybpfthrottle.bpf import abi

if TYPE_CHECKING:
    from pybpfthrottle.bpf.obj.core import Answer

# No helper has such a number, so the verifier refuses a program that reaches the call; the number
# less this one tells which of the program's poisoned instructions it was. bpftool users know it.
POISON = 195896080

_CLASS, _SOURCE_REGISTER = 0x07, 0x08
_LD, _LDX, _ST, _STX, _ALU, _ALU64 = 0, 1, 2, 3, 4, 7
_SIZE = 0x18
_SIZES = {4: 0x00, 2: 0x08, 1: 0x10, 8: 0x18}
_MODE, _MEM = 0xE0, 0x60
_MAX_OFFSET = (1 << 15) - 1


class Poisoned(NamedTuple):
    """What a poisoned instruction asked for: ``access`` such as "struct sock.gone".

    ``local_type`` is the object's type that it did so by, empty for a function; ``question`` what
    it wanted to know.
    """

    access: str
    local_type: str
    question: str


class PatchError(ValueError):
    """An instruction that an answer does not go into; the reader knows where it is."""


class Instructions:
    """Instructions in the byte order of an object, to be changed in place."""

    def __init__(self, code: bytearray, byteorder: str) -> None:
        self._code = code
        self._order = "<" if byteorder == "little" else ">"
        self._source_shift = 4 if byteorder == "little" else 0

    def answer(self, at: int, answer: Answer, poison: int) -> bool:
        """Put an answer into the instruction at byte ``at``; the instruction tells where.

        Where there is none, or the instruction cannot move so many bytes, it becomes a poisoned
        one of this number, and the result is False. Raises PatchError.
        """
        code = self._opcode(at)
        kind = code & _CLASS
        is_load = kind in (_LDX, _ST, _STX)
        load = answer.load
        resized = is_load and load is not None and load.local_bytes != load.target_bytes
        if answer.target is None or (resized and load is not None and not load.resizable):
            self.poison(at, poison)
            return False
        if is_load:
            self._put_offset(at, answer, answer.target)
            if resized and load is not None:
                self._resize(at, load.target_bytes)
        elif kind in (_ALU, _ALU64) and not code & _SOURCE_REGISTER:
            self._put_imm(at, answer, answer.target)
        elif code == abi.BPF_LD_IMM64 and at + 2 * abi.INSN_BYTES <= len(self._code):
            self._put_imm64(at, answer, answer.target)
        else:
            raise PatchError(f"no answer goes into an instruction of opcode {code:#x}")
        return True

    def poison(self, at: int, number: int) -> None:
        """Make an instruction (of either width) a call that the verifier refuses."""
        length = 2 if self._opcode(at) == abi.BPF_LD_IMM64 else 1
        for offset in range(at, min(at + length * abi.INSN_BYTES, len(self._code)), 8):
            struct.pack_into(
                self._order + "BBhi", self._code, offset, abi.BPF_CALL, 0, 0, POISON + number
            )

    def load_imm64(self, at: int, source: int, low: int, high: int) -> None:
        """Set both halves of a 64-bit load, and what they mean. Raises PatchError."""
        if self._opcode(at) != abi.BPF_LD_IMM64 or at + 2 * abi.INSN_BYTES > len(self._code):
            raise PatchError("no 64-bit load")
        self._set_source(at, source)
        struct.pack_into(self._order + "I", self._code, at + 4, low)
        struct.pack_into(self._order + "I", self._code, at + 12, high)

    def call_kernel(self, at: int, function: int, descriptor: int) -> None:
        """Make a call one of a kernel function, of the module at that place of fd_array."""
        if self._opcode(at) != abi.BPF_CALL:
            raise PatchError("no call")
        self._set_source(at, abi.BPF_PSEUDO_KFUNC_CALL)
        struct.pack_into(self._order + "hi", self._code, at + 2, descriptor, function)

    def _opcode(self, at: int) -> int:
        if at < 0 or at % abi.INSN_BYTES or at + abi.INSN_BYTES > len(self._code):
            raise PatchError("no instruction begins here")
        return self._code[at]

    def _set_source(self, at: int, source: int) -> None:
        kept = 0x0F << (4 - self._source_shift)
        self._code[at + 1] = self._code[at + 1] & kept | source << self._source_shift

    def _put_offset(self, at: int, answer: Answer, value: int) -> None:
        self._check(answer, struct.unpack_from(self._order + "h", self._code, at + 2)[0])
        if value > _MAX_OFFSET:
            raise PatchError(f"the offset {value} is too large for an instruction")
        struct.pack_into(self._order + "h", self._code, at + 2, value)

    def _put_imm(self, at: int, answer: Answer, value: int) -> None:
        found = struct.unpack_from(self._order + "I", self._code, at + 4)[0]
        self._check(answer._replace(local=answer.local & 0xFFFFFFFF), found)
        struct.pack_into(self._order + "I", self._code, at + 4, value & 0xFFFFFFFF)

    def _put_imm64(self, at: int, answer: Answer, value: int) -> None:
        low, high = struct.unpack_from(self._order + "I4xI", self._code, at + 4)
        self._check(answer, low | high << 32)
        self.load_imm64(at, 0, value & 0xFFFFFFFF, value >> 32)

    def _check(self, answer: Answer, found: int) -> None:
        if answer.checked and found != answer.local:
            raise PatchError(f"{answer.local} is expected in the instruction, not {found}")

    def _resize(self, at: int, size: int) -> None:
        """Change the number of bytes that a load or store moves."""
        code = self._code[at]
        if size not in _SIZES or code & _MODE != _MEM:
            raise PatchError(f"no load or store moves {size} bytes")
        self._code[at] = code & ~_SIZE | _SIZES[size]
