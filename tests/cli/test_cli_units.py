"""--unit and --cgroup while what they limit is started again: the same path, another cgroup."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

AT_ONCE_S = 0.5  # much less than the time between two looks
# As long after its start as a service would.
SEND = """
import socket, time
time.sleep(0.2)
socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))
"""


class Units:
    """Cgroups with the names of units, as systemd makes and removes them."""

    def __init__(self, scratch):
        self._scratch = scratch
        self.slice = scratch.cgroup(name=scratch.name() + ".slice")

    def start(self, name=None):
        """A new one, or one that was there before."""
        return self._scratch.cgroup(name=name or self.name(), parent=self.slice)

    def name(self):
        """A name that no other has."""
        return self._scratch.name() + ".service"


@pytest.fixture
def units(scratch):
    """Cgroups with the names of units."""
    return Units(scratch)


def begin(tool, *arguments):
    """Start it, and wait until the limit is in force."""
    started = tool.start(
        *arguments, "--download-limit", "1M", "--upload-limit", "1M", "--json",
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert json.loads(started.stdout.readline())["event"] == "start"
    return started


def event(started, kind, words=""):
    """The next event of a kind that has these words."""
    for line in started.stdout:
        if json.loads(line)["event"] == kind and words in line.decode():
            return json.loads(line)
    raise AssertionError(f"it has ended: {started.stderr.read()}")


def name_of(cgroup):
    """The name of a unit."""
    return cgroup.path.rpartition("/")[2]


def end(tool, started):
    """It is told to end, and does."""
    started.terminate()
    assert tool.finish(started).status == 0


def test_a_unit_that_is_restarted_is_limited_again(tool, units, attached, eventually):
    """At once, time and again, though it is another cgroup each time; this is said."""
    unit = units.start()
    started = begin(tool, "--unit", name_of(unit))
    for _ in range(3):
        before = attached(unit)
        assert before
        unit.remove()
        units.start(name_of(unit))
        # By the same programs, so that the counters go on.
        eventually(lambda before=before: attached(unit) == before, within_s=AT_ONCE_S)
    assert name_of(unit) in event(started, "note", "restarted")["text"]
    end(tool, started)


@pytest.mark.timed  # a fifth of a second decides
def test_a_restarted_unit_is_limited_from_its_first_packet_on(tool, units):
    """Its counters have each packet that was sent right after each start."""
    unit = units.start()
    started = begin(tool, "--unit", name_of(unit), "--loopback")
    for _ in range(5):
        unit.remove(patience_s=5)
        units.start(name_of(unit))
        subprocess.run([sys.executable, "-c", SEND], preexec_fn=lambda: unit.move_in(0), check=True)
    started.terminate()
    assert event(started, "end")["upload"]["packets_total"] == 5
    assert tool.finish(started).status == 0


@pytest.mark.parametrize("above", ["its slice stays", "its slice goes too"])
def test_a_limit_waits_for_its_unit(tool, scratch, units, attached, eventually, above):
    """While the unit is not running, which is said, it goes on; then the unit is limited again."""
    unit = units.start()
    started = begin(tool, "--unit", name_of(unit))
    before = attached(unit)
    unit.remove()
    if above != "its slice stays":
        units.slice.remove()
    assert name_of(unit) in event(started, "note", "not running")["text"]
    assert started.poll() is None
    if above != "its slice stays":
        scratch.cgroup(name=name_of(units.slice))
    units.start(name_of(unit))
    eventually(lambda: attached(unit) == before, within_s=AT_ONCE_S)
    end(tool, started)


def test_a_unit_may_come_back_elsewhere(tool, scratch, units, attached, eventually):
    """In another slice, since its settings were changed."""
    unit = units.start()
    started = begin(tool, "--unit", name_of(unit))
    before = attached(unit)
    unit.remove()
    other = scratch.cgroup(name=name_of(unit), parent=scratch.cgroup(name=scratch.name()))
    eventually(lambda: attached(other) == before, within_s=5)
    end(tool, started)


def test_units_that_share_a_limit_come_back_one_by_one(tool, units, attached, eventually):
    """The others stay limited, by what limited them before."""
    first, second = units.start(), units.start()
    started = begin(tool, "--unit", name_of(first), "--unit", name_of(second))
    before = attached(first)
    for unit in (first, second):
        unit.remove()
        units.start(name_of(unit))
        eventually(lambda unit=unit: attached(unit) == before, within_s=AT_ONCE_S)
        assert [attached(one) for one in (first, second)] == [before] * 2
    end(tool, started)
    assert [attached(one) for one in (first, second)] == [()] * 2


def test_what_is_set_holds_after_a_restart(tool, units, attached, eventually):
    """The unit is found by its name, and switched, as before."""
    unit = units.start()
    started = begin(tool, "--unit", name_of(unit))
    before = attached(unit)
    unit.remove()
    units.start(name_of(unit))
    eventually(lambda: attached(unit) == before, within_s=AT_ONCE_S)
    changes = ("--upload-limit", "2M", "--bpf-attach-method", "legacy")
    assert tool.run("set", "--unit", name_of(unit), *changes).status == 0
    [shown] = json.loads(tool.run("show", "--unit", name_of(unit), "--json").text)["throttles"]
    assert (shown["limits"]["upload"], shown["attached_by"]) == (2 << 20, "legacy")
    assert set(attached(unit)) == set(before)
    end(tool, started)


def test_a_path_that_is_another_cgroup_is_noticed(tool, scratch):
    """A given cgroup that is made anew is not the one that was meant: the limit has ended."""
    cgroup = scratch.cgroup()
    started = begin(tool, "--cgroup", cgroup.path)
    cgroup.remove()
    scratch.cgroup(name=name_of(cgroup))
    result = tool.finish(started)
    assert result.status == 1
    assert f"{cgroup.path} was removed while it was limited" in result.complaint
    assert "a new one at the same path" in result.complaint


def test_one_of_two_paths_that_is_another_cgroup_is_said(tool, scratch, attached):
    """The limit of the other one goes on."""
    cgroup, other = scratch.cgroup(), scratch.cgroup()
    started = begin(tool, "--cgroup", cgroup.path, "--cgroup", other.path)
    before = attached(other)
    cgroup.remove()
    scratch.cgroup(name=name_of(cgroup))
    # Before that the tool may have seen that there was none.
    assert cgroup.path in event(started, "note", "a new one at the same path")["text"]
    assert attached(other) == before
    end(tool, started)


def test_a_limit_of_python_comes_back(units, attached, eventually):
    """It is looked after in the background."""
    import pybpfthrottle

    unit = units.start()
    with pybpfthrottle.limit(unit=name_of(unit), upload="1M") as throttle:
        before = attached(unit)
        unit.remove()
        time.sleep(0.1)
        units.start(name_of(unit))
        eventually(lambda: attached(unit) == before, within_s=AT_ONCE_S)
        assert not throttle.vanished()
        assert [cgroup.path for cgroup in throttle.cgroups] == [unit.path]
    assert attached(unit) == ()
