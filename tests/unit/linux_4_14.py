"""Finds what a program has in it that is newer than Linux 4.14.

Source: Documentation/networking/filter.txt and kernel/bpf/verifier.c of Linux 4.14.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.obj.insn import BPF_PSEUDO_MAP_FD, LD_IMM64

LDX, ST, STX, ALU, JMP, ALU64 = 0x1, 0x2, 0x3, 0x4, 0x5, 0x7
K, X = 0x00, 0x08
ADD, SUB, MUL, DIV, OR, AND = 0x00, 0x10, 0x20, 0x30, 0x40, 0x50
LSH, RSH, NEG, MOD, XOR, MOV, ARSH, END = 0x60, 0x70, 0x80, 0x90, 0xA0, 0xB0, 0xC0, 0xD0
JA, JEQ, JGT, JGE, JSET, JNE, JSGT, JSGE, CALL, EXIT = range(0x00, 0xA0, 0x10)
MEM, XADD = 0x60, 0xC0
WORD, HALF, BYTE, DOUBLE = 0x00, 0x08, 0x10, 0x18

_BOTH = (ADD, SUB, MUL, DIV, OR, AND, LSH, RSH, MOD, XOR, MOV)
OPCODES_OF_4_14 = {
    LD_IMM64,
    *(MEM | size | kind for size in (WORD, HALF, BYTE, DOUBLE) for kind in (LDX, ST, STX)),
    *(XADD | size | STX for size in (WORD, DOUBLE)),
    *(
        operation | source | kind
        for operation in _BOTH
        for source in (K, X)
        for kind in (ALU, ALU64)
    ),
    *(NEG | kind for kind in (ALU, ALU64)),
    # A 32-bit arithmetic shift is refused before Linux 5.0.
    *(ARSH | source | ALU64 for source in (K, X)),
    *(END | source | ALU for source in (K, X)),
    *(test | source | JMP for test in (JEQ, JGT, JGE, JSET, JNE, JSGT, JSGE) for source in (K, X)),
    *(JA | JMP, CALL | JMP, EXIT | JMP),
}
HELPERS = {1: "map_lookup_elem", 5: "ktime_get_ns", 26: "skb_load_bytes"}
CONTEXT_OFFSETS = {0: "len", 8: "mark", 40: "ifindex"}
MAX_INSTRUCTIONS = 4096


class Instruction(NamedTuple):
    """One instruction; ``wide`` for the first half of a 64-bit load."""

    code: int
    dst: int
    src: int
    off: int
    imm: int
    wide: bool

    @property
    def kind(self):
        """The class of the operation."""
        return self.code & 0x7


def decode(code):
    """The instructions by their number; the second half of a 64-bit load has none."""
    found = {}
    skip = False
    for index in range(len(code) // 8):
        raw = abi.Insn.from_buffer_copy(code, index * 8)
        if not skip:
            low, high = raw.registers & 0xF, raw.registers >> 4
            dst, src = (low, high) if sys.byteorder == "little" else (high, low)
            wide = raw.code == LD_IMM64
            found[index] = Instruction(raw.code, dst, src, raw.off, raw.imm, wide)
        skip = not skip and raw.code == LD_IMM64
    return found


def too_new(code):
    """Each instruction that Linux 4.14 would not take, in words."""
    instructions = decode(code)
    if len(code) // 8 >= MAX_INSTRUCTIONS:
        yield f"{len(code) // 8} instructions"
    for index, insn in instructions.items():
        if insn.code not in OPCODES_OF_4_14:
            yield f"{index}: opcode {insn.code:#x}"
        elif insn.wide and insn.src not in (0, BPF_PSEUDO_MAP_FD):
            yield f"{index}: 64-bit load of kind {insn.src}"
        elif insn.kind in (ALU, ALU64) and insn.off:
            yield f"{index}: offset {insn.off} of an operation"
        elif insn.code & 0xE0 == XADD and insn.kind == STX and insn.imm:
            yield f"{index}: atomic operation {insn.imm:#x}"
        elif insn.code == CALL | JMP and (insn.src or insn.imm not in HELPERS):
            yield f"{index}: call {insn.imm} of kind {insn.src}"
        elif is_jump(insn) and (insn.off < 0 or index + 1 + insn.off not in instructions):
            yield f"{index}: jump by {insn.off}"


def is_jump(insn):
    """Whether an instruction may go on elsewhere."""
    return insn.kind == JMP and insn.code not in (CALL | JMP, EXIT | JMP)


CONTEXT = "context"


class Places:
    """What each register and stack slot may hold: the context, or ("stack", offset), or else.

    Slots are named by their offset from the frame pointer.
    """

    def __init__(self, held=()):
        self.held = dict(held)

    def get(self, place):
        """What may be at a place."""
        return self.held.get(place, frozenset())

    def put(self, place, values):
        """Overwrite a place."""
        self.held = {**self.held, place: frozenset(values)}

    def joined(self, other):
        """What may be where, on either of two ways to an instruction."""
        return Places({p: self.get(p) | other.get(p) for p in {*self.held, *other.held}})

    def slots(self, register, offset):
        """The stack slots that an address may mean."""
        return {("slot", base[1] + offset) for base in self.get(register) if base != CONTEXT}


def successors(index, insn):
    """Where an instruction may go on."""
    if insn.code == EXIT | JMP:
        return []
    following = index + (2 if insn.wide else 1)
    if insn.code == JA | JMP:
        return [following + insn.off]
    return [following, following + insn.off] if is_jump(insn) else [following]


def context_accesses(code):
    """Each access to the context that Linux 4.14 would not allow, in words.

    Follows the context from r1 through moves, spills and fills, over all ways through the program.
    """
    instructions = decode(code)
    entry = Places()
    entry.put(1, {CONTEXT})
    entry.put(10, {("stack", 0)})
    before = {0: entry}
    pending = [0]
    found = set()
    while pending:
        index = pending.pop()
        insn = instructions[index]
        after = Places(before[index].held)
        found |= {f"{index}: {what}" for what in step(insn, after)}
        for following in successors(index, insn):
            known = before.get(following)
            joined = after if known is None else known.joined(after)
            if known is None or joined.held != known.held:
                before[following] = joined
                pending.append(following)
    return sorted(found)


def step(insn, places):
    """Do one instruction on ``places``; what is not allowed in it."""
    source, target = places.get(insn.src), places.get(insn.dst)
    slots = places.slots(insn.dst, insn.off)
    wrong = []
    if insn.kind == LDX:
        if CONTEXT in source and (insn.off not in CONTEXT_OFFSETS or insn.code & 0x18 != WORD):
            wrong.append(f"reads the context at {insn.off}")
        filled = [places.get(slot) for slot in places.slots(insn.src, insn.off)]
        places.put(insn.dst, frozenset().union(*filled) if insn.code & 0x18 == DOUBLE else ())
    elif insn.kind in (ST, STX):
        if CONTEXT in target:
            wrong.append("writes into the context")
        stored = source if insn.kind == STX else frozenset()
        if CONTEXT in stored and (not slots or insn.code != (MEM | DOUBLE | STX)):
            wrong.append("lets the context out of sight")
        for slot in slots:
            certain = len(slots) == len(target) == 1 and insn.code & 0x18 == DOUBLE
            places.put(slot, stored if certain else places.get(slot) | stored)
    elif insn.kind in (ALU, ALU64):
        if insn.code == MOV | X | ALU64:
            places.put(insn.dst, source)
        elif insn.code & 0xF0 == MOV:
            places.put(insn.dst, ())
        elif CONTEXT in target or (CONTEXT in source and insn.code & X):
            wrong.append("calculates with the context")
        elif insn.code == ADD | K | ALU64:
            places.put(insn.dst, {(kind, offset + insn.imm) for kind, offset in target})
        else:
            places.put(insn.dst, ())
    elif insn.code == CALL | JMP:
        for register in range(6):
            places.put(register, ())
    elif insn.wide:
        places.put(insn.dst, ())
    return wrong
