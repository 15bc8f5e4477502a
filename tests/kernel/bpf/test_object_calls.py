"""Calls between the functions of an object, run: what they return is what the source says."""

from __future__ import annotations

import pytest
from compiled import compiled

from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.obj import elf

PACKET = bytes(64)


def answer(fixture, name):
    """What a program of a fixture returns."""
    spec = elf.read_object(compiled(fixture), name=fixture)
    with loader.load(spec, [name]) as loaded:
        return loaded.programs[name].test_run(PACKET).retval


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("calls_static", (10 + 1) * 2),
        ("calls_global", (10 + 1) * 2 + (10 + 1) + 4 * 3),
        ("calls_nothing", 9),
    ],
)
def test_calls_reach_their_functions(name, wanted):
    """Static, global and hidden functions are called."""
    assert answer("object_calls", name) == wanted


def test_a_static_program_is_an_entry():
    """A static function in a program's section is loaded unless another one calls it."""
    spec = elf.read_object(compiled("object_beyond"), name="object_beyond")
    assert {"jumps", "leaves"} < set(spec.programs)
    assert "beside" not in spec.programs
    assert answer("object_beyond", "leaves") == 61


def test_a_static_program_is_jumped_to():
    """A program array finds a static program through its section and offset."""
    assert answer("object_beyond", "jumps") == 61


def test_a_program_may_call_another():
    """A global program of the same section is called like any function, and is loaded itself."""
    assert answer("object_beyond", "entry") == 14
    assert answer("object_beyond", "calls_entry") == 15
