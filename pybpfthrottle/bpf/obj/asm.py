"""A few instructions by name, in the byte order of this machine, for programs without an object.

Source: Documentation/bpf/standardization/instruction-set.rst of the kernel.
"""

from __future__ import annotations

from pybpfthrottle.bpf.obj.insn import (
    BPF_ALU64,
    BPF_K,
    BPF_MOV,
    BPF_PSEUDO_MAP_FD,
    BPF_PSEUDO_MAP_VALUE,
    BPF_X,
    CALL,
    EXIT,
    LD_IMM64,
)
from pybpfthrottle.bpf.obj.insn import encoded as insn

__all__ = ["call", "exit_", "insn", "load_map", "load_map_value", "mov", "mov_imm", "return_imm"]


def mov_imm(dst: int, imm: int) -> bytes:
    """Return ``dst = imm``."""
    return insn(BPF_ALU64 | BPF_MOV | BPF_K, dst=dst, imm=imm)


def mov(dst: int, src: int) -> bytes:
    """Return ``dst = src``."""
    return insn(BPF_ALU64 | BPF_MOV | BPF_X, dst=dst, src=src)


def load_map(dst: int, map_fd: int) -> bytes:
    """Return ``dst = map``, which takes the room of two instructions."""
    return insn(LD_IMM64, dst=dst, src=BPF_PSEUDO_MAP_FD, imm=map_fd) + insn(0)


def load_map_value(dst: int, map_fd: int, offset: int) -> bytes:
    """Return ``dst = &value[offset]`` of an array of one element. Linux 5.2."""
    first = insn(LD_IMM64, dst=dst, src=BPF_PSEUDO_MAP_VALUE, imm=map_fd)
    return first + insn(0, imm=offset)


def call(helper: int) -> bytes:
    """Return ``r0 = helper(r1, ..., r5)``."""
    return insn(CALL, imm=helper)


def exit_() -> bytes:
    """Return the end of a program, whose result is r0."""
    return insn(EXIT)


def return_imm(value: int) -> bytes:
    """Return the code of a program that returns ``value``."""
    return mov_imm(0, value) + exit_()
