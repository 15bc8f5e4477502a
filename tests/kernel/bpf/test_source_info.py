"""What the kernel knows of an object's types and source after it was loaded."""

from __future__ import annotations

import json
import subprocess

import pytest
from compiled import compiled
from since import needs_configuration

from pybpfthrottle.bpf import btf_objects, loader
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.obj.btf_rewrite import CONCESSIONS, conceding, loadable


def bpftool(*words):
    """What bpftool answers, from its JSON."""
    done = subprocess.run(["bpftool", "-j", *words], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def map_id(live):
    """The id of a map that this process has open."""
    with open(f"/proc/self/fdinfo/{live.fd}") as file:
        return next(line.split()[1] for line in file if line.startswith("map_id:"))


@pytest.fixture
def loaded():
    """A loaded object with settings, data and several functions."""
    needs_configuration()
    with loader.load(elf.read_object(compiled("externs")), ["settings"]) as found:
        yield found


def test_programs_and_maps_share_the_objects_types(loaded):
    """The program and its maps have the same BTF."""
    program = bpftool("prog", "show", "id", str(loaded.programs["settings"].info().id))
    ids = {program["btf_id"]}
    for live in loaded.maps.values():
        ids.add(bpftool("map", "show", "id", map_id(live))["btf_id"])
    assert len(ids) == 1


def test_data_is_shown_by_name(loaded):
    """Bpftool shows the settings by the names that the object has for them."""
    loaded.programs["settings"].test_run(bytes(64))
    (element,) = bpftool("map", "dump", "id", map_id(loaded.maps[".kconfig"]))
    shown = {
        name: value
        for variable in element["formatted"]["value"][".kconfig"]
        for name, value in variable.items()
    }
    assert shown["CONFIG_HZ"] == loaded.variables["hz"].get()


def test_instructions_have_their_lines(loaded):
    """The kernel tells the source of the program's instructions."""
    number = str(loaded.programs["settings"].info().id)
    rows = bpftool("prog", "dump", "xlated", "id", number, "linum")
    found = [row for part in rows for row in part.get("insns", [part]) if "src" in row]
    assert any("hz = CONFIG_HZ" in row["src"] for row in found)


def test_an_older_kernels_types_are_taken():
    """Whatever is conceded to older kernels, types are still such as the kernel takes."""
    spec = elf.read_object(compiled("externs"))
    data = loadable(spec.btf, spec.layouts, spec.hidden)
    for concession in CONCESSIONS:
        data = conceding(data, concession) or data
        with btf_objects.load(data) as found:
            assert found.functions
    assert not list(Btf(data).of_kind(Kind.FUNC, Kind.DATASEC))
