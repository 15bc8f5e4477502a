"""A group of this machine whose totals follow the fleet's agreement."""

from __future__ import annotations

import math

import pytest
from redis_server import redis, until

from pybpfthrottle.errors import SettingsError
from pybpfthrottle.fleet import group as groups
from pybpfthrottle.fleet import share as shares
from pybpfthrottle.fleet.group import FleetGroup
from pybpfthrottle.fleet.share import FleetShare
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.supervisor import InThread

UP, DOWN = Direction.UPLOAD, Direction.DOWNLOAD
TOTALS = {UP: Rate(100_000_000), DOWN: Rate(10_000_000)}


@pytest.fixture(autouse=True)
def quicker(monkeypatch):
    """They agree, and follow, more often than once a second."""
    monkeypatch.setattr(shares, "_PERIOD_S", 0.05)
    monkeypatch.setattr(groups, "_PERIOD_S", 0.05)


class Local:
    """A group whose members want something; they use no more than there is."""

    def __init__(self, **wanted):
        self.wanted = wanted
        self.totals = {}

    def demand(self, direction):
        """What all its members together can use, at most the total."""
        return min(self.wanted.get(str(direction), math.inf), self.totals[direction])

    def set_total(self, direction, total):
        """Share another total."""
        self.totals[direction] = total.bytes_per_s

    def parts(self):
        """Its totals, in millions."""
        return {str(way): total // 1_000_000 for way, total in self.totals.items()}


def test_two_groups_follow_what_was_agreed_on():
    """What one does not want the other gets; who uses all it has, wants all there is."""
    one, other = Local(upload=8_000_000), Local()
    with redis() as (_, port):
        url = f"redis://127.0.0.1:{port}"
        with FleetGroup(one, url, "g", TOTALS, machines=2) as first:
            with FleetGroup(other, url, "g", TOTALS, machines=2) as second:
                assert one.parts() == other.parts() == {"upload": 50, "download": 5}
                drivers = [InThread(each.chores) for each in (first, second)]
                try:
                    # It may grow by a quarter.
                    until(lambda: one.parts() == {"upload": 10, "download": 5})
                    until(lambda: other.parts() == {"upload": 90, "download": 5})
                    one.wanted = {"download": 0}
                    until(lambda: one.parts() == {"upload": 50, "download": 0})
                    until(lambda: other.parts() == {"upload": 50, "download": 10})
                finally:
                    for each in drivers:
                        each.release()


def test_a_group_without_a_server_has_an_equal_part():
    """The reason is told once for both directions, and leaving takes no time."""
    local = Local()
    with FleetGroup(local, "redis://127.0.0.1:1", "g", TOTALS, machines=4) as fleet:
        assert local.parts() == {"upload": 25, "download": 2}
        until(fleet.notes)
        [note] = fleet.notes()
        assert note.startswith("no agreement through redis://127.0.0.1:1/0: ")


def test_an_address_that_is_none_changes_nothing():
    """The group keeps its totals."""
    local = Local()
    with pytest.raises(SettingsError, match="shared is no address of a Redis"):
        FleetGroup(local, "here", "g", TOTALS)
    assert local.totals == {}


def test_directions_do_not_share_a_total():
    """Each has a key of its own."""
    with redis() as (_, port):
        url = f"redis://127.0.0.1:{port}"
        with FleetGroup(Local(), url, "g", TOTALS), FleetShare(url, "g:upload", TOTALS[UP]) as peer:
            until(lambda: peer.part() == Rate(50_000_000))
