"""Objects as bpftool loads them, compared with how this package does."""

from __future__ import annotations

import json
import subprocess

import pytest
from bpffs import mounted
from compiled import compiled
from since import needs_command

from pybpfthrottle.bpf import abi, descriptors, loader
from pybpfthrottle.bpf.obj import elf

# What libbpf 1.1 can load; it knows neither legacy maps nor static programs.
OBJECTS = ["object_maps", "object_data", "object_calls", "object_callbacks"]


@pytest.fixture(autouse=True)
def _bpftool():
    needs_command("bpftool")


def bpftool(*command):
    """What a command of bpftool says, in a mount namespace of its own: it mounts things."""
    done = subprocess.run(
        ["unshare", "--mount", "bpftool", "--json", *map(str, command)],
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout or "null")


def program(*which):
    """What bpftool shows of a program: its name, and type and bytes after the verifier."""
    shown = bpftool("prog", "show", *which)
    return shown["name"], (shown["type"], shown["bytes_xlated"])


def map_(*which):
    """What bpftool shows of a map: its name, and its shape."""
    shown = bpftool("map", "show", *which)
    fields = ("type", "flags", "bytes_key", "bytes_value", "max_entries")
    return shown["name"], tuple(shown[field] for field in fields)


def map_id(live):
    """The id of a live map."""
    return descriptors.fill_info(live.fd, abi.MapInfo()).id


@pytest.fixture(scope="module", params=OBJECTS)
def both(request, tmp_path_factory):
    """The programs and maps of an object as bpftool shows them: loaded by it, and by us."""
    directory = tmp_path_factory.mktemp(request.param)
    path = directory / f"{request.param}.o"
    path.write_bytes(compiled(request.param))
    with mounted(directory / "bpf") as pins:
        bpftool("prog", "loadall", path, pins / "programs", "pinmaps", pins / "maps")
        theirs = (
            dict(program("pinned", found) for found in pins.glob("programs/*")),
            dict(map_("pinned", found) for found in pins.glob("maps/*")),
        )
    with loader.load(elf.read_file(path)) as loaded:
        ours = (
            dict(program("id", found.info().id) for found in loaded.programs.values()),
            dict(map_("id", map_id(found)) for found in loaded.maps.values()),
        )
    return theirs, ours


def test_the_programs_are_the_same(both):
    """All programs have the same names, types, and numbers of instructions in the kernel."""
    theirs, ours = both
    assert ours[0] == theirs[0]
    assert theirs[0]


def test_the_maps_are_the_same(both):
    """All maps have the same names, types, sizes, entries and flags."""
    theirs, ours = both
    assert ours[1] == theirs[1]
