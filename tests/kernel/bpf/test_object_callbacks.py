"""Functions that helpers of the kernel call back: what they add up is what the source says."""

from __future__ import annotations

import pytest
from compiled import compiled
from since import since

from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.obj import elf


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        pytest.param("calls_back", 40 + (1 + 1), marks=since("5.13")),
        pytest.param("loops", sum(index + 1 for index in range(10)), marks=since("5.17")),
    ],
)
def test_helpers_call_functions_of_the_object(name, wanted):
    """A static function is called for each element of an array, and for each turn of a loop."""
    spec = elf.read_object(compiled("object_callbacks"), name="object_callbacks")
    with loader.load(spec, [name]) as loaded:
        assert loaded.programs[name].test_run(bytes(64)).retval == wanted
