"""Answers of CO-RE and of externs -> changed instructions. Pure.

Source: Documentation/bpf/standardization/instruction-set.rst of the kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybpfthrottle.bpf.obj.insn import (
    BPF_ALU,
    BPF_ALU64,
    BPF_K,
    BPF_MEM,
    BPF_PSEUDO_KFUNC_CALL,
    CALL,
    CLASS_MASK,
    INSN_BYTES,
    LOADS_AND_STORES,
    MODE_MASK,
    SIZE_MASK,
    SIZES,
    SOURCE_MASK,
    Code,
)
from pybpfthrottle.bpf.obj.plain import NamedTuple

if TYPE_CHECKING:
    from pybpfthrottle.bpf.obj.core import Answer

# No helper has such a number, so the verifier refuses a program that reaches the call; the number
# less this one tells which of the program's poisoned instructions it was. bpftool users know it.
POISON = 195896080

_MAX_OFFSET = (1 << 15) - 1


class Poisoned(NamedTuple):
    """The question of a poisoned instruction: ``access`` such as "struct sock.gone".

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
        self._code = Code(code, byteorder)

    def answer(self, at: int, answer: Answer, poison: int) -> bool:
        """Put an answer into the instruction at byte ``at``; the instruction tells where.

        Where there is none, or the instruction cannot move so many bytes, it becomes a poisoned
        one of this number, and the result is False. Raises PatchError.
        """
        opcode = self._opcode(at)
        kind = opcode & CLASS_MASK
        is_load = kind in LOADS_AND_STORES
        load = answer.load
        resized = is_load and load is not None and load.local_bytes != load.target_bytes
        if answer.target is None or (resized and load is not None and not load.resizable):
            self.poison(at, poison)
            return False
        if is_load:
            self._put_offset(at, answer, answer.target)
            if resized and load is not None:
                self._resize(at, load.target_bytes)
        elif kind in (BPF_ALU, BPF_ALU64) and opcode & SOURCE_MASK == BPF_K:
            self._put_imm(at, answer, answer.target)
        elif self._code.is_wide(at):
            self._put_imm64(at, answer, answer.target)
        else:
            raise PatchError(f"an instruction of opcode {opcode:#x} cannot be relocated")
        return True

    def poison(self, at: int, number: int) -> None:
        """Make an instruction (of either width) a call that the verifier refuses."""
        self._opcode(at)
        # Both halves: the verifier would take the second one for an instruction of its own.
        for offset in range(at, at + self._code.width(at), INSN_BYTES):
            self._code.put(offset, CALL, imm=POISON + number)

    def load_imm64(self, at: int, source: int, value: int) -> None:
        """Set the value of a 64-bit load, and what it means. Raises PatchError."""
        self._opcode(at)
        if not self._code.is_wide(at):
            raise PatchError("the instruction is not a 64-bit load")
        self._code.set_source(at, source)
        self._code.set_imm64(at, value)

    def call_kernel(self, at: int, function: int, descriptor: int) -> None:
        """Make a call one of a kernel function, of the module at that place of fd_array."""
        if self._opcode(at) != CALL:
            raise PatchError("the instruction is not a call")
        self._code.set_source(at, BPF_PSEUDO_KFUNC_CALL)
        self._code.set_off(at, descriptor)
        self._code.set_imm(at, function)

    def _opcode(self, at: int) -> int:
        if at < 0 or at % INSN_BYTES or at + INSN_BYTES > len(self._code):
            raise PatchError("no instruction begins here")
        return self._code.opcode(at)

    def _put_offset(self, at: int, answer: Answer, value: int) -> None:
        _check(answer, self._code.off(at))
        if value > _MAX_OFFSET:
            raise PatchError(f"the offset {value} is too large for an instruction")
        self._code.set_off(at, value)

    def _put_imm(self, at: int, answer: Answer, value: int) -> None:
        expected = answer._replace(local=answer.local & 0xFFFFFFFF)
        _check(expected, self._code.imm(at) & 0xFFFFFFFF)
        self._code.set_imm(at, value)

    def _put_imm64(self, at: int, answer: Answer, value: int) -> None:
        _check(answer, self._code.imm64(at))
        self.load_imm64(at, 0, value)

    def _resize(self, at: int, size: int) -> None:
        """Change the number of bytes that a load or store moves."""
        opcode = self._code.opcode(at)
        if size not in SIZES or opcode & MODE_MASK != BPF_MEM:
            raise PatchError(f"no load or store moves {size} bytes")
        self._code.set_opcode(at, opcode & ~SIZE_MASK | SIZES[size])


def _check(answer: Answer, value: int) -> None:
    if answer.checked and value != answer.local:
        raise PatchError(f"the instruction should contain {answer.local}, not {value}")
