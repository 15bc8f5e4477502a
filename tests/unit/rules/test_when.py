"""Under which circumstances a rule is in force."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from pybpfthrottle.errors import SettingsError
from pybpfthrottle.linux.network_manager import Networks
from pybpfthrottle.rules.when import Condition, ThisMachine, parse


class Laptop:
    """A machine whose circumstances are made up."""

    def __init__(self, **known):
        self.known = known

    def metered(self):
        """Whether data costs money."""
        return self.known.get("metered")

    def networks(self):
        """What it is connected to."""
        return frozenset(self.known.get("networks", ()))

    def interfaces(self):
        """What leads out."""
        return frozenset(self.known.get("interfaces", ()))

    def on_battery(self):
        """Whether nothing is plugged in."""
        return self.known.get("on_battery")

    def runs(self, program):
        """Whether a program runs."""
        return program in self.known.get("programs", ())


@pytest.mark.parametrize(
    ("when", "known", "holds"),
    [
        ({"metered": True}, {"metered": True}, True),
        ({"metered": True}, {"metered": False}, False),
        ({"metered": False}, {"metered": False}, True),
        ({"metered": False}, {}, False),  # it is not known
        ({"on_battery": False}, {"on_battery": False}, True),
        ({"on_battery": True}, {}, False),
        ({"network": "Office"}, {"networks": ["Office", "VPN"]}, True),
        ({"network": ["Home", "VPN"]}, {"networks": ["Office", "VPN"]}, True),
        ({"network": "office"}, {"networks": ["Office"]}, False),
        ({"interface": "wlan0"}, {"interfaces": ["wlan0"]}, True),
        ({"interface": "eth0"}, {"interfaces": ["wlan0"]}, False),
        ({"running": ["teams", "zoom"]}, {"programs": ["zoom"]}, True),
        ({"running": "zoom"}, {}, False),
        ({"metered": True, "running": "zoom"}, {"metered": True}, False),
        ({"metered": True, "running": "zoom"}, {"metered": True, "programs": ["zoom"]}, True),
    ],
)
def test_all_of_it_must_hold(when, known, holds):
    """Of a list one suffices; what is not known does not hold, whichever way it is asked."""
    assert parse(when).holds(Laptop(**known)) is holds


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("metered", "when is 'metered': write"),
        ({}, "known: metered, on_battery"),
        ({"metered": "yes"}, "metered of when is 'yes': write true or false"),
        ({"on_battery": 1}, "on_battery of when is 1: write true or false"),
        ({"network": 5}, "network of when is 5: write a name, or a list of names"),
        ({"network": []}, "write a name"),
        ({"running": ["zoom", ""]}, "write a name"),
        ({"battery": True}, "unknown key battery in when; known: metered"),
    ],
)
def test_a_mistake_is_told_in_one_line(value, complaint):
    """With what is allowed."""
    with pytest.raises(SettingsError, match=complaint) as raised:
        parse(value)
    assert "\n" not in str(raised.value)


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.now_s = 100.0

    def read(self):
        """Return the time."""
        return self.now_s


def test_answers_are_kept_for_a_while():
    """NetworkManager is asked once for both of its answers, and again some seconds later."""
    asked = []
    clock = Clock()

    def networks():
        asked.append(clock.now_s)
        return Networks(frozenset({"Office"}), len(asked) == 1)

    machine = ThisMachine(networks=networks, clock=clock.read)
    both = Condition(metered=True, network=("Office",))
    assert [both.holds(machine), both.holds(machine)] == [True, True]
    clock.now_s += 60
    assert not both.holds(machine)
    assert asked == [100.0, 160.0]


def test_only_what_is_in_the_condition_is_asked():
    """A machine without NetworkManager gets no note about it if no rule asks."""

    def fail():
        raise AssertionError

    machine = ThisMachine(networks=fail, on_battery=lambda: True, interfaces=fail)
    assert parse({"on_battery": True}).holds(machine)
    assert machine.notes() == []


def test_what_cannot_be_known_is_noted_once():
    """The first note says what does not hold, and why."""
    clock = Clock()

    def networks():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    machine = ThisMachine(networks=networks, on_battery=lambda: None, clock=clock.read)
    for _ in range(3):
        assert not parse({"metered": False}).holds(machine)
        assert not parse({"network": "Office"}).holds(machine)
        assert not parse({"on_battery": False}).holds(machine)
        clock.now_s += 60
    unknown = "NetworkManager cannot be asked (No such file or directory)"
    assert machine.notes() == [
        f"metered and network do not hold: {unknown}",
        "on_battery does not hold: the kernel tells nothing of the power",
    ]


def test_a_running_program_is_found_by_name_and_by_path(tmp_path):
    """And is no longer when it has ended, nor before it is installed."""
    clock = Clock()
    machine = ThisMachine(clock=clock.read)
    program = tmp_path / "zoom-of-a-test"
    for name in (program.name, str(program)):
        assert not machine.runs(name)
    program.symlink_to(os.path.realpath(sys.executable))
    by_path = str(program)
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [program, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        clock.now_s += 60
        assert machine.runs(program.name)
        assert machine.runs(by_path)
        clock.now_s += 60
        assert machine.runs(program.name)
        process.stdin.close()
    clock.now_s += 60
    assert not machine.runs(program.name)


def test_this_machine_answers_by_itself():
    """Without anything that is made up: it may have no NetworkManager, but a way out or none."""
    machine = ThisMachine()
    assert machine.on_battery() in (True, False, None)
    assert all(isinstance(name, str) for name in machine.interfaces() | machine.networks())
    assert machine.metered() in (True, False, None)
