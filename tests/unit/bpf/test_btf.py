from __future__ import annotations

import mmap
import struct

import pytest
from elf_builder import BtfBuilder
from made_types import SplitTypes, Types

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, Kind, Member, Variable

INT = (32,)  # the encoding that follows an integer: 32 bits


@pytest.fixture(params=["little", "big"])
def types(request):
    """An empty set of types of either byte order."""
    return BtfBuilder(request.param)


def test_types_are_numbered_from_one(types):
    """The first type has the id 1, and 0 is void."""
    types.add(Kind.INT, "int", size=4, tail=INT)
    btf = Btf(types.build())
    assert [found.kind for found in btf.types] == [Kind.VOID, Kind.INT]
    assert btf.type(1).name == "int"


def test_each_kind_is_as_long_as_it_is(types):
    """After each kind of type the next one is found at its place."""
    types.add(Kind.INT, "int", size=4, tail=INT)
    types.add(Kind.PTR, size=1)
    types.add(Kind.ARRAY, tail=(1, 1, 7))
    types.add(Kind.STRUCT, "s", size=8, vlen=2, tail=("a", 1, 0, "b", 1, 32))
    types.add(Kind.UNION, "u", size=4, vlen=1, tail=("a", 1, 0))
    types.add(Kind.ENUM, "e", size=4, vlen=2, tail=("X", 0, "Y", 1))
    types.add(Kind.FWD, "f")
    types.add(Kind.TYPEDEF, "t", size=1)
    types.add(Kind.VOLATILE, size=1)
    types.add(Kind.CONST, size=1)
    types.add(Kind.RESTRICT, size=2)
    types.add(Kind.FUNC_PROTO, size=1, vlen=1, tail=("p", 1))
    types.add(Kind.FUNC, "g", size=12)
    types.add(Kind.VAR, "v", size=1, tail=(1,))
    types.add(Kind.DATASEC, ".data", size=4, vlen=1, tail=(14, 0, 4))
    types.add(Kind.FLOAT, "double", size=8)
    types.add(Kind.DECL_TAG, "d", size=1, tail=(0,))
    types.add(Kind.TYPE_TAG, "tag", size=1)
    types.add(Kind.ENUM64, "big", size=8, vlen=1, tail=("Z", 1, 0))
    types.add(Kind.INT, "last", size=1, tail=(8,))
    btf = Btf(types.build())
    assert {found.kind for found in btf.types} == set(Kind)
    assert btf.types[-1].name == "last"


def test_members_have_names_types_and_offsets(types):
    """The members of a struct come in order, with their offsets in bits."""
    types.add(Kind.INT, "int", size=4, tail=INT)
    types.add(Kind.STRUCT, "pair", size=8, vlen=2, tail=("a", 1, 0, "b", 1, 32))
    btf = Btf(types.build())
    found = btf.find(Kind.STRUCT, "pair")
    assert list(btf.members(found)) == [Member("a", 1, 0), Member("b", 1, 32)]


def test_bit_fields_have_their_first_bit(types):
    """The offset of a bit field is its first bit, without its width."""
    types.add(Kind.INT, "int", size=4, tail=INT)
    tail = ("a", 1, 3 << 24 | 0, "b", 1, 5 << 24 | 3)
    types.add(Kind.STRUCT, "bits", size=4, vlen=2, flag=True, tail=tail)
    btf = Btf(types.build())
    assert [member.bit_offset for member in btf.members(btf.type(2))] == [0, 3]


def test_variables_have_places_and_sizes(types):
    """The variables of a data section come in order."""
    types.add(Kind.INT, "int", size=4, tail=INT)
    types.add(Kind.VAR, "v", size=1, tail=(1,))
    types.add(Kind.DATASEC, ".bss", size=8, vlen=2, tail=(2, 0, 4, 2, 4, 4))
    btf = Btf(types.build())
    assert list(btf.variables(btf.type(3))) == [Variable(2, 0, 4), Variable(2, 4, 4)]


def test_qualifiers_and_typedefs_are_taken_away(types):
    """What resolve gives is without typedefs, qualifiers and tags."""
    types.add(Kind.INT, "int", size=4, tail=INT)
    for kind in (Kind.CONST, Kind.VOLATILE, Kind.TYPEDEF, Kind.RESTRICT, Kind.TYPE_TAG):
        last = types.add(kind, size=types._count)
    assert Btf(types.build()).resolve(last).name == "int"


