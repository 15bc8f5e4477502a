"""Definitions of maps by their types, and what makes no sense in them."""

from __future__ import annotations

import pytest
from elf_builder import FUNC, LOCAL, OBJECT, SECTION, BtfBuilder, ObjectBuilder

from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.btf import Kind

ABS64 = 2


class Definitions:
    """An object with maps by their types; each takes 64 bytes of section .maps."""

    def __init__(self):
        self.elf = ObjectBuilder()
        self.btf = BtfBuilder()
        self._int = self.btf.add(Kind.INT, "int", size=4, tail=(32,))
        self.prototype = self.btf.add(Kind.FUNC_PROTO)
        self._vars = []
        self.names = []
        self.data = bytearray()
        self.index = None

    def number(self, value):
        """A number as __uint has it."""
        return self.pointer(self.btf.add(Kind.ARRAY, tail=(self._int, self._int, value)))

    def pointer(self, target):
        """A pointer to a type."""
        return self.btf.add(Kind.PTR, size=target)

    def array(self, element):
        """An array of no length of a type."""
        return self.btf.add(Kind.ARRAY, tail=(element, self._int, 0))

    def struct(self, *members):
        """A struct of members, each of eight bytes."""
        tail = [part for at, (n, t) in enumerate(members) for part in (n, t, 64 * at)]
        return self.btf.add(Kind.STRUCT, size=8 * len(members), vlen=len(members), tail=tail)

    def add(self, name, *members, type=None):
        """A map of a struct of members, or of another type."""
        define = self.struct(*members) if type is None else type
        self._vars.append(self.btf.add(Kind.VAR, name, size=define, tail=(1,)))
        self.names.append(name)
        self.data += bytes(64)

    def finish(self):
        """Put the sections in; the answers are the symbols of the maps."""
        tail = [part for var in self._vars for part in (var, 0, 64)]
        self.btf.add(Kind.DATASEC, ".maps", size=len(self.data), vlen=len(self._vars), tail=tail)
        self.index = self.elf.section(".maps", bytes(self.data))
        self.elf.section(".BTF", self.btf.build(), flags=0)
        return [
            self.elf.symbol(name, self.index, value=64 * at, size=64, type=OBJECT)
            for at, name in enumerate(self.names)
        ]

    def maps(self):
        """The maps of the object."""
        return elf.read_object(self.elf.build()).maps

    def refused(self):
        """The error for the object."""
        with pytest.raises(ObjectFileError) as caught:
            self.maps()
        return caught.value


@pytest.fixture
def define():
    """Definitions to be made."""
    return Definitions()


def hash_(define, *more):
    """The members of a hash."""
    return (("type", define.number(1)), ("max_entries", define.number(4)), *more)


def programs(define):
    """The members of an array of programs, whose slots begin at byte 8."""
    values = define.array(define.pointer(define.prototype))
    return (("type", define.number(MapType.PROG_ARRAY)), ("values", values))


def test_the_second_map_has_its_own_place(define):
    """The error for a map has the map's own offset."""
    define.add("first", *hash_(define))
    define.add("second", ("max_entries", define.number(1)))
    define.finish()
    error = define.refused()
    assert (error.section, error.offset) == (".maps", 64)
    assert "'second'" in str(error)


def test_a_value_in_a_definition_is_refused(define):
    """A map's definition that is initialized with a number is refused at that byte."""
    define.add("first", *hash_(define))
    define.data[24] = 7
    define.finish()
    error = define.refused()
    assert (error.section, error.offset) == (".maps", 24)
    assert "initialized" in str(error)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        (lambda d: (("type", d.number(1)), ("type", d.number(1))), "'type' is given twice"),
        (lambda d: (("type", d.number(0)),), "it has no type"),
        (lambda d: hash_(d, ("value", d.pointer(d.prototype))), "size of its value"),
        (lambda d: hash_(d, ("values", d.number(3))), "not an array of pointers"),
        (lambda d: hash_(d, ("values", d.array(1))), "not an array of pointers"),
        (lambda d: hash_(d, ("values", d.array(d.pointer(1)))), "neither maps nor programs"),
        (
            lambda d: hash_(d, ("values", d.array(d.pointer(d.struct(*hash_(d)))))),
            "is not a map of maps",
        ),
    ],
)
def test_a_definition_without_sense_is_refused(define, members, reason):
    """What is no definition of a map is refused with the map's name, its place and the reason."""
    define.add("events", *members(define))
    define.finish()
    error = define.refused()
    assert (error.section, error.offset) == (".maps", 0)
    assert "'events'" in str(error)
    assert reason in str(error)


