"""Broken objects of real compilers: whatever is wrong, it is an ObjectFileError or a spec."""

from __future__ import annotations

from compiled import compiled
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pybpfthrottle.bpf import elf, relocate
from pybpfthrottle.errors import ObjectFileError

NAMES = ("object_maps", "object_legacy", "object_data", "object_calls", "object_beyond")
NUMBERS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


def use(data):
    """Read an object and do all with it that needs no kernel."""
    try:
        spec = elf.read_object(data)
        for program in spec.programs.values():
            relocate.resolve(relocate.link(spec, program), dict.fromkeys(spec.maps, 3))
    except ObjectFileError:
        return
    for variable in spec.variables.values():
        assert variable.offset + variable.size <= variable.map.value_size


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6),
)
@example("object_maps", [(0, 0)])
def test_wrong_bytes_raise_nothing_else(name, flips):
    """Bytes that are changed anywhere give a spec or an ObjectFileError."""
    data = bytearray(compiled(name))
    for at, value in flips:
        data[at % len(data)] = value
    use(bytes(data))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(NAMES), st.integers(0, 1 << 20), st.sampled_from(NUMBERS))
def test_wrong_numbers_raise_nothing_else(name, word, number):
    """Numbers at the edges of their types, in any aligned place, do nothing worse."""
    data = bytearray(compiled(name))
    at = word % (len(data) // 8) * 8
    data[at : at + 8] = number.to_bytes(8, "little")
    use(bytes(data))