def test_sizes(types):
    """The size of a type counts arrays of arrays, and a pointer is eight bytes."""
    types.add(Kind.INT, "int", size=4, tail=INT)
    types.add(Kind.PTR, size=1)
    types.add(Kind.ARRAY, tail=(1, 1, 3))
    types.add(Kind.TYPEDEF, "row", size=3)
    types.add(Kind.ARRAY, tail=(4, 1, 5))
    types.add(Kind.ARRAY, tail=(2, 1, 2))
    types.add(Kind.STRUCT, "s", size=24)
    types.add(Kind.ENUM, "e", size=4)
    types.add(Kind.ARRAY, tail=(1, 1, 0))
    btf = Btf(types.build())
    assert [btf.size(number) for number in range(1, 10)] == [4, 8, 12, 12, 60, 16, 24, 4, 0]


@pytest.mark.parametrize("kind", [Kind.FWD, Kind.FUNC])
def test_what_has_no_size_is_refused(types, kind):
    """A type without a size is an ObjectFileError."""
    types.add(kind, "thing", size=0)
    with pytest.raises(ObjectFileError, match="no size"):
        Btf(types.build()).size(1)


def test_void_has_no_size(types):
    """The type void has no size."""
    with pytest.raises(ObjectFileError, match="no size"):
        Btf(types.build()).size(0)


def test_find_needs_kind_and_name(types):
    """Looking for a type tells kinds and names apart."""
    types.add(Kind.STRUCT, "same", size=1)
    types.add(Kind.UNION, "same", size=2)
    btf = Btf(types.build())
    assert btf.find(Kind.UNION, "same").size_or_type == 2
    assert btf.find(Kind.UNION, "other") is None


@pytest.mark.parametrize("kind", [Kind.TYPEDEF, Kind.CONST])
def test_a_type_that_is_itself_is_refused(types, kind):
    """A type that refers to itself is an ObjectFileError, and no endless loop."""
    types.add(kind, "loop", size=1)
    with pytest.raises(ObjectFileError, match="itself"):
        Btf(types.build()).resolve(1)


def test_types_in_a_circle_are_refused(types):
    """Types that refer to each other are an ObjectFileError, and no endless loop."""
    types.add(Kind.TYPEDEF, "a", size=2)
    types.add(Kind.TYPEDEF, "b", size=1)
    with pytest.raises(ObjectFileError, match="itself"):
        Btf(types.build()).size(1)


def test_an_array_of_itself_is_refused(types):
    """An array that is its own element is an ObjectFileError, and no endless loop."""
    types.add(Kind.ARRAY, tail=(1, 1, 2))
    with pytest.raises(ObjectFileError, match="itself"):
        Btf(types.build()).size(1)


def test_a_bad_magic_number_is_refused(types):
    """Data that does not begin with the magic number is no BTF."""
    with pytest.raises(ObjectFileError, match="magic"):
        Btf(types.build(magic=0xEB9E))


@pytest.mark.parametrize("length", [0, 1, 23])
def test_less_than_a_header_is_refused(types, length):
    """Data shorter than a header is no BTF."""
    with pytest.raises(ObjectFileError, match="too short"):
        Btf(types.build()[:length])


def test_each_truncation_is_refused_or_read(types):
    """Wherever the data ends, the answer is types or an ObjectFileError."""
    types.add(Kind.INT, "int", size=4, tail=INT)
    types.add(Kind.STRUCT, "pair", size=8, vlen=2, tail=("a", 1, 0, "b", 1, 32))
    data = types.build()
    types_end = 24 + 12 + 4 + 12 + 24
    for length in range(types_end):
        with pytest.raises(ObjectFileError):
            Btf(data[:length])
    # Only names are lost from here on.
    with pytest.raises(ObjectFileError, match="name"):
        list(Btf(data[:-1]).members(Btf(data).type(2)))


def test_a_type_that_is_cut_off_is_refused(types):
    """More members than there are bytes is an ObjectFileError."""
    types.add(Kind.STRUCT, "s", size=8, vlen=9, tail=("a", 1, 0))
    with pytest.raises(ObjectFileError, match="cut off"):
        Btf(types.build())


def test_an_unknown_kind_is_named(types):
    """A kind of type that is not known is refused with its number."""
    types.add(31, "new")
    with pytest.raises(ObjectFileError, match="kind of type 31"):
        Btf(types.build())


def test_a_type_that_is_not_there_is_named(types):
    """The id of a type that does not exist is refused with its number."""
    with pytest.raises(ObjectFileError, match="no type 5"):
        Btf(types.build()).type(5)


def test_flavours_are_found_with_their_type(types):
    """Types are found by name, and with their flavours if these are asked for."""
    for name in ("task", "task___old", "task_struct", "a_task", "task___"):
        types.add(Kind.STRUCT, name, size=4)
    btf = Btf(types.build())
    assert [found.id for found in btf.named("task")] == [1]
    assert [found.id for found in btf.named("task", flavours=True)] == [1, 2, 5]
    assert list(btf.named("tas")) == []


def test_types_without_a_name_have_the_empty_one(types):
    """Looking for the empty name finds what has none."""
    types.add(Kind.STRUCT, "s", size=4)
    types.add(Kind.UNION, size=4)
    assert [found.id for found in Btf(types.build()).named("")] == [2]


