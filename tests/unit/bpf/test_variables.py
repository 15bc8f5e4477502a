"""Variables of data sections, on the spec."""

from __future__ import annotations

import pytest
from elf_builder import LOCAL, OBJECT, BtfBuilder

from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.btf import Kind

SIGNED, BOOL = 1 << 24, 4 << 24


def read(builder, data, *variables, types=None):
    """The variables of an object: (name, offset, size) in a section of data."""
    index = builder.section(".data", data)
    for name, offset, size in variables:
        builder.symbol(name, index, value=offset, size=size, type=OBJECT)
    if types is not None:
        builder.section(".BTF", types.build(), flags=0)
    return elf.read_object(builder.build()).variables


def typed(byteorder, type_of, *, name="x"):
    """Types of one variable, by what adds its type."""
    types = BtfBuilder(byteorder)
    var = types.add(Kind.VAR, name, size=type_of(types), tail=(1,))
    types.add(Kind.DATASEC, ".data", size=8, vlen=1, tail=(var, 0, 8))
    return types


def int_(types, encoding=0, size=8):
    """An integer."""
    return types.add(Kind.INT, "int", size=size, tail=(encoding | 8 * size,))


TYPES = {
    "unsigned": (int_, (1 << 64) - 2),
    "signed": (lambda t: int_(t, SIGNED), -2),
    "const": (lambda t: t.add(Kind.CONST, size=int_(t, SIGNED)), -2),
    "pointer": (lambda t: t.add(Kind.PTR, size=int_(t)), (1 << 64) - 2),
    "enum": (lambda t: t.add(Kind.ENUM64, size=8, vlen=1, tail=("A", 1, 0)), (1 << 64) - 2),
    "negative enum": (
        lambda t: t.add(Kind.ENUM64, size=8, vlen=1, flag=True, tail=("A", 2**32 - 1, 2**32 - 1)),
        -2,
    ),
}


@pytest.mark.parametrize(("type_of", "value"), TYPES.values(), ids=TYPES)
def test_a_number_is_what_its_type_says(builder, type_of, value):
    """A number of eight bytes has a sign where its type has one."""
    data = (-2).to_bytes(8, builder.byteorder, signed=True)
    found = read(builder, data, ("x", 0, 8), types=typed(builder.byteorder, type_of))["x"]
    assert found.get() == value
    found.set(5)
    assert found.map.contents == (5).to_bytes(8, builder.byteorder)
    assert found.get() == 5


def test_a_struct_is_bytes(builder):
    """What is no number is read and written as bytes of its size."""
    types = typed(builder.byteorder, lambda t: t.add(Kind.STRUCT, "s", size=8))
    found = read(builder, b"abcdefgh", ("x", 0, 8), types=types)["x"]
    assert found.get() == b"abcdefgh"
    found.set(b"ABCDEFGH")
    assert found.get() == b"ABCDEFGH"


def test_without_types_numbers_can_be_set(builder):
    """Without BTF a variable is bytes, and an int of either sign may be set."""
    found = read(builder, bytes(8), ("x", 2, 2))["x"]
    found.set(-1)
    assert found.get() == b"\xff\xff"
    assert found.map.contents == b"\0\0\xff\xff\0\0\0\0"


def test_only_the_variables_bytes_are_changed(builder):
    """Setting one variable leaves its neighbours alone."""
    variables = read(builder, b"abcdef", ("x", 0, 2), ("y", 2, 2), ("z", 4, 2))
    variables["y"].set(b"--")
    assert [variables[name].get() for name in "xyz"] == [b"ab", b"--", b"ef"]


def test_a_global_variable_hides_a_static_one(builder):
    """Of two variables with one name it is the one that is not static."""
    index = builder.section(".bss", size=16, type=8)
    builder.symbol("x", index, value=0, size=4, type=OBJECT)
    builder.symbol("x", index, value=8, size=4, type=OBJECT, bind=LOCAL)
    assert elf.read_object(builder.build()).variables["x"].offset == 0


def test_a_symbol_past_its_section_is_no_variable(builder):
    """A symbol that reaches past its section can never be read."""
    assert read(builder, bytes(8), ("x", 4, 8), ("y", 1 << 40, 4), ("z", 0, 0)) == {}
