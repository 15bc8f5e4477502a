from __future__ import annotations

import pytest
from elf_builder import BtfBuilder
from hypothesis import given
from hypothesis import strategies as st

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.obj.btf_values import BtfCodec

SIGNED, BOOL = 1 << 24, 4 << 24


class Types(BtfBuilder):
    """Types with names for those that most tests need."""

    def __init__(self, byteorder="little"):
        super().__init__(byteorder)
        self.byteorder = byteorder
        self.u8 = self.add(Kind.INT, "unsigned char", size=1, tail=(8,))
        self.char = self.add(Kind.INT, "char", size=1, tail=(8 | SIGNED,))
        self.u32 = self.add(Kind.INT, "unsigned int", size=4, tail=(32,))
        self.s32 = self.add(Kind.INT, "int", size=4, tail=(32 | SIGNED,))
        self.bool = self.add(Kind.INT, "_Bool", size=1, tail=(8 | BOOL,))

    def array(self, element, count):
        """An array."""
        return self.add(Kind.ARRAY, tail=(element, self.u32, count))

    def struct(self, size, *members, flag=False, kind=Kind.STRUCT, name="s"):
        """A struct of (name, type, offset in bits)."""
        tail = tuple(item for member in members for item in member)
        return self.add(kind, name, size=size, vlen=len(members), flag=flag, tail=tail)

    def codec(self, type_id):
        """The codec of a type."""
        return BtfCodec(Btf(self.build()), type_id)


@pytest.fixture(params=["little", "big"])
def types(request):
    """Types of either byte order."""
    return Types(request.param)


@pytest.mark.parametrize(
    ("size", "encoding", "value"),
    [(1, 0, 255), (1, SIGNED, -128), (2, 0, 65535), (8, SIGNED, -1), (16, 0, 1 << 127)],
)
def test_integers_of_all_sizes_and_signs(types, size, encoding, value):
    """An integer is as many bytes as it says, in the byte order of its object."""
    codec = types.codec(types.add(Kind.INT, "i", size=size, tail=(size * 8 | encoding,)))
    data = codec.encode(value)
    assert data == value.to_bytes(size, types.byteorder, signed=value < 0)
    assert codec.decode(data) == value


@pytest.mark.parametrize(("size", "value"), [(4, 1.5), (8, -2.25), (2, 0.5)])
def test_floats(types, size, value):
    """A float comes back the same."""
    codec = types.codec(types.add(Kind.FLOAT, "f", size=size))
    assert codec.decode(codec.encode(value)) == value


def test_a_float_that_python_does_not_know_is_refused(types):
    """A long double is an ObjectFileError."""
    with pytest.raises(ObjectFileError, match="16 bytes"):
        types.codec(types.add(Kind.FLOAT, "long double", size=16)).decode(bytes(16))


def test_a_bool_is_a_bool(types):
    """0 and 1 are False and True."""
    codec = types.codec(types.bool)
    assert codec.decode(b"\1") is True
    assert codec.encode(False) == b"\0"


def test_an_enum_is_a_name(types):
    """A value that has a name is that; another one is a number. Both can be written."""
    negative = (1 << 32) - 1
    enum = types.add(Kind.ENUM, "e", size=4, vlen=2, tail=("ONE", 1, "MINUS", negative))
    codec = types.codec(enum)
    assert [codec.decode(codec.encode(value)) for value in ("ONE", "MINUS", 7)] == [
        "ONE",
        "MINUS",
        7,
    ]
    assert codec.encode(1) == codec.encode("ONE")
    with pytest.raises(ValueError, match="'TWO' is not one of ONE, MINUS"):
        codec.encode("TWO")


def test_an_enum_of_64_bits_is_a_name(types):
    """Both halves of a value count."""
    codec = types.codec(types.add(Kind.ENUM64, "e", size=8, vlen=1, tail=("BIG", 1, 2)))
    assert codec.encode("BIG") == (2 << 32 | 1).to_bytes(8, types.byteorder)
    assert codec.decode(codec.encode("BIG")) == "BIG"


@pytest.mark.parametrize("text", ["", "eth0", "grün"])
def test_text_is_text(types, text):
    """Characters up to the zeros at the end are a str."""
    codec = types.codec(types.array(types.char, 8))
    assert codec.decode(codec.encode(text)) == text


@pytest.mark.parametrize("data", [b"\1\2\0\0", b"a\0b\0", b"\xff\0\0\0"])
def test_what_is_no_text_is_numbers(types, data):
    """Characters that cannot be printed, or go on behind a zero, are a list, and come back."""
    codec = types.codec(types.array(types.char, 4))
    found = codec.decode(data)
    assert found == [byte - 256 if byte > 127 else byte for byte in data]
    assert codec.encode(found) == data


def test_too_much_for_an_array_is_refused(types):
    """More elements than there is room for are a ValueError."""
    with pytest.raises(ValueError, match="5 elements do not fit into 4"):
        types.codec(types.array(types.char, 4)).encode("abcde")


def test_arrays_of_arrays(types):
    """An array of arrays is a list of lists, and what is left out is zero."""
    codec = types.codec(types.array(types.array(types.u32, 2), 2))
    assert codec.decode(codec.encode([[1, 2], [3]])) == [[1, 2], [3, 0]]


