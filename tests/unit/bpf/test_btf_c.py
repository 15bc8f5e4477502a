"""Types as a header for C: clang finds each member where the types have it."""

from __future__ import annotations

import subprocess

import pytest
from compiled import CLANG
from made_types import Types
from since import needs_command

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import btf_c
from pybpfthrottle.bpf.obj.btf import Kind


@pytest.fixture
def types():
    """No types yet."""
    return Types()


def accepts(tmp_path, types, *statements):
    """Let clang compile the header with static assertions."""
    needs_command(CLANG)
    source = tmp_path / "source.c"
    header = btf_c.header(types.btf())
    asserted = "".join(f'_Static_assert({text}, "");\n' for text in statements)
    source.write_text(header + asserted)
    command = [CLANG, "-target", "bpf", "-g", "-Wall", "-Werror", "-c", str(source), "-o"]
    subprocess.run([*command, str(tmp_path / "built.o")], check=True)
    return header


def test_members_are_where_they_are(tmp_path, types):
    """Padding, packing and bit fields put each member where the types have it."""
    char, number, long = types.int("char", 1), types.int("int", 4), types.int("long", 8)
    types.struct("padded", 32, ("a", char, 0), ("b", number, 12), ("c", long, 16))
    types.struct("packed", 9, ("a", char, 0), ("b", long, 1))
    types.struct("short_end", 9, ("b", long, 0), ("a", char, 8))
    types.struct("bits", 12, ("a", number, 0, 3), ("b", number, 8, 5), ("c", number, 64, 32))
    types.struct("either", 16, ("a", char, 0), ("b", number, 0), union=True)
    accepts(
        tmp_path,
        types,
        "__builtin_offsetof(struct padded, b) == 12",
        "__builtin_offsetof(struct padded, c) == 16",
        "sizeof(struct padded) == 32",
        "__builtin_offsetof(struct packed, b) == 1",
        "sizeof(struct packed) == 9",
        "sizeof(struct short_end) == 9",
        "sizeof(struct bits) == 12",
        "sizeof(union either) == 16",
    )


def test_each_type_is_behind_those_that_it_needs(tmp_path, types):
    """Structs that point to each other, typedefs, arrays and functions are in an order for C."""
    number = types.int("int", 4)
    pointer = types.ptr(5)  # to the second
    types.struct("first", 16, ("second", pointer, 0), ("number", number, 8))
    second = types.struct("second", 32, ("first", 3, 0), ("array", types.array(3, 1), 16))
    named = types.typedef("second_t", second)
    nameless = types.struct("", 8, ("a", number, 0), ("b", number, 4))
    types.typedef("nameless_t", nameless)
    callback = types.ptr(types.proto(0, types.ptr(named), number))
    forward = types.ptr(types.fwd("elsewhere"))
    types.struct("holder", 32, ("call", callback, 0), ("", nameless, 8), ("fwd", forward, 16))
    types.typedef("constant", types.add(Kind.CONST, size=types.add(Kind.CONST, size=number)))
    text = accepts(tmp_path, types, "__builtin_offsetof(struct holder, b) == 12")
    assert "struct elsewhere;" in text


def test_names_are_unique(tmp_path, types):
    """Later types and enumerators of a name get a number, as C allows each name once."""
    number = types.int("int", 4)
    for size in (4, 8):
        types.struct("same", size, ("a", number, 0))
        types.enum("values", A=1)
        types.typedef("same_t", number)
    text = accepts(tmp_path, types, "sizeof(struct same___2) == 8", "A == 1 && A___2 == 1")
    assert "typedef int same_t___2;" in text


def test_enums_have_their_sizes(tmp_path, types):
    """An enum of one byte or of eight is as large in C, and negative values keep their sign."""
    types.struct("any", 0)
    types.add(Kind.ENUM, "small", size=1, vlen=1, tail=("SMALL", 1))
    types.enum64("wide", WIDE=1 << 40)
    types.enum("negative", NEGATIVE=-5)
    sizes = ("sizeof(enum small) == 1", "sizeof(enum wide) == 8", "NEGATIVE == -5")
    accepts(tmp_path, types, *sizes)


def test_functions_for_programs_are_declared(tmp_path, types):
    """Functions that a tag marks can be called, without a declaration of one's own."""
    number = types.int("int", 4)
    types.struct("any", 0)
    function = types.func("bpf_does", types.proto(number, number))
    types.add(Kind.DECL_TAG, "bpf_kfunc", size=function, tail=(0xFFFFFFFF,))
    types.func("hidden", types.proto(number))
    text = accepts(tmp_path, types)
    assert "extern int bpf_does(int) __attribute__" in text
    assert "hidden" not in text


def test_types_without_an_end_are_refused(types):
    """A struct that contains itself is an error."""
    types.struct("endless", 8, ("inside", 1, 0))
    with pytest.raises(ObjectFileError, match="nested too deeply"):
        btf_c.header(types.btf())


def test_a_bit_field_of_nothing_is_refused(types):
    """A type without a size has no bits."""
    types.struct("any", 4, ("none", types.struct("empty", 0), 0, 1))
    with pytest.raises(ObjectFileError, match="bit field none has no size"):
        btf_c.header(types.btf())


def test_a_large_gap_takes_one_line(tmp_path, types):
    """A gap of any size is padded without a line for each of its words."""
    char = types.int("char", 1)
    types.struct("large", 1 << 29, ("a", char, 0), ("b", char, 1 << 28))
    text = accepts(tmp_path, types, "__builtin_offsetof(struct large, b) == 1 << 28")
    assert len(text) < 2000


def test_a_large_gap_may_begin_within_a_byte(types):
    """Behind a bit field a gap takes few lines as well."""
    number = types.int("int", 4)
    far_bits = 1 << 23
    types.struct("large", 1 << 21, ("a", number, 0, 1), ("b", number, far_bits, 3))
    assert len(btf_c.header(types.btf())) < 2000


def test_types_that_would_take_all_memory_are_refused(types):
    """Each of forty types without a name contains the next one twice."""
    inner = types.int("int", 4)
    for level in range(40):
        size = 4 << min(level, 20)
        inner = types.struct("", size, ("", inner, 0), ("", inner, 0))
    types.struct("outer", 4, ("", inner, 0))
    with pytest.raises(ObjectFileError, match="nested too often"):
        btf_c.header(types.btf())
