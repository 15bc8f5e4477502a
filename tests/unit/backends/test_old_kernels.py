"""Proves that the object for old kernels has nothing in it that is newer than Linux 4.14."""

from __future__ import annotations

import sys
from pathlib import Path

import linux_4_14
import pytest
from linux_4_14 import context_accesses, too_new

from pybpfthrottle.bpf.obj import asm, elf, relocate

PREBUILT = Path(__file__).resolve().parents[3] / "prebuilt"


def code_of(name, program):
    """The instructions of a shipped program as they are given to the kernel."""
    target = "bpfel" if sys.byteorder == "little" else "bpfeb"
    spec = elf.read_file(PREBUILT / f"{name}.{target}.o")
    linked = relocate.link(spec, spec.programs[program])
    return relocate.resolve(linked, dict.fromkeys(spec.maps, 3))


@pytest.fixture(params=["pybpft_ingress", "pybpft_egress", "pybpft_egresscn"])
def code(request):
    """Each program of the object for old kernels."""
    return code_of("throttle", request.param)


def test_no_instruction_is_newer_than_4_14(code):
    """Each instruction, helper and jump is one that Linux 4.14 takes."""
    assert list(too_new(code)) == []


def test_only_old_fields_of_the_context_are_read(code):
    """Of the context only length, mark and interface are read, and nothing is written."""
    assert context_accesses(code) == []


def test_the_fields_are_found(code, monkeypatch):
    """The proof does see the reads that are there: they are reported once they are forbidden."""
    monkeypatch.setattr(linux_4_14, "CONTEXT_OFFSETS", {})
    read = {line.partition(": ")[2] for line in context_accesses(code)}
    # The mark of a packet that comes again is of downloads only.
    assert read - {"reads the context at 8"} == {
        "reads the context at 0",
        "reads the context at 40",
    }


def test_the_object_for_new_kernels_reads_what_4_14_has_not():
    """The proof fails for the object that reads packets directly, which needs Linux 5.0."""
    found = context_accesses(code_of("throttle-direct", "pybpft_ingress"))
    assert any(line.endswith("reads the context at 76") for line in found)


INSN = asm.insn
RETURN = asm.return_imm(1)


@pytest.mark.parametrize(
    ("instruction", "what"),
    [
        (INSN(0x16, dst=1) + RETURN, "0: opcode 0x16"),  # a jump on 32 bits, 5.1
        (INSN(0xA5, dst=1) + RETURN, "0: opcode 0xa5"),  # jlt, 4.14 has it, cpu v1 has not
        (INSN(0xC4, dst=1, imm=1) + RETURN, "0: opcode 0xc4"),  # 32-bit arithmetic shift, 5.0
        (INSN(0xD7, dst=1, imm=16) + RETURN, "0: opcode 0xd7"),  # bswap, 6.6
        (INSN(0x91, dst=1, src=1) + RETURN, "0: opcode 0x91"),  # sign-extending load, 6.6
        (INSN(0xBF, dst=1, src=2, off=8) + RETURN, "0: offset 8 of an operation"),
        (INSN(0x3F, dst=1, src=2, off=1) + RETURN, "0: offset 1 of an operation"),
        (INSN(0xDB, dst=1, src=2, imm=1) + RETURN, "0: atomic operation 0x1"),
        (INSN(0x85, src=1, imm=1) + RETURN, "0: call 1 of kind 1"),
        (asm.call(125) + RETURN, "0: call 125 of kind 0"),
        (asm.load_map_value(1, 3, 0) + RETURN, "0: 64-bit load of kind 2"),
        (RETURN + INSN(0x05, off=-3), "2: jump by -3"),
        (INSN(0x05, off=2) + RETURN, "0: jump by 2"),
        (INSN(0x05, off=1) + asm.load_map(1, 3) + RETURN, "0: jump by 1"),
        (asm.mov_imm(1, 0) * 4094 + RETURN, "4096 instructions"),
    ],
)
def test_what_is_too_new_is_found(instruction, what):
    """The check finds each kind of thing that old kernels do not take."""
    assert list(too_new(instruction)) == [what]


@pytest.mark.parametrize(
    "instruction",
    [
        INSN(0xDB, dst=1, src=2),  # xadd
        INSN(0xC3, dst=1, src=2),
        INSN(0xDC, dst=1, imm=16),  # to big endian
        asm.load_map(1, 3),
        asm.call(26),
        INSN(0x55, dst=1, off=1),
    ],
)
def test_what_is_old_is_allowed(instruction):
    """The check lets instructions of old kernels pass."""
    assert list(too_new(instruction + RETURN)) == []


def load(dst, src, off, code=0x61):
    """A load from memory, of a word unless another code is given."""
    return INSN(code, dst=dst, src=src, off=off)


SPILL = INSN(0x7B, dst=10, src=1, off=-8)
FILL = load(2, 10, -8, 0x79)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (load(0, 1, 76), "0: reads the context at 76"),
        (load(0, 1, 0, 0x69), "0: reads the context at 0"),
        (asm.mov(6, 1) + load(0, 6, 4), "1: reads the context at 4"),
        (SPILL + FILL + load(0, 2, 76), "2: reads the context at 76"),
        (
            asm.mov(3, 10)
            + INSN(0x07, dst=3, imm=-16)
            + INSN(0x7B, dst=3, src=1, off=8)
            + FILL
            + load(0, 2, 76),
            "4: reads the context at 76",
        ),
        (asm.mov(6, 1) + asm.call(5) + load(0, 6, 4), "2: reads the context at 4"),
        # Only one of the two ways puts the context into r2.
        (INSN(0x15, dst=3, off=1) + asm.mov(2, 1) + load(0, 2, 12), "2: reads the context at 12"),
        (INSN(0x63, dst=1, src=2), "0: writes into the context"),
        (INSN(0x62, dst=1), "0: writes into the context"),
        (INSN(0x07, dst=1, imm=4), "0: calculates with the context"),
        (INSN(0x0F, dst=2, src=1), "0: calculates with the context"),
        (INSN(0x7B, dst=0, src=1), "0: lets the context out of sight"),
    ],
)
def test_a_wrong_access_to_the_context_is_found(program, found):
    """The analysis follows the context through moves, the stack, calls and branches."""
    assert context_accesses(program + RETURN) == [found]


@pytest.mark.parametrize(
    "program",
    [
        load(0, 1, 0) + load(0, 1, 40),
        asm.mov(1, 2) + load(0, 1, 76),
        asm.call(5) + load(0, 1, 76),
        SPILL + INSN(0x7A, dst=10, off=-8) + FILL + load(0, 2, 76),
        INSN(0x7B, dst=10, src=3, off=-8) + FILL + load(0, 2, 76),
    ],
)
def test_what_is_no_access_to_the_context_is_allowed(program):
    """A register or slot that was overwritten holds the context no more."""
    assert context_accesses(program + RETURN) == []
