"""Maps of objects: what their definitions say is what the kernel has, and programs find in them."""

from __future__ import annotations

import mmap
import struct

import pytest
from compiled import compiled
from since import since

from pybpfthrottle.bpf import abi, descriptors, loader, maps
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.codecs import RAW, U32, FormatCodec
from pybpfthrottle.bpf.errors import MapCreateError
from pybpfthrottle.bpf.obj import elf

U64 = FormatCodec("Q")
# The programs look at the last two bits of a packet's length.
LEN_0, LEN_1, LEN_2, LEN_3 = (bytes(64 + extra) for extra in range(4))


def read(name, *flags):
    """The spec of a fixture."""
    return elf.read_object(compiled(name, *flags), name=name)


@pytest.fixture
def loaded():
    """The loaded object of maps."""
    with loader.load(read("object_maps")) as found:
        yield found


def shape(live):
    """What the kernel says of a map: type, sizes, entries, flags."""
    info = descriptors.fill_info(live.fd, abi.MapInfo())
    return (info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)


def test_maps_have_the_shapes_of_their_definitions(loaded):
    """Each map by its types has in the kernel what its definition says."""
    assert {name: shape(live) for name, live in loaded.maps.items()} == {
        "first_inner": (MapType.ARRAY, 4, 8, 2, 0),
        "second_inner": (MapType.ARRAY, 4, 8, 2, 0),
        "outer": (MapType.ARRAY_OF_MAPS, 4, 4, 4, 0),
        "hash_outer": (MapType.HASH_OF_MAPS, 4, 4, 8, 0),
        "tails": (MapType.PROG_ARRAY, 4, 4, 3, 0),
        "stacks": (MapType.STACK_TRACE, 4, 1016, 16, 0),
        "a_map_with_a_name_that_is_too_long": (MapType.HASH, 12, 20, 7, 1 | abi.BPF_F_NUMA_NODE),
    }


@since("5.16")
def test_map_extra_arrives():
    """The number of hashes of a Bloom filter, which has 64 bits, is that of its definition."""
    with maps.create(read("object_corrections").maps["bloom"]) as live:
        assert descriptors.fill_info(live.fd, abi.MapInfo()).map_extra == 3


def test_a_name_that_is_too_long_is_cut(loaded):
    """The kernel has the first 15 characters of a map's name."""
    live = loaded.maps["a_map_with_a_name_that_is_too_long"]
    assert descriptors.fill_info(live.fd, abi.MapInfo()).name == b"a_map_with_a_na"


def test_programs_jump_through_the_array_that_the_object_fills(loaded):
    """A program array has the programs that its definition names, and nothing else."""
    run = loaded.programs["jumps"].test_run
    assert [run(packet).retval for packet in (LEN_0, LEN_1, LEN_2, LEN_3)] == [101, 7, 103, 7]


def test_programs_find_the_inner_maps_that_the_object_names(loaded):
    """A map of maps has the maps that its definition names."""
    loaded.maps["first_inner"].typed(U32, U64)[1] = 11
    loaded.maps["second_inner"].typed(U32, U64)[1] = 22
    run = loaded.programs["reads_inner"].test_run
    assert [run(packet).retval for packet in (LEN_0, LEN_1, LEN_2, LEN_3)] == [11, 404, 404, 22]


def test_an_inner_map_may_be_static():
    """A map of maps finds a static map through its section and offset."""
    with loader.load(read("object_beyond"), ["reads_inner"]) as found:
        found.maps["unshared"].typed(U32, U64)[1] = 77
        assert found.programs["reads_inner"].test_run(LEN_0).retval == 77


def test_inner_maps_have_the_shape_of_the_template(loaded):
    """A map of maps takes another map of its template's shape, and no map of another shape."""
    same = loaded.maps["first_inner"]
    outer = loaded.maps["outer"].typed(U32, U32)
    outer[1] = same.fd
    with pytest.raises(OSError, match="BPF_MAP_UPDATE_ELEM"):
        outer[2] = loaded.maps["stacks"].fd


