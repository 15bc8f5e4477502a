"""Objects that are large, or that only say so: time and memory stay in proportion."""

from __future__ import annotations

import time
import tracemalloc

import pytest
from elf_builder import (
    LOCAL,
    NOTYPE,
    OBJECT,
    R_BPF_64_32,
    R_BPF_64_64,
    BtfBuilder,
    ObjectBuilder,
)

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import elf, relocate
from pybpfthrottle.bpf.obj.btf import Kind

PROGRAMS = 10_000
SECONDS = 10  # some 1 s is measured; quadratic time would be minutes


def programs_in_one_section(builder, code, helper, variable):
    """Many programs of one section, each with a call and a load."""
    names = [f"p{number}" for number in range(PROGRAMS)]
    index = builder.code("xdp", code * PROGRAMS, *names)
    for at in range(0, len(code) * PROGRAMS, len(code)):
        builder.relocation(index, at, variable, R_BPF_64_64)
        builder.relocation(index, at + 16, helper, R_BPF_64_32)


def programs_in_their_own_sections(builder, code, helper, variable):
    """Many programs, each in a section of its own."""
    for number in range(PROGRAMS):
        index = builder.code(f"kprobe/p{number}", code, f"p{number}")
        builder.relocation(index, 0, variable, R_BPF_64_64)
        builder.relocation(index, 16, helper, R_BPF_64_32)


@pytest.mark.parametrize("add", [programs_in_one_section, programs_in_their_own_sections])
def test_many_programs_do_not_take_quadratic_time(add):
    """An object of 10,000 programs is read and linked within seconds."""
    builder = ObjectBuilder()
    text = builder.code(".text", builder.returns())
    helper = builder.symbol("helper", text, size=16)
    data = builder.section(".data", bytes(8))
    variable = builder.symbol("variable", data, size=8, type=OBJECT)
    add(builder, builder.load() + builder.call() + builder.returns(), helper, variable)
    whole = builder.build()
    begin = time.process_time()
    spec = elf.read_object(whole)
    for program in spec.programs.values():
        relocate.resolve(relocate.link(spec, program), {"object.data": 3})
    assert time.process_time() - begin < SECONDS
    assert len(spec.programs) == PROGRAMS


def test_many_variables_of_a_large_enum_do_not_take_quadratic_time():
    """An enum of many values is looked through once for all of its variables."""
    builder, types = ObjectBuilder(), BtfBuilder()
    count = 5000
    tail = [part for value in range(count) for part in ("v", value)]
    enum = types.add(Kind.ENUM, "e", size=4, vlen=count, tail=tail)
    index = builder.section(".data", bytes(4 * count))
    tail = []
    for number in range(count):
        builder.symbol(f"x{number}", index, value=4 * number, size=4, type=OBJECT)
        const = types.add(Kind.CONST, size=enum)
        tail += [types.add(Kind.VAR, f"x{number}", size=const, tail=(1,)), 4 * number, 4]
    types.add(Kind.DATASEC, ".data", size=4 * count, vlen=count, tail=tail)
    builder.section(".BTF", types.build(), flags=0)
    whole = builder.build()
    begin = time.process_time()
    spec = elf.read_object(whole)
    assert time.process_time() - begin < SECONDS
    assert {found.signed for found in spec.variables.values()} == {False}


def peak_bytes(data):
    """The most memory that it takes to refuse an object."""
    tracemalloc.start()
    try:
        with pytest.raises(ObjectFileError):
            elf.read_object(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_functions_that_share_their_code_take_no_memory():
    """Functions that all reach over the same code are refused before they are copied."""
    builder = ObjectBuilder()
    count = 2000
    index = builder.code("xdp", builder.returns() * count)
    for number in range(count):
        builder.symbol(f"p{number}", index, value=8 * number, size=8 * (count - number))
    data = builder.build()
    assert peak_bytes(data) < 30 * len(data)


def test_names_that_share_their_bytes_take_no_memory():
    """Symbols whose names are the ends of one huge name are refused."""
    builder = ObjectBuilder()
    builder.symbol("x" * 100_000, 0, type=NOTYPE, bind=LOCAL)
    data = bytearray(builder.build())
    with pytest.raises(ObjectFileError, match="is longer than"):
        elf.read_object(bytes(data))


def test_sections_that_share_their_bytes_are_refused():
    """Sections that all are the whole file are refused by the sum of their sizes."""
    builder = ObjectBuilder()
    for number in range(100):
        builder.section(f"s{number}", b"" if number else bytes(10_000))
    data = bytearray(builder.build())
    table_at = int.from_bytes(data[40:48], "little")
    for number in range(1, 101):
        header = table_at + 64 * number
        data[header + 24 : header + 40] = (64).to_bytes(8, "little") + (10_000).to_bytes(
            8, "little"
        )
    with pytest.raises(ObjectFileError, match="overlap"):
        elf.read_object(bytes(data))


def test_a_huge_number_of_zeros_is_not_made():
    """A section of zeros that are not in the file takes no memory when it is read."""
    builder = ObjectBuilder()
    builder.section(".bss", size=1 << 29, type=8)
    tracemalloc.start()
    try:
        spec = elf.read_object(builder.build())
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()
    assert spec.maps["object.bss"].value_size == 1 << 29
