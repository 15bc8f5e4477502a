"""Calls between the functions of an object, run: what they return is what the source says."""

from __future__ import annotations

import pytest
from compiled import compiled

from pybpfthrottle.bpf import elf, loader

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
        ("calls_beside", 15 + 25),
        ("calls_global", (10 + 1) * 2 + (10 + 1) + 4 * 3),
        ("calls_nothing", 9),
    ],
)
def test_calls_reach_their_functions(name, wanted):
    """Static, global and hidden functions, in .text and beside the program, are called."""
    assert answer("object_calls", name) == wanted


def test_a_static_program_is_an_entry():
    """A static function in a program's section is loaded unless another one calls it."""
    spec = elf.read_object(compiled("object_static"), name="object_static")
    assert sorted(spec.programs) == ["jumps", "leaves"]
    assert answer("object_static", "leaves") == 61


def test_a_static_program_is_jumped_to():
    """A program array finds a static program through its section and offset."""
    assert answer("object_static", "jumps") == 61