def test_a_map_of_maps_needs_its_template():
    """Without an inner map's definition the error says what is missing."""
    spec = read("object_maps").maps["outer"]
    spec.inner = None
    with pytest.raises(MapCreateError, match="no inner map is defined"):
        maps.create(spec)


def test_what_is_not_to_be_loaded_is_loaded_when_it_is_selected():
    """A section with a question mark is passed over, unless its program is asked for."""
    with loader.load(read("object_pinned")) as found:
        assert list(found.programs) == ["remembers"]
    with loader.load(read("object_pinned"), ["only_when_asked"]) as asked:
        assert asked.programs["only_when_asked"].test_run(LEN_0).retval == 55
        assert asked.maps == {}


def test_a_selection_has_what_its_maps_hold():
    """A selected program's program array brings the programs that are in it."""
    with loader.load(read("object_maps"), ["jumps"]) as found:
        assert list(found.programs) == ["jumps", "first_tail", "second_tail"]
        assert list(found.maps) == ["tails"]
        assert found.programs["jumps"].test_run(LEN_2).retval == 103


def test_a_selection_has_the_maps_that_its_maps_hold():
    """A selected program's map of maps brings its inner maps."""
    with loader.load(read("object_maps"), ["reads_inner"]) as found:
        assert list(found.maps) == ["first_inner", "second_inner", "outer"]


def test_a_spec_may_be_edited_before_it_is_loaded():
    """What is assigned to a spec's map is what the kernel gets."""
    spec = read("object_pinned")
    spec.maps["shared"].max_entries = 9
    spec.maps["shared"].flags = abi.BPF_F_NO_PREALLOC
    with loader.load(spec, ["remembers"]) as found:
        assert shape(found.maps["shared"]) == (MapType.HASH, 4, 16, 9, abi.BPF_F_NO_PREALLOC)


@since("5.16")  # of the Bloom filter
def test_known_mistakes_are_corrected():
    """A typed ring of odd size and arrays without sizes or with too many CPUs are created."""
    with loader.load(read("object_corrections")) as found:
        ring_bytes = max(8192, mmap.PAGESIZE)
        cpus = maps.possible_cpus()
        assert shape(found.maps["ring"]) == (MapType.RINGBUF, 0, 0, ring_bytes, 0)
        assert shape(found.maps["perf"]) == (MapType.PERF_EVENT_ARRAY, 4, 4, cpus, 0)
        assert shape(found.maps["cpus"]) == (MapType.CPUMAP, 4, 8, cpus, 0)
        assert found.programs["reports"].test_run(LEN_0).retval == ring_bytes


@pytest.mark.parametrize("debug", ["-g", "-g0"])
def test_legacy_maps_need_no_types(debug):
    """Maps in section maps work with and without debug information."""
    with loader.load(read("object_legacy", debug)) as found:
        found.programs["counts"].test_run(LEN_0, repeat=3)
        assert found.maps["plain"].typed(U32, U64)[0] == 3 * len(LEN_0)


def test_iproute2s_inner_maps_are_in_their_outer_maps():
    """An inner map of iproute2's kind is where its own definition says, named by ids."""
    with loader.load(read("object_legacy")) as found:
        found.maps["inner"].typed(U32, U64)[1] = 33
        assert found.programs["reads"].test_run(LEN_0).retval == 33


def test_values_that_programs_write_are_read():
    """A struct that a program puts into a hash is there, byte for byte."""
    with loader.load(read("object_pinned")) as found:
        assert found.programs["remembers"].test_run(LEN_0).retval == 0
        values = dict(found.maps["shared"].typed(U32, RAW).items())
    length = len(LEN_0)
    assert {key: struct.unpack("=QI", value[:12]) for key, value in values.items()} == {
        length: (1, length)
    }