def test_an_inner_map_cannot_be_pinned(define):
    """The template of a map of maps cannot ask to be pinned."""
    inner = define.struct(*hash_(define, ("pinning", define.number(1))))
    values = ("values", define.array(define.pointer(inner)))
    define.add("outer", ("type", define.number(MapType.HASH_OF_MAPS)), values)
    define.finish()
    assert "'outer.inner': an inner map cannot be pinned" in str(define.refused())


def test_an_inner_map_has_no_inner_map(define):
    """Maps are nested once: a template with values of its own is refused."""
    inner = define.struct(*hash_(define, ("values", define.array(define.pointer(1)))))
    values = ("values", define.array(define.pointer(inner)))
    define.add("outer", ("type", define.number(MapType.HASH_OF_MAPS)), values)
    define.finish()
    assert "'outer.inner'" in str(define.refused())


def test_a_map_that_is_no_struct_is_refused(define):
    """A variable of another type in section .maps is refused by name."""
    define.add("number", type=1)
    define.finish()
    assert "'number': not a struct" in str(define.refused())


def test_a_map_without_a_symbol_is_refused(define):
    """A map that the types describe and that has no place is refused by name."""
    define.add("ghost", *hash_(define))
    define.names.clear()
    define.finish()
    assert "'ghost' is not in the section" in str(define.refused())


def code(define):
    """A program of the object, with its section's number and symbol."""
    index = define.elf.code("tc", define.elf.returns())
    return index, define.elf.symbol("main", index, size=16, type=FUNC)


@pytest.mark.parametrize("type", [1, ABS64, 12])
def test_programs_are_put_in_by_relocations(define, type):
    """Each compiler's relocation for a pointer puts a program into its slot."""
    define.add("tails", *programs(define))
    define.finish()
    define.elf.relocation(define.index, 8 + 2 * 8, code(define)[1], type)
    assert define.maps()["tails"].initial == {2: "main"}


def test_a_static_program_is_put_in_by_its_sections_symbol(define):
    """Against a section's symbol the offset is in the slot itself."""
    define.add("tails", *programs(define))
    define.data[8:16] = (16).to_bytes(8, "little")
    define.finish()
    index = define.elf.code("tc", define.elf.returns() * 2)
    for name, value in (("main", 0), ("other", 16)):
        define.elf.symbol(name, index, value=value, size=16, bind=LOCAL)
    section = define.elf.symbol("", index, type=SECTION, bind=LOCAL)
    define.elf.relocation(define.index, 8, section, ABS64)
    assert define.maps()["tails"].initial == {0: "other"}


@pytest.mark.parametrize(
    ("offset", "type", "target"),
    [
        (0, ABS64, "main"),  # before the slots
        (12, ABS64, "main"),  # between two
        (64, ABS64, "main"),  # in the hash behind it
        (8, 3, "main"),  # of 32 bits
        (8, ABS64, "hash"),  # a map, and no program
        (8, ABS64, "nowhere"),
        (1 << 40, ABS64, "main"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused(define, offset, type, target):
    """A relocation of section .maps that fills no slot is refused with its place."""
    define.add("tails", *programs(define))
    define.add("hash", *hash_(define))
    _, hash_symbol = define.finish()
    symbols = {
        "main": code(define)[1],
        "hash": hash_symbol,
        "nowhere": define.elf.symbol("nowhere", 0),
    }
    define.elf.relocation(define.index, offset, symbols[target], type)
    error = define.refused()
    assert (error.section, error.offset) == (".maps", offset)


def test_an_enum_is_a_number(define):
    """A number of more than 32 bits is an enum with one value, as __ulong has it."""
    big = define.btf.add(Kind.ENUM64, size=8, vlen=1, tail=("value", 5, 1))
    define.add("events", *hash_(define, ("map_extra", big)))
    define.finish()
    assert define.maps()["events"].extra == (1 << 32) + 5
