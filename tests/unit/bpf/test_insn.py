from __future__ import annotations

import sys

import pytest

from pybpfthrottle.bpf.obj import insn
from pybpfthrottle.bpf.obj.insn import Code, Instruction, decoded, encoded

BOTH = pytest.mark.parametrize("byteorder", ["little", "big"])
FIELDS = {"dst": 3, "src": 10, "off": -2, "imm": -5}
STORE = insn.BPF_STX | insn.BPF_MEM | insn.BPF_DW


def code_of(*rows, byteorder):
    """The instructions of (opcode, fields), one after the other."""
    return bytearray(
        b"".join(encoded(opcode, **fields, byteorder=byteorder) for opcode, fields in rows)
    )


@pytest.mark.parametrize(
    ("byteorder", "encoding"),
    [("little", "7ba3feff fbffffff"), ("big", "7b3afffe fffffffb")],
)
def test_the_encoding_is_that_of_the_kernels_documentation(byteorder, encoding):
    """The source register is the high half of its byte on little-endian machines, else the low."""
    assert encoded(STORE, **FIELDS, byteorder=byteorder) == bytes.fromhex(encoding)


def test_the_byte_order_is_that_of_this_machine_unless_it_is_said():
    """Without a byte order an instruction is one for the kernel of this machine."""
    assert encoded(STORE, **FIELDS) == encoded(STORE, **FIELDS, byteorder=sys.byteorder)


@BOTH
def test_what_was_encoded_is_decoded(byteorder):
    """Each field comes back, and a 64-bit load is one instruction of two places."""
    code = code_of(
        (STORE, FIELDS),
        (insn.LD_IMM64, {"dst": 1, "imm": -1}),
        (0, {"imm": -2}),
        (insn.EXIT, {}),
        byteorder=byteorder,
    )
    assert list(decoded(bytes(code) + b"\x95\0\0", byteorder)) == [
        Instruction(0, STORE, 3, 10, -2, -5),
        Instruction(1, insn.LD_IMM64, 1, 0, 0, -1, high=0xFFFFFFFE),
        Instruction(3, insn.EXIT, 0, 0, 0, 0),
    ]


@BOTH
def test_half_of_a_64_bit_load_is_an_instruction_of_its_own(byteorder):
    """A 64-bit load that is cut off after its first half has no upper part, and is not wide."""
    code = code_of((insn.LD_IMM64, {"imm": 7}), byteorder=byteorder)
    assert list(decoded(bytes(code), byteorder)) == [Instruction(0, insn.LD_IMM64, 0, 0, 0, 7)]
    assert not Code(code, byteorder).is_wide(0)
    assert Code(code, byteorder).width(0) == 8


@BOTH
def test_setting_a_field_leaves_the_others(byteorder):
    """Opcode, source register, offset and immediate value can be changed one by one."""
    code = code_of((STORE, FIELDS), byteorder=byteorder)
    view = Code(code, byteorder)
    view.set_opcode(0, insn.BPF_STX | insn.BPF_MEM | insn.BPF_W)
    view.set_source(0, 4)
    view.set_off(0, -300)
    view.set_imm(0, 1 << 31)
    row = next(decoded(bytes(code), byteorder))
    assert row == (0, insn.BPF_STX | insn.BPF_MEM | insn.BPF_W, 3, 4, -300, -(1 << 31), 0)
    assert (view.opcode(0), view.source(0), view.off(0), view.imm(0)) == (*row[1:2], *row[3:6])


@BOTH
def test_a_64_bit_value_is_in_two_halves(byteorder):
    """The lower part is in the first half, the upper part in the other, and neither has a sign."""
    code = code_of((insn.LD_IMM64, {"dst": 2}), (0, {}), byteorder=byteorder)
    view = Code(code, byteorder)
    view.set_imm64(0, 0x89ABCDEF_FEDCBA98)
    assert view.imm64(0) == 0x89ABCDEF_FEDCBA98
    assert view.imm(8) & 0xFFFFFFFF == 0x89ABCDEF
    assert view.is_wide(0)
    assert view.width(0) == 16


@BOTH
def test_a_call_counts_from_the_next_instruction(byteorder):
    """A call by distance reaches what its target was set to, before it or behind it."""
    code = code_of((insn.CALL, {"src": insn.BPF_PSEUDO_CALL}), byteorder=byteorder)
    view = Code(bytearray(8) + code + bytes(8), byteorder)
    assert view.target(8) == 16
    for target in (0, 800):
        view.set_target(8, target)
        assert view.target(8) == target


@BOTH
def test_calls_are_found_and_nothing_else(byteorder):
    """A byte 0x85 in a field, or in the rest of a 64-bit load, is no call."""
    code = code_of(
        (insn.BPF_ALU64 | insn.BPF_MOV, {"imm": 0x85, "off": 0x85}),
        (insn.LD_IMM64, {}),
        (insn.CALL, {}),
        (insn.CALL, {"imm": 0x85}),
        (insn.CALL, {"src": insn.BPF_PSEUDO_CALL}),
        byteorder=byteorder,
    )
    assert list(Code(code, byteorder).calls()) == [24, 32]


@pytest.mark.parametrize(
    ("opcode", "distance"),
    [
        (insn.BPF_JMP | insn.BPF_JA, -2),
        (insn.BPF_JMP32 | insn.BPF_JEQ, -2),
        (insn.BPF_JMP32 | insn.BPF_JA, -5),
    ],
)
def test_the_distance_of_a_long_jump_is_its_immediate_value(opcode, distance):
    """A jump of cpu v4 has 32 bits for its distance; every other has the offset."""
    (row,) = decoded(encoded(opcode, **FIELDS))
    assert row.distance == distance


def test_parts_of_an_opcode_are_those_of_the_kernel():
    """Class, operation, size, mode and source of an opcode are those that it was made of."""
    store = Instruction(0, STORE, 0, 0, 0, 0)
    assert (store.kind, store.size, store.mode) == (insn.BPF_STX, insn.BPF_DW, insn.BPF_MEM)
    jump = Instruction(0, insn.BPF_JMP32 | insn.BPF_JSLE | insn.BPF_X, 0, 0, 0, 0)
    assert (jump.kind, jump.operation) == (insn.BPF_JMP32, insn.BPF_JSLE)
    assert jump.takes_register
    assert (insn.LD_IMM64, insn.CALL, insn.EXIT) == (0x18, 0x85, 0x95)
