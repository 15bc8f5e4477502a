"""The round trip in samples."""

from __future__ import annotations

from typing import Any

import pytest

from pybpfthrottle import witness
from pybpfthrottle.linux.netns import Connection
from pybpfthrottle.linux.sockets import TcpInfo
from pybpfthrottle.linux.tcp import Look
from pybpfthrottle.witness import RoundTrips, Spending


def look(**connections: tuple[int, int]) -> Look:
    """At connections with so many bytes received, and such a round trip in ms."""
    found = {}
    for name, (received, trip_ms) in connections.items():
        info = TcpInfo(1, 0, 0, trip_ms * 1000, 0, 0, received, 0, 0, 0)
        found[ord(name)] = Connection(ord(name), ord(name), None, (("1.1.1.1", 1),) * 2, info)
    return Look(found, frozenset())


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the next looks find."""
    found: list[Any] = []
    monkeypatch.setattr(witness, "look", lambda throttle: found.pop(0))
    monkeypatch.setattr(Spending, "due", True)
    return found


def test_it_is_that_of_connections_that_carry_data(looks: list[Any]) -> None:
    """The median; those that rest do not count, and nobody looks while nothing passes."""
    looks += [look(a=(0, 5), b=(0, 900)), look(a=(9, 7), b=(0, 900))]
    trips = RoundTrips(None)  # type: ignore[arg-type]
    trips.begin()
    assert trips.sample(9) == 7.0
    assert trips.sample(9) is None
    assert looks == []
    looks.append(look(a=(9, 7), b=(5, 30), c=(5, 20), d=(5, 10)))
    assert trips.sample(24) == 20.0


def test_it_is_unknown_where_the_kernel_lists_nothing(looks: list[Any]) -> None:
    """And nothing fails."""
    looks += [None, None]
    trips = RoundTrips(None)  # type: ignore[arg-type]
    trips.begin()
    assert trips.sample(9) is None


def test_a_target_with_many_sockets_is_looked_at_less_often(
    looks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last round trip stays until the next look."""
    looks += [look(a=(0, 5)), look(a=(9, 7)), look(a=(19, 8))]
    trips = RoundTrips(None)  # type: ignore[arg-type]
    trips.begin()
    assert trips.sample(9) == 7.0
    monkeypatch.setattr(Spending, "due", False)
    assert trips.sample(15) == 7.0
    monkeypatch.setattr(Spending, "due", True)
    assert trips.sample(19) == 8.0
