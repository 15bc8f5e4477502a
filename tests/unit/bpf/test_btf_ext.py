from __future__ import annotations

import struct
from array import array
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_types import Types

from pybpfthrottle.bpf.abi import CoreRelocationKind
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.btf_ext import (
    BtfExt,
    CoreRelocation,
    FunctionInfo,
    LineInfo,
    Lines,
    Records,
)


def table(*words):
    """A table of 32-bit words."""
    return struct.pack(f"<{len(words)}I", *words)


def section(functions=b"", lines=b"", relocations=b"", *, header=32, magic=0xEB9F):
    """A .BTF.ext section of three tables."""
    ends = [len(functions), len(lines), len(relocations)]
    places = [0, ends[0], ends[0], ends[1], ends[0] + ends[1], ends[2]]
    start = struct.pack("<HBBI", magic, 1, 0, header) + table(*places)
    return start[:header] + functions + lines + relocations


def rows(found):
    """The records by section, as plain lists."""
    return {name: records.rows for name, records in found.items()}


@pytest.fixture
def strings():
    """The offsets of a few strings, and types that have them."""
    types = Types()
    types.struct("xdp", 4)  # at 1
    types.struct("0:1", 4)  # at 5
    return types.btf()


def test_records_are_told_apart_by_section(strings):
    """Each table gives the records of each section by its name."""
    found = BtfExt(
        section(
            table(8, 1, 2, 0, 7, 16, 8),
            table(16, 1, 1, 24, 1, 5, 3 << 10 | 9),
            table(16, 1, 1, 8, 2, 5, 11),
        ),
        strings,
    )
    assert rows(found.functions) == {"xdp": [FunctionInfo(0, 7), FunctionInfo(16, 8)]}
    assert rows(found.lines) == {"xdp": [LineInfo(24, 1, 5, 3 << 10 | 9)]}
    assert found.lines["xdp"].rows[0].line == 3
    wanted = CoreRelocation(8, 2, "0:1", CoreRelocationKind.ENUMVAL_VALUE)
    assert rows(found.relocations) == {"xdp": [wanted]}


def test_records_may_have_grown(strings):
    """What a newer compiler adds to a record is passed over."""
    found = BtfExt(section(table(12, 1, 2, 0, 7, 99, 8, 8, 99)), strings)
    assert rows(found.functions) == {"xdp": [FunctionInfo(0, 7), FunctionInfo(8, 8)]}


def test_a_section_may_be_named_twice(strings):
    """The records of a section that comes twice are joined."""
    found = BtfExt(section(table(8, 1, 1, 0, 7, 1, 1, 8, 9)), strings)
    assert [record.type for record in found.functions["xdp"].rows] == [7, 9]


def test_old_compilers_know_no_relocations(strings):
    """A header of 24 bytes has no table of relocations."""
    found = BtfExt(section(table(8, 1, 1, 0, 7), header=24), strings)
    assert found.functions
    assert found.relocations == {}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "too short"),
        (section(magic=1), "magic"),
        (section(table(8, 1, 2, 0, 7)), "cut off"),
        (section(table(8, 1)), "cut off"),
        (section(table(4, 1, 1, 0)), "cannot have 4 bytes"),
        (section(table(9, 1, 1, 0)), "cannot have 9 bytes"),
        (section(table(1 << 20, 1, 1, 0)), "a record cannot have"),
        (section(table(8, 999, 0)), "name is outside"),
        (section(b"", b"", table(16, 1, 1, 8, 2, 5, 13)), "CO-RE relocation 13"),
        (section(table(8, 1, 1, 0, 7))[:-1], "goes past the end"),
    ],
)
def test_what_is_wrong_is_named(strings, data, match):
    """Records that cannot be are an ObjectFileError that names the section."""
    with pytest.raises(ObjectFileError, match=match) as caught:
        BtfExt(data, strings)
    assert caught.value.section in (".BTF.ext", ".BTF")


SOUND = section(table(8, 1, 1, 0, 7), table(16, 1, 1, 24, 1, 5, 9), table(16, 1, 1, 8, 2, 5, 1))
TYPES = Types()
TYPES.struct("xdp", 4, ("a", 1, 0))
TYPES.enum("0:1", A=1)
TYPES.proto(1, 2, 1)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=6))
def test_any_bytes_are_read_or_refused(changes):
    """Whatever bytes there are, the answer is records or an ObjectFileError."""
    data = bytearray(SOUND)
    for at, byte in changes:
        data[at] = byte
    with suppress(ObjectFileError):
        BtfExt(bytes(data), TYPES.btf())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=6))
def test_any_types_are_read_or_refused(changes):
    """Whatever bytes there are, the answer is types or an ObjectFileError."""
    data = bytearray(TYPES.build())
    for at, byte in changes:
        data[at % len(data)] = byte
    with suppress(ObjectFileError):
        btf = Btf(bytes(data))
        for found in btf.types:
            list(btf.named(found.name, flavours=True))
            btf.resolve(found.id)
            btf.size(found.id)


def test_a_line_holds_until_the_next():
    """The line of an instruction is that of the last record before it."""
    lines = [LineInfo(8, 0, 0, 1), LineInfo(32, 0, 0, 2)]
    records = Records(lines[::-1])
    assert [records.last_at(offset) for offset in (0, 8, 24, 32, 80)] == [
        *(None, lines[0], lines[0], lines[1], lines[1])
    ]
    assert records.between(8, 32) == lines[:1]


def lines_of(*rows):
    """Lines of rows of four numbers."""
    return Lines([array("I", column) for column in zip(*rows)])


def test_lines_move_with_their_function():
    """The records of a function count from where it is loaded, in instructions."""
    lines = lines_of((0, 1, 2, 3), (16, 4, 5, 6), (24, 7, 8, 9), (40, 1, 1, 1))
    wanted = [LineInfo(100, 4, 5, 6), LineInfo(101, 7, 8, 9)]
    table = lines.encoded(16, 40, 800)
    assert [LineInfo(*row) for row in struct.iter_unpack("=4I", table)] == wanted


def test_lines_may_be_in_any_order():
    """Records are sorted by their offsets, and those of one offset stay in their order."""
    lines = lines_of((16, 2, 0, 0), (0, 1, 0, 0), (16, 3, 0, 0))
    assert [(row.offset, row.file) for row in lines.rows] == [(0, 1), (16, 2), (16, 3)]


def test_the_kernel_is_told_one_line_for_each_place():
    """Of several lines at one place the first is told; the kernel would refuse a second."""
    lines = lines_of((0, 1, 0, 0), (0, 2, 0, 0), (8, 3, 0, 0), (8, 4, 0, 0))
    rows = struct.iter_unpack("=4I", lines.encoded(0, 16, 0))
    assert [(at, file) for at, file, _, _ in rows] == [(0, 1), (1, 3)]


def test_a_function_whose_beginning_has_no_line_has_none():
    """The kernel takes lines only if the first is at the beginning of the function."""
    lines = lines_of((8, 1, 0, 0), (16, 1, 0, 0))
    assert lines.encoded(0, 24, 0) == b""
    assert lines.encoded(24, 48, 0) == b""
