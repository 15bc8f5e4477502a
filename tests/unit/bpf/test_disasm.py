from __future__ import annotations

import re
import subprocess

import pytest
from compiled import compiled
from hypothesis import given
from hypothesis import strategies as st
from since import needs_command

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.bpf.obj import asm, disasm, elf
from pybpfthrottle.bpf.obj.helper_names import helper_name
from pybpfthrottle.bpf.obj.insn import INSN_BYTES, decoded


def test_both_byte_orders_are_read() -> None:
    """The same program for machines of the other byte order is the same text."""
    texts = []
    for order in ("bpfel", "bpfeb"):
        spec = elf.read_object(programs.data(f"throttle.{order}.o"))
        function = spec.programs["pybpft_ingress"].function
        texts.append(list(disasm.disassemble(function.code, byteorder=spec.byteorder)))
    kinds = [[line.text[:4] for line in text if "skb" not in line.text] for text in texts]
    assert [line.text for line in texts[0][:5]] == [line.text for line in texts[1][:5]]
    assert sorted(set(kinds[0])) == sorted(set(kinds[1]))


@given(st.binary(max_size=200), st.sampled_from(["little", "big"]))
def test_any_bytes_are_shown(code: bytes, byteorder: str) -> None:
    """Whatever the bytes are, each eight of them are shown once."""
    lines = list(disasm.disassemble(code, byteorder=byteorder))
    wide = sum(one.code == 0x18 and one.at + 1 < len(code) // 8
               for one in decoded(code, byteorder))  # fmt: skip
    assert len(lines) + wide == len(code) // 8


HELPER = re.compile(r"call bpf_\w+#(\d+)")
MAP = re.compile(r"= map\[.*")
LABEL = re.compile(r" <\w+>$")
WIDE = re.compile(r"= 0x([0-9a-f]+)$")
HEXADECIMAL = re.compile(r"0x([0-9a-f]+) goto")
DISPLACED = re.compile(r"\((r\d+) ([+-])(\d+)\)")


def as_llvm_writes(text):
    """One of our lines in the words of llvm-objdump."""

    def signed(match):
        number = int(match[1], 16)
        return f"{number - (1 << 32) if number >> 31 else number} goto"

    text = text.partition(" ")[2]
    text = HEXADECIMAL.sub(signed, HELPER.sub(r"call \1", text))
    text = WIDE.sub(lambda match: f"= {int(match[1], 16)} ll", text)
    text = MAP.sub("= 0 ll", DISPLACED.sub(r"(\1 \2 \3)", text))
    return text.replace("goto pc", "goto ")


@pytest.mark.parametrize("cpu", ["v1", "v2", "v3"])
@pytest.mark.parametrize("name", ["values", "ring"])
def test_an_objects_code_is_llvm_objdumps(tmp_path, name, cpu):
    """Each function's instructions are what llvm-objdump shows, but for its spelling."""
    needs_command("llvm-objdump-14")
    path = tmp_path / "object.o"
    path.write_bytes(compiled(name, f"-mcpu={cpu}"))
    shown = subprocess.run(
        ["llvm-objdump-14", "-d", "--no-show-raw-insn", str(path)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    theirs = {
        (section, int(at)): LABEL.sub("", text)
        for section, body in re.findall(r"section (\S+):\n((?:(?!Disassembly).*\n?)*)", shown)
        for at, text in re.findall(r"^ +(\d+):\t(.*)$", body, re.M)
    }
    spec = elf.read_object(path.read_bytes())
    ours = {
        (function.key.section, function.key.offset // INSN_BYTES + line.at): line.text
        for function in spec.functions.values()
        for line in disasm.function_lines(function, spec.byteorder)
    }
    assert ours.keys() == theirs.keys()
    calls = {at for at, text in ours.items() if "call .text+" in text}
    assert {at: as_llvm_writes(text) for at, text in ours.items() if at not in calls} == {
        at: text for at, text in theirs.items() if at not in calls
    }
    assert len(ours) > 30


def test_an_objects_code_names_maps_and_functions():
    """A load of a map, of a variable, and a call have the names that the object gives them."""
    spec = elf.read_object(compiled("values"), name="values")
    lines = list(disasm.function_lines(spec.programs["count"].function, spec.byteorder))
    texts = [line.text for line in lines]
    assert "(18) r1 = map[counts]" in texts
    assert "(18) r1 = map[values.bss][0]+0" in texts
    assert "(85) call .text+0x0" in texts
    assert "(85) call bpf_map_lookup_elem#1" in texts


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (asm.load_map(1, 5), "(18) r1 = map[id:5]"),
        (asm.load_map_value(2, 5, 8), "(18) r2 = map[id:5][0]+8"),
        (asm.insn(0x18, dst=1, src=4, imm=3) + asm.insn(0), "(18) r1 = subprog[+3]"),
        (asm.insn(0x18, dst=1, imm=-1) + asm.insn(0, imm=-1), "(18) r1 = 0xffffffffffffffff"),
        (asm.insn(0x85, src=2, imm=7), "(85) call kernel-function#7"),
        (asm.insn(0x85, src=1, imm=-3), "(85) call pc-3"),
        (asm.insn(0x85, imm=9999), "(85) call unknown#9999"),
        (asm.insn(0x8D, dst=3), "(8d) callx r3"),
        (asm.insn(0xBF, dst=1, src=2, off=1, imm=1 << 16), "(bf) r1 = addr_space_cast(r2, 1, 0)"),
        (asm.insn(0xFF), "(ff) is not an instruction"),
        (asm.insn(0x18), "(18) r0 = 0x0"),
    ],
)
def test_an_instruction_is_text(code, text):
    """What the kernel's log does not show, or shows otherwise, has these words."""
    assert [line.text for line in disasm.disassemble(code)] == [text]


def test_helpers_have_names():
    """The first and the last helper have their names, and what is none is unknown."""
    assert helper_name(1) == "bpf_map_lookup_elem"
    assert helper_name(211) == "bpf_cgrp_storage_delete"
    assert [helper_name(n) for n in (-1, 0, 212)] == ["unknown"] * 3
