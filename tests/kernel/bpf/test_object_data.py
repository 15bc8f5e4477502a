"""Variables of objects: set before they are loaded, shared with the programs after it."""

from __future__ import annotations

import sys

import pytest
from compiled import compiled

from pybpfthrottle.bpf import abi, loader, variables
from pybpfthrottle.bpf.obj import elf

PACKET = bytes(64)


@pytest.fixture
def spec():
    """The spec of variables."""
    return elf.read_object(compiled("object_data"), name="object_data")


@pytest.fixture(params=["mapped", "copied"])
def loaded(spec, request):
    """The loaded object, by memory that is shared and by commands."""
    if request.param == "copied":
        for found in spec.maps.values():
            found.flags &= ~abi.BPF_F_MMAPABLE
    with loader.load(spec) as found:
        yield found


def run(loaded, name):
    """What a program answers, as the signed number that it is."""
    value = loaded.programs[name].test_run(PACKET).retval
    return value - (1 << 32) if value >> 31 else value


def test_variables_have_the_values_of_the_source(spec):
    """Each variable is read from the spec as what its type says."""
    assert {name: found.get() for name, found in spec.variables.items()} == {
        "limit": 5,
        "bias": -7,
        "mode": 1,
        "enabled": 1,
        "device": b"eth0\0\0\0\0",
        "hits": 0,
        "step": 2,
        "seen": bytes(8),
        "separate": 11,
        "constant": 99,
        "seen_by_static.calls": 3,
    }


def test_constants_are_set_before_loading(spec):
    """A constant that is set on the spec is what the program sees."""
    spec.variables["limit"].set(100)
    spec.variables["bias"].set(-40)
    spec.variables["mode"].set(-3)
    spec.variables["constant"].set(10)
    spec.variables["device"].set(b"veth7\0\0\0")
    with loader.load(spec) as found:
        assert run(found, "adds") == 60
        assert run(found, "says") == 7
        assert run(found, "spells") == ord("v") << 8 | ord("h")


def test_zeros_can_be_set_before_loading(spec):
    """A variable that begins as zero in the source begins as what the spec says."""
    spec.variables["hits"].set(1 << 40)
    with loader.load(spec) as found:
        run(found, "adds")
        assert found.variables["hits"].get() == (1 << 40) + 2


def test_a_boolean_turns_a_program_off(spec):
    """A bool is set as a number or as True and False."""
    spec.variables["enabled"].set(False)
    with loader.load(spec) as found:
        assert run(found, "says") == 1000


def test_what_programs_write_is_read(loaded):
    """Variables of all sections that may be written show what the program has added."""
    run(loaded, "adds")
    run(loaded, "adds")
    values = {name: found.get() for name, found in loaded.variables.items()}
    assert (values["hits"], values["separate"]) == (4, 13)
    assert values["seen"] == bytes(6) + (2).to_bytes(2, sys.byteorder)


def test_zeros_have_a_section_of_any_name():
    """A variable in a section whose name begins with .bss is one like any other."""
    with loader.load(elf.read_object(compiled("object_beyond"))) as found:
        found.variables["zeroed"].set(40)
        assert run(found, "adds") == 42


def test_what_is_written_is_what_programs_see(loaded):
    """A variable that is set on the loaded object is what the program adds."""
    loaded.variables["step"].set(1000)
    run(loaded, "adds")
    assert loaded.variables["hits"].get() == 1000


def test_a_functions_own_variable_has_both_names(loaded):
    """A static variable of a function goes by the function's name and its own."""
    loaded.variables["seen_by_static.calls"].set(50)
    assert run(loaded, "seen_by_static") == 51


def test_constants_cannot_be_written_after_loading(loaded):
    """A frozen constant refuses: PermissionError, and keeps its value."""
    with pytest.raises(PermissionError):
        loaded.variables["limit"].set(6)
    assert loaded.variables["limit"].get() == 5


def test_data_is_mapped_where_the_kernel_can(spec):
    """The memory of data maps is shared, and what is written through it is in the map."""
    with loader.load(spec) as found:
        memory = variables.Memory(found.maps["object_d.bss"])
        memory.write(0, b"\7")
        assert memory._mapped is not None
        assert found.maps["object_d.bss"][bytes(4)][:1] == b"\7"
        memory.close()


@pytest.mark.parametrize("value", [1 << 32, -1, b"abc"])
def test_a_value_that_does_not_fit_is_refused(spec, value):
    """A number out of range, or bytes of another length, are a ValueError that names it."""
    with pytest.raises(ValueError, match="'limit'"):
        spec.variables["limit"].set(value)