def test_enumerators_have_signs_and_widths(types):
    """The flag of an enum tells that its values have a sign."""
    types.add(Kind.ENUM, "u", size=4, vlen=1, tail=("A", 0xFFFFFFFF))
    types.add(Kind.ENUM, "s", size=4, vlen=1, flag=True, tail=("A", 0xFFFFFFFF))
    types.add(Kind.ENUM64, "w", size=8, vlen=1, tail=("A", 1, 1 << 31))
    types.add(Kind.ENUM64, "x", size=8, vlen=1, flag=True, tail=("A", 0, 1 << 31))
    btf = Btf(types.build())
    values = [next(btf.enumerators(btf.type(number))).value for number in range(1, 5)]
    assert values == [0xFFFFFFFF, -1, 1 << 63 | 1, -(1 << 63)]


def test_a_module_goes_on_where_the_kernel_ends():
    """The types of a module have ids and names behind the kernel's, and may refer to them."""
    kernel = Types()
    number = kernel.int()
    kernel.struct("shared", 4, ("a", number, 0))
    base = kernel.btf()
    module = SplitTypes(base)
    own = module.struct("own", 8, ("x", number, 0), ("y", 2, 4))
    module.struct("shared", 12)
    btf = module.btf()
    assert own == base.count == 3
    assert [found.name for found in btf.types] == ["", "int", "shared", "own", "shared"]
    assert list(btf.members(btf.type(own))) == [Member("x", 1, 0), Member("y", 2, 32)]
    assert btf.size(own) == 8
    assert list(btf.members(btf.type(2))) == [Member("a", 1, 0)]
    assert [found.id for found in btf.named("shared")] == [2, 4]


def test_a_long_name_is_cut_off(types):
    """A name costs no more memory than 1024 bytes, however long it is."""
    types.add(Kind.STRUCT, "x" * 5000, size=4)
    assert Btf(types.build()).type(1).name == "x" * 1024


def test_trusted_types_are_the_same_whatever_is_asked_for_first(types):
    """What is looked through only as far as needed has the same types, ids and names."""
    for number in range(2500):
        members = ("m", number, 0x01000000, f"m{number}", 1, 0x05000000)
        types.add(Kind.STRUCT, f"s{number}", size=8, vlen=2, flag=True, tail=members)
    data = types.build()
    wanted = Btf(data)
    for name in ("s2499", "s0", "s1200", "m", "m7", "nothing"):
        assert list(Btf(data, trusted=True).named(name)) == list(wanted.named(name))
    assert Btf(data, trusted=True).type(2400) == wanted.type(2400)
    assert Btf(data, trusted=True).words(2500) == wanted.words(2500)
    assert Btf(data, trusted=True).types == wanted.types
    with pytest.raises(ObjectFileError, match="no type 2501"):
        Btf(data, trusted=True).type(2501)


def test_mapped_types_are_the_same_as_those_that_were_read(types, tmp_path):
    """The kernel's types may be mapped: all that is asked for is as if they had been read."""
    types.add(Kind.STRUCT, "it", size=8, vlen=1, tail=("m", 1, 0))
    types.add(Kind.STRUCT, "it___2", size=16)
    file = tmp_path / "types"
    file.write_bytes(types.build())
    read = Btf(file.read_bytes())
    with open(file, "rb") as opened:
        mapped = Btf(mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ), trusted=True)
    assert (mapped, hash(mapped), bytes(mapped)) == (read, hash(read), bytes(read))
    found = list(mapped.named("it", flavours=True))
    assert found == list(read.named("it", flavours=True)) != list(read.named("it"))
    assert list(mapped.members(found[0])) == list(read.members(found[0]))
    assert (mapped.words(1), mapped.strings) == (read.words(1), read.strings)
    assert mapped.string_bytes == read.string_bytes


def test_a_name_at_the_very_start_of_the_strings_is_found():
    """Other compilers' types need not begin with the empty name, nor do those of a module."""
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, 12, 12, 3)
    types = Btf(header + struct.pack("<III", 0, Kind.FLOAT << 24, 4) + b"it\0")
    assert [found.id for found in types.named("it")] == [1]


def test_a_number_that_is_the_offset_of_a_name_is_no_type(types):
    """Only what a type begins with is its name, not a member or a number of the same value."""
    named = types.add(Kind.STRUCT, "it", size=4)
    offset = Btf(types.build()).words(named)[0]
    for info in (0, 0x04000001, 0x0D000000):
        types.add(Kind.STRUCT, "other", size=4, vlen=1, tail=(offset, info, 0))
        types.add(Kind.STRUCT, "more", size=4, vlen=1, tail=(0, offset, info))
    assert [found.id for found in Btf(types.build()).named("it")] == [named]
