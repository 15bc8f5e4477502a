"""Broken objects of real compilers: whatever is wrong, it is an ObjectFileError or a spec."""

from __future__ import annotations

from broken import FIXTURES, extents, use
from compiled import compiled
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

NUMBERS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
bounded = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# What is read of an object, and each table of relocations of that.
SECTIONS = (".BTF", ".BTF.ext", ".maps", "maps", ".rel", ".symtab", ".strtab", "license", "")


def section_of(data, wanted, number):
    """One of the sections whose name begins so, or the whole file."""
    found = [
        (begin, end) for name, begin, end in extents(data) if wanted and name.startswith(wanted)
    ]
    return found[number % len(found)] if found else (0, len(data))


@bounded
@given(
    st.sampled_from(FIXTURES),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6),
)
@example("object_maps", [(0, 0)])
def test_wrong_bytes_raise_nothing_else(name, flips):
    """Bytes that are changed anywhere give a spec or an ObjectFileError."""
    data = bytearray(compiled(name))
    for at, value in flips:
        data[at % len(data)] = value
    use(bytes(data))


@settings(bounded, max_examples=400)
@given(
    st.sampled_from(FIXTURES),
    st.sampled_from(SECTIONS),
    st.integers(0, 9),
    st.lists(
        st.tuples(st.integers(0, 1 << 20), st.sampled_from(NUMBERS) | st.integers(0, 300)),
        min_size=1,
        max_size=3,
    ),
)
def test_wrong_numbers_in_a_section_raise_nothing_else(name, section, number, changes):
    """Numbers at the edges of their types, in each section that is read, do nothing worse."""
    data = bytearray(compiled(name))
    begin, end = section_of(data, section, number)
    for word, value in changes:
        width = 8 if value >> 32 else 4
        at = begin + word % max(1, (end - begin) // 4) * 4
        data[at : at + width] = value.to_bytes(width, "little")
    use(bytes(data))


@bounded
@given(st.sampled_from(FIXTURES), st.integers(0, 1 << 20))
def test_what_is_cut_off_raises_nothing_else(name, length):
    """A file that ends anywhere is refused, or is whole."""
    data = compiled(name)
    use(data[: length % len(data)])
