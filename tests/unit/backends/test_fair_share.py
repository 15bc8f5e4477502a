"""How a rate is divided among connections."""

from __future__ import annotations

import math

import pytest

from pybpfthrottle.backends.ebpf.unadopted import fair_share


@pytest.mark.parametrize(
    ("wants", "share"),
    [
        ([], 100),
        ([math.inf], 100),
        ([math.inf] * 4, 25),
        ([math.inf, 10, math.inf], 45),
        ([10, 30, math.inf, math.inf], 30),
        ([0.0] * 100, 100),
        ([0.0] * 100 + [math.inf] * 2, 50),
    ],
)
def test_those_that_want_less_leave_the_rest_to_the_others(wants, share):
    """What the others get is equal, and all of it is used."""
    assert fair_share(100, wants) == share
