"""Objects of each compiler that is installed, run: all of them say what the source says."""

from __future__ import annotations

import pytest
from compiled import compiled, compilers

from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.obj import elf

ANSWERS = {
    "object_data": {"adds": -2, "says": 100, "spells": ord("e") << 8 | ord("0")},
    "object_calls": {"calls_static": 22, "calls_global": 45, "calls_nothing": 9},
}


@pytest.mark.parametrize("fixture", ANSWERS)
@pytest.mark.parametrize("types", ["with types", "without"])
@pytest.mark.parametrize("compiler", compilers())
def test_all_compilers_say_the_same(compiler, types, fixture):
    """Data and calls of an object are found, with types and without them."""
    flags = ("-g0",) if types == "without" else ()
    spec = elf.read_object(compiled(fixture, *flags, compiler=compiler), name=fixture)
    with loader.load(spec) as loaded:
        answers = {
            name: loaded.programs[name].test_run(bytes(64)).retval for name in ANSWERS[fixture]
        }
    assert answers == {name: value % (1 << 32) for name, value in ANSWERS[fixture].items()}
