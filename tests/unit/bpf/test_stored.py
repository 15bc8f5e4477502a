"""The spec of an object as JSON: the same as reading the object gives, and for no other object."""

from __future__ import annotations

import json

import pytest
from compiled import compiled

from pybpfthrottle.bpf.obj import elf, stored

# Between them they have all that a spec can have.
OBJECTS = ("object_calls", "object_data", "object_maps", "externs", "object_callbacks")


def orders(spec):
    """The order of all that a spec has by name."""
    return [list(part) for part in vars(spec).values() if isinstance(part, dict)]


@pytest.fixture(params=OBJECTS)
def read(request):
    """An object's bytes, and its spec."""
    data = compiled(request.param)
    return data, elf.read_object(data, name=request.param)


def test_what_was_stored_is_the_same_spec(read):
    """Stored and loaded again, a spec is equal, and has all in the same order."""
    data, spec = read
    again = stored.load(stored.dump(spec, data).encode(), data, spec.name)
    assert again == spec
    assert orders(again) == orders(spec)


def test_the_types_of_programs_are_known_by_name(read):
    """The numbers of types in the JSON become what reading the object gives."""
    data, spec = read
    again = stored.load(stored.dump(spec, data).encode(), data, spec.name)
    for name, program in spec.programs.items():
        other = again.programs[name]
        assert (repr(other.type), repr(other.expected_attach_type)) == (
            repr(program.type),
            repr(program.expected_attach_type),
        )


def test_a_variable_still_changes_its_map():
    """A variable refers to the map that the spec has, so that setting it changes that map."""
    data = compiled("object_data")
    spec = elf.read_object(data, name="it")
    again = stored.load(stored.dump(spec, data).encode(), data, "it")
    for variable in again.variables.values():
        assert variable.map is again.maps[variable.map.name]


def test_each_change_of_the_object_is_noticed(read):
    """The JSON holds for no object of other bytes, nor for one of another name."""
    data, spec = read
    text = stored.dump(spec, data).encode()
    assert stored.load(text, data + b"\0", spec.name) is None
    assert stored.load(text, data[:-1] + bytes([data[-1] ^ 1]), spec.name) is None
    assert stored.load(text, data, "another") is None


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b"\xff", b'{"version":1,"name":"it"}'])
def test_what_is_no_stored_spec_is_not_taken(text):
    """Anything else is taken for no spec, and raises nothing."""
    assert stored.load(text, b"data", "it") is None


def test_another_version_is_not_taken(read):
    """The JSON of another version is not read as if it were this one's."""
    data, spec = read
    fields = {**json.loads(stored.dump(spec, data)), "version": stored.VERSION + 1}
    assert stored.load(json.dumps(fields).encode(), data, spec.name) is None
