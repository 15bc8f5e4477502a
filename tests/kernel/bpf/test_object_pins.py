"""Maps that are pinned by name: shared by all loads that use the same directory."""

from __future__ import annotations

import os

import pytest
from bpffs import mounted
from compiled import compiled
from since import since

from pybpfthrottle.bpf import loader, maps, pins
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.errors import MapCreateError
from pybpfthrottle.bpf.obj import elf

PACKET = bytes(64)


@pytest.fixture
def directory(tmp_path):
    """A directory in a bpf file system of the test's own."""
    with mounted(tmp_path / "bpf") as found:
        yield found


@pytest.fixture
def spec():
    """The spec of a map that wants to be pinned."""
    return elf.read_object(compiled("object_pinned"), name="object_pinned")


def pinned(directory):
    """What is pinned; names with dots are the kernel's own."""
    return sorted(name for name in os.listdir(directory) if "." not in name)


def test_a_pinned_map_is_shared_by_two_loads(spec, directory):
    """What a program of the first load writes is in the map of the second."""
    with loader.load(spec, ["remembers"], pin_path=directory) as first:
        first.programs["remembers"].test_run(PACKET)
    with loader.load(spec, ["remembers"], pin_path=directory) as second:
        assert list(second.maps["shared"].typed(U32, RAW)) == [64]


def test_only_maps_that_ask_for_it_are_pinned(spec, directory):
    """Of all maps of an object only the one whose definition says so has a name there."""
    other = elf.read_object(compiled("object_maps"), name="object_maps")
    for found in (spec, other):
        loader.load(found, pin_path=directory).close()
    assert pinned(directory) == ["shared"]


def test_without_a_directory_nothing_is_pinned(spec):
    """Without a directory such a map is each load's own."""
    for _ in range(2):
        with loader.load(spec, ["remembers"]) as loaded:
            assert list(loaded.maps["shared"]) == []
            loaded.programs["remembers"].test_run(PACKET)


def test_all_differences_are_listed(spec, directory):
    """A pinned map of another shape is refused with everything that differs."""
    loader.load(spec, ["remembers"], pin_path=directory).close()
    wanted = spec.maps["shared"]
    wanted.max_entries, wanted.flags = 9, 1
    with pytest.raises(MapCreateError) as caught:
        loader.load(spec, ["remembers"], pin_path=directory)
    assert "max_entries is 4 and not 9, its flags is 0 and not 1" in str(caught.value)
    assert str(directory / "shared") in str(caught.value)


@since("5.16")  # of the Bloom filter
def test_corrected_maps_are_found_again(directory):
    """A ring whose size was rounded up is not different from what asked for it."""
    spec = elf.read_object(compiled("object_corrections"), name="object_corrections")
    for found in spec.maps.values():
        found.pinned = found.section is None
    for _ in range(2):
        loader.load(spec, pin_path=directory).close()
    assert pinned(directory) == ["bloom", "cpus", "perf", "ring"]


def test_a_directory_that_cannot_hold_pins_is_an_error(spec, tmp_path):
    """Another kind of file system is refused with what is needed, and nothing stays open."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(MapCreateError, match="mount -t bpf"):
        loader.load(spec, ["remembers"], pin_path=tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["a.b", "../outside", "a/b"])
def test_a_name_stays_in_the_directory(spec, directory, name):
    """A map's name from an object cannot lead out of the directory."""
    wanted = spec.maps["shared"]
    wanted.name = name
    pins.open_or_create(wanted, directory).close()
    assert pinned(directory) == [name.replace(".", "_").replace("/", "_")]


def test_a_map_that_appears_meanwhile_is_taken(spec, directory, monkeypatch):
    """If another load pins the map first, that one is used."""
    create = maps.create
    other = []

    def slow(wanted, **options):
        if not other:
            other.append(create(wanted, **options))
            pins.descriptors.pin(other[0].fd, directory / "shared")
        return create(wanted, **options)

    monkeypatch.setattr(maps, "create", slow)
    with pins.open_or_create(spec.maps["shared"], directory) as found, other[0]:
        other[0].typed(U32, RAW)[7] = bytes(16)
        assert list(found.typed(U32, RAW)) == [7]


def test_something_else_that_is_pinned_there_is_an_error(spec, directory):
    """A program in the map's place is told apart from a map."""
    with loader.load(spec, ["remembers"]) as loaded:
        pins.descriptors.pin(loaded.programs["remembers"].fd, directory / "shared")
    with pytest.raises(MapCreateError, match="it is a bpf-prog, not a bpf-map"):
        loader.load(spec, ["remembers"], pin_path=directory)
