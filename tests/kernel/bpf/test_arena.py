"""Arenas: memory that programs and this process share, page by page."""

from __future__ import annotations

import mmap
import os

import pytest
from compiled import compiled
from since import since

from pybpfthrottle.bpf import loader, maps
from pybpfthrottle.bpf.errors import MapCreateError
from pybpfthrottle.bpf.obj import elf

pytestmark = since("6.9")


@pytest.fixture
def spec():
    """The spec of an object with an arena."""
    return elf.read_object(compiled("object_arena"), name="arena")


def test_an_arenas_variables_are_shared(spec):
    """A variable in an arena begins as the object has it, and is the same for both sides."""
    with loader.load(spec) as loaded:
        first = loaded.variables["first"]
        assert first.get() == 41
        assert loaded.programs["grows"].test_run().retval == 0
        assert first.get() == 42
        first.set(99)
        loaded.programs["grows"].test_run()
        assert first.get() == 100


def test_pages_that_a_program_adds_are_there(spec):
    """What a program writes into a page that it was given is read at the page's place."""
    with loader.load(spec) as loaded:
        loaded.programs["grows"].test_run()
        memory = loaded.memory("arena")
        pages = [memory.read(at, 8) for at in range(0, 2 * mmap.PAGESIZE, mmap.PAGESIZE)]
        assert [int.from_bytes(page, "little") for page in pages] == [42, 77]
        assert loaded.variables["page"].get() % mmap.PAGESIZE == 0


def test_an_arena_needs_room_for_its_variables(spec):
    """An arena that is made too small for its variables is refused, and nothing stays open."""
    spec.maps["arena"].contents = bytes(17 * mmap.PAGESIZE)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MapCreateError, match="can only be made larger"):
        maps.create(spec.maps["arena"])
    assert os.listdir("/proc/self/fd") == before
