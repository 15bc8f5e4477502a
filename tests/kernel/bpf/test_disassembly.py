"""Instructions as text: the verifier's log and bpftool print the same of the same programs."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiled import compiled
from since import since

from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.bpf import features, loader, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd, ProgType
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.obj import asm, disasm, elf
from pybpfthrottle.bpf.obj.asm import insn
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.obj.helper_names import helper_name
from pybpfthrottle.bpf.xlated import xlated_lines

GETSOCKOPT = 57  # of enum bpf_func_id


def arithmetic() -> bytes:
    """Each operation of 64 and 32 bits, with a number and with a register, and those of cpu v4."""
    code = asm.mov_imm(0, 7) + asm.mov_imm(1, 3)
    for kind in (0x7, 0x4):
        for operation in (0x0, 0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0x9, 0xA, 0xB, 0xC):
            code += insn(operation << 4 | kind, dst=0, imm=5)
            code += insn(operation << 4 | 8 | kind, dst=0, src=1)
        code += insn(0x80 | kind, dst=0)
        for operation in (0x3, 0x9):
            code += insn(operation << 4 | kind, dst=0, imm=3, off=1)
            code += insn(operation << 4 | 8 | kind, dst=0, src=1, off=1)
        for bits in (8, 16):
            code += insn(0xB8 | kind, dst=0, src=1, off=bits)
    code += insn(0xBF, dst=0, src=1, off=32)
    for bits in (16, 32, 64):
        code += insn(0xD4, dst=0, imm=bits) + insn(0xDC, dst=0, imm=bits)
        code += insn(0xD7, dst=0, imm=bits)
    return code + asm.return_imm(0)


def memory() -> bytes:
    """Loads and stores of each size, with and without a sign, and atomic operations."""
    code = asm.mov_imm(0, 0) + asm.mov_imm(1, 1)
    for size in (0x18, 0x00, 0x08, 0x10):
        code += insn(0x62 | size, dst=10, off=-8, imm=-5)
        code += insn(0x63 | size, dst=10, src=1, off=-8)
        code += insn(0x61 | size, dst=2, src=10, off=-8)
    for size in (0x00, 0x08, 0x10):
        code += insn(0x81 | size, dst=2, src=10, off=-8)
    for size in (0x18, 0x00):
        code += insn(0x7A, dst=10, off=-8)
        for operation in (0x00, 0x40, 0x50, 0xA0, 0x01, 0x41, 0x51, 0xA1, 0xE1, 0xF1, 0x110):
            code += insn(0xC3 | size, dst=10, src=1, off=-8, imm=operation)
        code += insn(0xC3 | size, dst=2, src=10, off=-8, imm=0x100)
    return code + asm.return_imm(0)


def jumps() -> bytes:
    """Each comparison of 64 and 32 bits, far jumps, calls of a helper and of a function."""
    code = asm.call(7) + asm.mov_imm(6, 3)
    for kind in (0x5, 0x6):
        for operation in (0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0xA, 0xB, 0xC, 0xD):
            # Linux 7.2 shows one whose outcome it knows as an unconditional one.
            code += insn(operation << 4 | kind, dst=0, off=1, imm=-9) + asm.mov_imm(2, 0)
            code += insn(operation << 4 | 8 | kind, dst=0, src=6, off=1) + asm.mov_imm(2, 0)
    code += insn(0x05) + insn(0x06) + insn(0xE5, off=1) + asm.mov_imm(2, 0)
    code += insn(0x18, dst=1, imm=-2) + insn(0, imm=1)
    code += insn(0x85, src=1, imm=2) + asm.return_imm(0) + asm.return_imm(1)
    return code


def packets() -> bytes:
    """Loads from a packet, at a place and behind a register."""
    code = asm.mov(6, 1) + asm.mov_imm(7, 1)
    for size in (0x00, 0x08, 0x10):
        code += insn(0x20 | size, imm=2) + insn(0x40 | size, src=7, imm=1)
    return code + asm.return_imm(0)


def verifier_lines(code: bytes) -> dict[int, str]:
    """The instructions that the verifier's log shows."""
    instructions = ctypes.create_string_buffer(code, len(code))
    license_name = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(1 << 22)
    attr = Attr()
    attr.prog_load.prog_type = ProgType.SOCKET_FILTER
    attr.prog_load.insns = ctypes.addressof(instructions)
    attr.prog_load.insn_cnt = len(code) // 8
    attr.prog_load.license = ctypes.addressof(license_name)
    attr.prog_load.log_level = 2
    attr.prog_load.log_buf = ctypes.addressof(log)
    attr.prog_load.log_size = len(log)
    try:
        os.close(syscall.bpf(Cmd.PROG_LOAD, attr))
    except OSError as error:
        raise AssertionError(log.value.decode()[-2000:]) from error
    shown = re.findall(r"^(\d+): (\([0-9a-f]{2}\) .*?)(?:\s+;.*)?$", log.value.decode(), re.M)
    return {int(index): text for index, text in shown}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(arithmetic, marks=since("6.6")),
        pytest.param(memory, marks=since("6.15")),
        pytest.param(jumps, marks=since("6.9")),
        packets,
    ],
    ids=lambda code: code.__name__,
)
def test_the_text_is_the_verifiers(code) -> None:
    """Each instruction is shown as the verifier of the running kernel shows it."""
    wanted = verifier_lines(code())
    found = {line.at: line.text for line in disasm.disassemble(code())}
    assert {index: found[index] for index in wanted} == wanted
    assert len(wanted) > len(found) * 0.6


