"""The code of a loaded program as text, with the kernel's own names for what it calls.

After verification a helper or kernel function is called by its distance from a symbol of the
kernel, and a function of the program by its number; the distance then stands in another field.
"""

from __future__ import annotations

from typing import Iterator

from pybpfthrottle.bpf import btf_objects
from pybpfthrottle.bpf.obj import disasm
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.disasm import Line
from pybpfthrottle.bpf.obj.insn import BPF_PSEUDO_CALL, Instruction
from pybpfthrottle.bpf.program_info import (
    function_addresses,
    line_records,
    program_info,
    xlated_code,
)

_BASE = "__bpf_call_base"


def xlated_lines(fd: int) -> Iterator[Line]:
    """Return the instructions of the program behind a descriptor. Linux 4.13; needs CAP_SYS_ADMIN.

    Functions are named where /proc/kallsyms shows addresses. Raises OSError.
    """
    return disasm.disassemble(xlated_code(fd), names=_KernelNames(function_addresses(fd)))


def source_lines(fd: int) -> dict[int, str]:
    """Return the text of the line of source that begins at an instruction, where it is known.

    Linux 5.0; needs CAP_SYS_ADMIN. Raises OSError, or ObjectFileError.
    """
    records = line_records(fd)
    if not records:
        return {}
    types = Btf(btf_objects.data_by_id(program_info(fd).btf_id))
    return {row.insn_off: types.string(row.line_off).strip() for row in records}


class _KernelNames(disasm.Names):
    def __init__(self, functions: tuple[int, ...]) -> None:
        self._functions = functions
        self._symbols = _Symbols()
        self._base = self._symbols.address(_BASE)

    def call(self, insn: Instruction) -> str:
        if insn.src == BPF_PSEUDO_CALL:
            return self._own_function(insn)
        name = self._symbols.name(self._base + insn.imm) if self._base else ""
        return f"{name or 'unknown'}#{insn.imm}"

    def _own_function(self, insn: Instruction) -> str:
        if not 0 <= insn.imm < len(self._functions):  # not compiled to machine code
            return super().call(insn)
        name = self._symbols.name(self._functions[insn.imm])
        return f"pc{insn.off:+d}#{name or hex(self._functions[insn.imm])}"


class _Symbols:
    """/proc/kallsyms, searched as it is: most of its lines are never needed."""

    def __init__(self) -> None:
        try:
            with open("/proc/kallsyms", "rb") as file:
                self._lines = b"\n" + file.read()
        except OSError:
            self._lines = b""

    def address(self, name: str) -> int:
        """Return the address of a symbol, 0 if it is not shown."""
        end = self._lines.find(b" " + name.encode() + b"\n")
        begin = self._lines.rfind(b"\n", 0, max(end, 0))
        return int(self._lines[begin:end].split()[0], 16) if end >= 0 else 0

    def name(self, address: int) -> str:
        """Return the name of the first symbol at an address, "" if there is none."""
        at = self._lines.find(b"\n%016x " % address)
        return self._lines[at : at + 512].split()[2].decode() if at >= 0 else ""
