"""The clocks of a time namespace, and a process that is seen from two of them."""

from __future__ import annotations

import pytest

from pybpfthrottle.linux import process
from pybpfthrottle.linux.clock import Offsets, parse
from pybpfthrottle.linux.process import Identity


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "monotonic           5         7\nboottime            9         0\n",
            (5_000_000_007, 9e9),
        ),
        ("monotonic          -1 999999999\nboottime            0         0\n", (-1, 0)),
        ("1 5 0\n7 -8 500000000\n", (5e9, -7.5e9)),
        ("", (0, 0)),
    ],
)
def test_offsets_are_read_by_name_or_number(text: str, found: tuple[float, float]) -> None:
    """Nanoseconds are never negative; seconds may be."""
    assert parse(text) == Offsets(int(found[0]), int(found[1]))


@pytest.mark.parametrize(("ticks", "same"), [(0, True), (1, True), (-1, True), (2, False)])
def test_a_start_may_be_one_tick_off(ticks: int, same: bool) -> None:
    """The kernel shifts the time and then cuts it to ticks."""
    one = Identity(4, 5, 1000)
    assert process.same(one, one._replace(start_ticks=1000 + ticks)) is same
    assert not process.same(one, one._replace(pid=9, start_ticks=1000 + ticks))
