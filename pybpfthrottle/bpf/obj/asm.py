"""A few instructions by name, in the byte order of this machine, for programs without an object.

Source: Documentation/bpf/standardization/instruction-set.rst of the kernel.
"""

from __future__ import annotations

import struct
import sys

from pybpfthrottle.bpf import abi


def insn(code: int, *, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    """One instruction of eight bytes."""
    registers = dst | src << 4 if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhi", code, registers, off, imm)


def mov_imm(dst: int, imm: int) -> bytes:
    """Dst = imm."""
    return insn(0xB7, dst=dst, imm=imm)


def mov(dst: int, src: int) -> bytes:
    """Dst = src."""
    return insn(0xBF, dst=dst, src=src)


def load_map(dst: int, map_fd: int) -> bytes:
    """Dst = the map; two instructions' room."""
    return insn(abi.BPF_LD_IMM64, dst=dst, src=abi.BPF_PSEUDO_MAP_FD, imm=map_fd) + insn(0)


def load_map_value(dst: int, map_fd: int, offset: int) -> bytes:
    """Dst = the address of byte ``offset`` of a one-element array's value. Linux 5.2."""
    first = insn(abi.BPF_LD_IMM64, dst=dst, src=abi.BPF_PSEUDO_MAP_VALUE, imm=map_fd)
    return first + insn(0, imm=offset)


def call(helper: int) -> bytes:
    """r0 = helper(r1, ..., r5)."""
    return insn(abi.BPF_CALL, imm=helper)


def exit_() -> bytes:
    """Return r0."""
    return insn(0x95)


def return_imm(value: int) -> bytes:
    """A whole program that returns ``value``."""
    return mov_imm(0, value) + exit_()