def test_helpers_have_the_kernels_names() -> None:
    """The table of helpers is the running kernel's enum."""
    types = Btf(Path("/sys/kernel/btf/vmlinux").read_bytes())
    names = next(
        list(types.enumerators(found))
        for found in types.types
        if found.kind == Kind.ENUM and found.vlen > 100
        if any(name.name == "BPF_FUNC_map_lookup_elem" for name in types.enumerators(found))
    )
    known = {name.value: name.name for name in names if not name.name.startswith("_")}
    del known[0]
    assert {n: helper_name(n) for n in known} == {
        n: name.replace("BPF_FUNC_", "bpf_") for n, name in known.items()
    }
    assert helper_name(0) == helper_name(212) == "unknown"


@pytest.fixture(params=["values", "ring", "throttle", "throttle-direct"])
def loaded(request: pytest.FixtureRequest) -> Iterator[Object]:
    """The programs of an object, loaded."""
    if request.param.startswith("throttle"):
        spec = shipped.read_anew(request.param)
        for program in shipped.PROGRAMS:
            if program.name in spec.programs:
                spec.programs[program.name].autoload = shipped.is_for_this_kernel(program)
        # Its helper is for programs of this type since Linux 5.15.
        getsockopt = features.helper(ProgType.CGROUP_SOCKOPT, GETSOCKOPT)
        spec.programs["pybpft_adopt"].autoload = getsockopt.available()
    else:
        spec = elf.read_object(compiled(request.param), name=request.param)
    with loader.load(spec) as found:
        yield found


def test_the_kernels_code_is_shown_as_bpftool_shows_it(loaded: Object) -> None:
    """Each line of bpftool's dump is ours, functions by their names included."""
    for program in loaded.programs.values():
        done = subprocess.run(
            ["bpftool", "prog", "dump", "xlated", "id", str(program.info().id)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        wanted = re.findall(r"^ *(\d+): (.*)$", done.stdout, re.M)
        found = [(str(line.at), line.text) for line in xlated_lines(program.fd)]
        # What that bpftool is too old for: the address of a per-CPU value.
        found = [(n, text.replace("&(void __percpu *)(r0)", "r0")) for n, text in found]
        assert found == wanted
        assert len(found) > 10


def test_the_code_that_was_loaded_is_as_long_as_the_kernel_says(loaded: Object) -> None:
    """The code that is read is of the length that the info has."""
    for program in loaded.programs.values():
        assert len(program.code()) == program.info().xlated_bytes
