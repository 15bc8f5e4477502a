"""Records by their types, without a kernel."""

from __future__ import annotations

import struct

import pytest
from compiled import compiled

from pybpfthrottle.bpf.codecs import codec_for, size_of
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.btf import Kind
from pybpfthrottle.bpf.records import RecordCodec


@pytest.fixture(scope="module")
def types():
    """The types of an object."""
    return elf.read_object(compiled("events")).btf


def codec(types, name):
    """The codec of a struct."""
    return RecordCodec(types, types.find(Kind.STRUCT, name).id)


def test_a_struct_of_numbers_is_a_named_tuple(types):
    """Each member is a field of its name, and what is behind the struct does not matter."""
    small = codec(types, "small")
    value = small.decode(struct.pack("QQII", 1, 2, 3, 4) + b"more")
    assert (value.sequence, value.time, value.pid, value.length) == value == (1, 2, 3, 4)
    assert type(value) is small.type
    assert small.size == 24


@pytest.mark.parametrize("name", ["small", "event", "flags"])
def test_what_is_encoded_is_decoded(types, name):
    """A record is the same after both ways, as a tuple or as a dict of its members."""
    record = codec(types, name)
    data = bytes(range(1, record.size + 1))
    value = record.decode(data)
    again = record.encode(value if name != "event" else value._asdict() | _as_dicts(value))
    assert record.decode(again) == value


def _as_dicts(value):
    return {"place": value.place._asdict()}


def test_members_that_take_no_whole_bytes_are_fields_too(types):
    """A struct with bit fields and a union without a name has their members as its own."""
    value = codec(types, "flags").decode(struct.pack("II", 0x25, 7))
    assert (value.low, value.high, value.number) == (5, 2, 7)
    assert value.bytes == [7, 0, 0, 0]


def test_a_value_without_a_name_is_a_number(types):
    """An enum's value is its name if it has one."""
    event = codec(types, "event")
    data = bytearray(event.size)
    for number, expected in ((2, "CLOSED"), (9, 9)):
        struct.pack_into("=I", data, 16, number)
        assert event.decode(bytes(data)).kind == expected


def test_only_structs_are_records(types):
    """A type that is no struct is refused."""
    number = types.find(Kind.ENUM, "kind").id
    with pytest.raises(TypeError, match="'kind' is no struct"):
        RecordCodec(types, number)


def test_a_codec_may_have_no_size(types):
    """Bytes have any size; a format, and a record, have one."""
    assert size_of(codec_for("QI", 0)) == 12
    assert size_of(codec(types, "small")) == 24
    with pytest.raises(TypeError, match="no size"):
        size_of(codec_for(bytes, 0))