def test_an_array_of_nothing_is_empty(types):
    """However many elements of no size there are, none is given."""
    empty = types.struct(0)
    assert types.codec(types.array(empty, (1 << 32) - 1)).decode(b"") == []


def test_a_struct_is_a_dict(types):
    """Members are by name; those of an anonymous union are as the struct's own."""
    union = types.struct(4, ("word", types.u32, 0), ("byte", types.u8, 0), kind=Kind.UNION, name="")
    codec = types.codec(types.struct(8, ("first", types.s32, 0), ("", union, 32)))
    data = codec.encode({"first": -1, "word": 0x01010101})
    assert codec.decode(data) == {"first": -1, "word": 0x01010101, "byte": 1}
    assert codec.encode({}) == bytes(8)


def test_qualifiers_do_not_matter(types):
    """A const typedef of an integer is an integer."""
    const = types.add(Kind.CONST, size=types.add(Kind.TYPEDEF, "u", size=types.u32))
    assert types.codec(const).decode(types.codec(types.u32).encode(5)) == 5


def test_a_pointer_is_a_number(types):
    """A pointer is eight bytes."""
    codec = types.codec(types.add(Kind.PTR, size=0))
    assert codec.decode(codec.encode(1 << 63)) == 1 << 63


def test_a_data_section_is_its_variables(types):
    """The value of a data section's map has the variables by name."""
    first = types.add(Kind.VAR, "first", size=types.u32, tail=(1,))
    second = types.add(Kind.VAR, "second", size=types.bool, tail=(1,))
    section = types.add(Kind.DATASEC, ".bss", size=8, vlen=2, tail=(first, 0, 4, second, 4, 1))
    codec = types.codec(section)
    assert codec.decode(codec.encode({"second": True})) == {"first": 0, "second": True}
    with pytest.raises(ValueError, match=r"\.bss has no variable 'third'"):
        codec.encode({"third": 1})


def test_bit_fields_lie_where_c_has_them():
    """On a little-endian machine the first bit field is lowest, on a big-endian one highest."""
    for byteorder, data in (("little", b"\x2d\0\0\0"), ("big", b"\xa5\0\0\0")):
        types = Types(byteorder)
        members = (("a", types.u32, 3 << 24), ("b", types.u32, 5 << 24 | 3))
        codec = types.codec(types.struct(4, *members, flag=True))
        assert codec.encode({"a": 5, "b": 5}) == data
        assert codec.decode(data) == {"a": 5, "b": 5}


@given(
    st.sampled_from(["little", "big"]),
    st.lists(st.tuples(st.integers(1, 32), st.integers(0), st.booleans()), min_size=1, max_size=9),
)
def test_bit_fields_do_not_touch_each_other(byteorder, fields):
    """Bit fields of any width and sign come back as they were written."""
    types = Types(byteorder)
    members, values, bit = [], {}, 0
    for number, (bits, value, signed) in enumerate(fields):
        name = f"f{number}"
        members.append((name, types.s32 if signed else types.u32, bits << 24 | bit))
        value %= 1 << bits
        values[name] = value - (1 << bits) if signed and value >> bits - 1 else value
        bit += bits
    codec = types.codec(types.struct((bit + 7) // 8, *members, flag=True))
    assert codec.decode(codec.encode(values)) == values


def test_nameless_bit_fields_are_padding(types):
    """A bit field without a name is not told."""
    members = (("a", types.u32, 3 << 24), ("", types.u32, 5 << 24 | 3))
    assert types.codec(types.struct(4, *members, flag=True)).decode(bytes(4)) == {"a": 0}


def test_a_value_that_does_not_fit_names_the_member(types):
    """The path to a number that is too large is told."""
    inner = types.struct(1, ("low", types.u8, 0), name="inner")
    codec = types.codec(types.struct(1, ("inner", inner, 0)))
    with pytest.raises(ValueError, match="inner: low: 256 does not fit into 8 bits"):
        codec.encode({"inner": {"low": 256}})


def test_a_member_that_is_not_there_is_named(types):
    """A name that the struct does not have is told, with the struct's."""
    with pytest.raises(ValueError, match="struct s has no member 'b'"):
        types.codec(types.struct(1, ("a", types.u8, 0))).encode({"a": 1, "b": 2})


def test_a_value_of_another_kind_names_the_member(types):
    """A list where a number belongs is a ValueError with the member's name."""
    with pytest.raises(ValueError, match="a: "):
        types.codec(types.struct(1, ("a", types.u8, 0))).encode({"a": [1]})


def test_a_struct_in_itself_is_refused(types):
    """A struct that contains itself ends in an ObjectFileError."""
    own = types._count + 1
    assert types.struct(4, ("own", own, 0)) == own
    with pytest.raises(ObjectFileError, match="contains itself"):
        types.codec(own).decode(bytes(4))


def test_less_data_than_the_type_has_is_refused(types):
    """Bytes that are too few are a ValueError."""
    with pytest.raises(ValueError, match="3 bytes"):
        types.codec(types.u32).decode(bytes(3))
