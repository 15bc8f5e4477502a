"""Definitions of maps by their numbers, as each loader of old has them."""

from __future__ import annotations

import struct

import pytest
from elf_builder import NOTYPE, OBJECT, ObjectBuilder

from pybpfthrottle.bpf.abi import BPF_F_NUMA_NODE, MapType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.specs import MapSpec

OUTER, NONE = MapType.ARRAY_OF_MAPS, 0xFFFFFFFF


def maps(*definitions, section="maps", sizes=True):
    """The maps of an object with these numbers in its section."""
    builder = ObjectBuilder()
    index = builder.section(section, b"".join(struct.pack(f"<{len(d)}I", *d) for d in definitions))
    at = 0
    for number, found in enumerate(definitions):
        size = 4 * len(found)
        kind = OBJECT if sizes else NOTYPE
        builder.symbol(f"map{number}", index, value=at, size=size if sizes else 0, type=kind)
        at += size
    return elf.read_object(builder.build()).maps


def test_a_map_without_a_size_reaches_to_the_next():
    """Symbols without types and sizes, as clang before 7 has them, are maps."""
    found = maps((1, 4, 8, 16, 0), (2, 4, 24, 3, 0), sizes=False)
    assert found["map0"] == MapSpec("map0", MapType.HASH, 4, 8, 16)
    assert found["map1"] == MapSpec("map1", MapType.ARRAY, 4, 24, 3)


def test_a_section_may_name_its_map():
    """Sections maps/... hold maps like section maps."""
    assert list(maps((1, 4, 8, 16, 0), section="maps/events")) == ["map0"]


def test_ayas_pinning_is_known():
    """Of seven numbers the last asks for pinning, as aya has it."""
    assert maps((1, 4, 8, 16, 0, 0, 1))["map0"].pinned


def test_a_numa_node_is_known():
    """Of seven numbers the last is a NUMA node where the flags say that there is one."""
    found = maps((1, 4, 8, 16, BPF_F_NUMA_NODE, 0, 1))["map0"]
    assert (found.numa_node, found.pinned) == (1, False)


def test_an_inner_map_by_its_number():
    """Of seven numbers the sixth says which map of the section is the inner one."""
    found = maps((1, 4, 8, 16, 0), (OUTER, 4, 4, 2, 0, 0, 0))
    assert found["map1"].inner is found["map0"]


def test_iproute2s_pinning_is_known():
    """Of nine numbers the seventh asks for pinning, as iproute2 has it."""
    assert maps((1, 4, 8, 16, 0, 3, 2, 0, NONE))["map0"].pinned


def test_iproute2s_inner_maps_are_known():
    """Of nine numbers the last three say by ids what is in what, and where."""
    found = maps((2, 4, 8, 1, 0, 5, 0, 0, 3), (OUTER, 4, 4, 4, 0, 6, 0, 5, NONE))
    assert found["map1"].inner is found["map0"]
    assert found["map1"].initial == {3: "map0"}


@pytest.mark.parametrize(
    "definitions",
    [
        [(OUTER, 4, 4, 2, 0)],
        [(OUTER, 4, 4, 2, 0, 9, 0)],
        [(OUTER, 4, 4, 2, 0, 0, 0)],
        [(OUTER, 4, 4, 4, 0, 6, 0, 6, NONE)],
    ],
)
def test_a_map_of_maps_may_lack_its_inner_map(definitions):
    """Where no other map of the section is named, the caller gives the template."""
    assert maps(*definitions)["map0"].inner is None


def test_more_numbers_than_are_known_are_refused():
    """Of ten numbers the tenth has to be zero."""
    assert maps((1, 4, 8, 16, 0, 0, 0, 0, NONE, 0))
    with pytest.raises(ObjectFileError, match="unknown fields"):
        maps((1, 4, 8, 16, 0, 0, 0, 0, NONE, 1))


def test_two_maps_of_one_name_are_refused():
    """A second map of a name is refused with its place, whichever section it is in."""
    builder = ObjectBuilder()
    for section in ("maps/one", "maps/two"):
        index = builder.section(section, struct.pack("<5I", 1, 4, 8, 16, 0))
        builder.symbol("events", index, size=20, type=OBJECT)
    with pytest.raises(ObjectFileError, match="the map 'events' is defined twice") as caught:
        elf.read_object(builder.build())
    assert (caught.value.section, caught.value.offset) == ("maps/two", 0)
