from __future__ import annotations

import ctypes
import ipaddress
import struct
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybpfthrottle.bpf import codecs
from pybpfthrottle.bpf.codecs import (
    RAW,
    DataclassCodec,
    FormatCodec,
    IntCodec,
    PrefixCodec,
    StructureCodec,
    TupleCodec,
    codec_for,
)


class Pair(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint8), ("second", ctypes.c_uint64))


@dataclass
class Inner:
    few: Annotated[int, ctypes.c_uint8]
    many: Annotated[int, ctypes.c_uint64]


@dataclass
class Outer:
    first: Annotated[int, ctypes.c_uint8]
    inner: Inner
    words: Annotated[list[int], ctypes.c_uint16 * 3]


@dataclass
class Record:
    first: Annotated[int, ctypes.c_uint8]
    second: Annotated[int, ctypes.c_uint64]


@dataclass
class Wrong:
    first: int


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        (bytes, type(RAW)),
        (int, IntCodec),
        ("I", FormatCodec),
        ("IQ", TupleCodec),
        (Pair, StructureCodec),
        (Record, DataclassCodec),
        (PrefixCodec(), PrefixCodec),
    ],
)
def test_each_description_has_its_codec(wanted, kind):
    """A type or a format is made into a codec; a codec is one."""
    assert type(codec_for(wanted, 8)) is kind


def test_another_type_is_refused():
    """A class that is no description is a TypeError with its name."""
    with pytest.raises(TypeError, match="cannot convert to dict"):
        codec_for(dict, 8)


def test_a_dataclass_needs_ctypes():
    """A field without a ctypes type is a TypeError that names it and says what to write."""
    with pytest.raises(TypeError, match=r"Wrong\.first needs a ctypes type: Annotated"):
        DataclassCodec(Wrong)


def test_a_dataclass_is_the_bytes_of_its_structure():
    """A dataclass has the padding that C has."""
    assert DataclassCodec(Record).encode(Record(1, 2)) == bytes(Pair(1, 2))


def test_a_format_is_padded_as_c_does():
    """A format without a byte order has C's alignment; with one it is packed."""
    assert len(codec_for("BQ", 16).encode((1, 2))) == 16
    assert len(codec_for("<BQ", 9).encode((1, 2))) == 9


@given(st.integers(1, 16).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, 256**n - 1))))
def test_an_int_is_of_any_size(case):
    """A number of any size comes back the same."""
    size, number = case
    codec = codec_for(int, size)
    assert len(codec.encode(number)) == size
    assert codec.decode(codec.encode(number)) == number


@pytest.mark.parametrize("number", [-1, 256])
def test_an_int_that_does_not_fit_is_refused(number):
    """A number below 0 or too large for its size is an OverflowError."""
    with pytest.raises(OverflowError):
        codec_for(int, 1).encode(number)


@given(st.ip_addresses(), st.integers(0, 32))
def test_a_network_is_a_prefix(address, length):
    """A network comes back the same, of either version of IP."""
    network = ipaddress.ip_network(f"{address}/{length}", strict=False)
    data = PrefixCodec().encode(network)
    assert len(data) == (8 if address.version == 4 else 20)
    assert PrefixCodec().decode(data) == network


@pytest.mark.parametrize(
    ("native", "aligned"),
    [("BQ", "=B7xQ"), ("@H3s2I", "=H3s3x2I"), ("<BQ", "<BQ"), ("Bq?", "=B7xq?")],
)
def test_numbers_are_aligned_to_their_size(native, aligned):
    """On machines of 32 bits too, whose C aligns eight bytes to four."""
    assert codecs._aligned(native) == aligned
    assert TupleCodec(native).size == struct.calcsize(native)


def test_what_is_no_format_is_refused():
    """With the error of the struct module."""
    with pytest.raises(struct.error):
        TupleCodec("I-Q")


def test_the_padding_of_a_dataclass_is_written_out():
    """So it is the same where ctypes aligns eight bytes to four."""
    codec = DataclassCodec(Outer)
    sizes = [ctypes.sizeof(layout) for _, layout in codec._structure._fields_]
    assert sizes == [1, 7, 16, 6, 2]
    assert codec.size == sum(sizes)
    value = Outer(1, Inner(2, 3), [4, 5, 6])
    assert codec.decode(codec.encode(value)) == value
