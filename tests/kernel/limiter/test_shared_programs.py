"""Throttles of one process share programs: that makes them cheap, and nothing else is different."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from typing import Iterator, Sequence

import pytest
from lab import attached
from since import needs_release
from targets import eventually, target

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import features, pins, shared
from pybpfthrottle.backends.ebpf import registry as kernel
from pybpfthrottle.backends.ebpf import throttle as ebpf_throttle
from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.backends.ebpf.shared import Bank, Sharing
from pybpfthrottle.backends.protocol import Record
from pybpfthrottle.bpf import maps, programs
from pybpfthrottle.errors import ProgramLoadError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Process
from pybpfthrottle.model import Direction, Limits, Rate, ThrottleSpec, Traffic
from pybpfthrottle.model import Target as What
from pybpfthrottle.targets import Selection
from pybpfthrottle.throttle import Throttle

UPLOAD = Direction.UPLOAD
BOTH: Limits = dict.fromkeys(Direction, Rate.parse("1M"))
LOOPBACK = Traffic(loopback=True)
# All that a throttle has for itself; a whole one has twenty times as much.
MOST_BYTES = 5000
TEN_DATAGRAMS = """
import socket
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(10):
    try:
        own.sendto(bytes(100), ("127.0.0.1", 9))
    except ConnectionRefusedError:
        pass
"""


@pytest.fixture(autouse=True)
def sharing(monkeypatch: pytest.MonkeyPatch) -> Sharing:
    """As in a process that has no throttle yet."""
    if not features.DIRECT_PACKET_ACCESS.available():
        needs_release("5.1", str(features.DIRECT_PACKET_ACCESS.missing()))
    new = Sharing()
    for module in (shared, ebpf_throttle):
        monkeypatch.setattr(module, "sharing", new)
    return new


@contextmanager
def children(parent: Cgroup, count: int) -> Iterator[list[Cgroup]]:
    """So many cgroups in one."""
    with ExitStack() as stack:
        found = []
        for number in range(count):
            found.append(parent.create_child(str(number)))
            stack.callback(found[-1].remove, patience_s=5)
        yield found


@contextmanager
def limited(
    *cgroups: Cgroup, limits: Limits = BOTH, traffic: Traffic = LOOPBACK
) -> Iterator[list[Throttle]]:
    """A throttle for each."""
    with ExitStack() as stack:
        made = []
        for one in cgroups:
            made.append(throttle.apply([one], limits, traffic=traffic))
            stack.callback(made[-1].remove)
        yield made


def record_of(live: Throttle) -> Record:
    """What the kernel tells of it."""
    (found,) = (one for one in kernel.in_force() if one.id == live.id)
    return found


def banks(*throttles: Throttle) -> list[int]:
    """Which of them share their maps, by the id of one."""
    return [record_of(one).handles["maps"]["CGROUP_CONFIGS"] for one in throttles]


def own_bytes(cgroup: Cgroup) -> int:
    """The size of what is attached to a cgroup, as the kernel runs it."""
    return sum(programs.info_by_id(one).xlated_bytes for one in set(attached(cgroup, HOOKS)))


def send_from(cgroup: Cgroup) -> None:
    """Ten datagrams over the loopback device."""
    command = [sys.executable, "-c", TEN_DATAGRAMS]
    subprocess.run(command, preexec_fn=lambda: cgroup.move_in(0), check=True)


def packets(live: Throttle) -> int:
    """How many uploaded packets it has counted."""
    return live.counters()[UPLOAD].packets_total


def notice(throttles: Sequence[Throttle]) -> None:
    """Have their owner see what others have changed."""
    for live in throttles:
        for chore in live.chores():
            chore.run()


def is_there(map_id: int) -> bool:
    """Whether the kernel still has a map."""
    with suppress(OSError), maps.open_by_id(map_id):
        return True
    return False


def test_all_but_the_first_have_small_programs_of_their_own(scratch: Cgroup) -> None:
    """And nothing is left of what they have shared once the last one is gone."""
    with children(scratch, 3) as cgroups:
        with limited(*cgroups) as throttles:
            first, *further = map(own_bytes, cgroups)
            assert max(further) < MOST_BYTES < first
            alone, one, other = banks(*throttles)
            assert alone != one == other
        assert [attached(one, HOOKS) for one in cgroups] == [[]] * 3
    eventually(lambda: not is_there(one))


def test_each_counts_its_own_packets(scratch: Cgroup) -> None:
    """Though they are handled by the same program."""
    with children(scratch, 3) as cgroups, limited(*cgroups) as throttles:
        send_from(cgroups[2])
        assert [packets(one) for one in throttles] == [0, 0, 10]


def test_each_has_its_own_limit(scratch: Cgroup) -> None:
    """Another process changes and removes one, and the others stay as they are."""
    with children(scratch, 3) as cgroups, limited(*cgroups) as throttles:
        _, one, other = throttles
        with throttle.open_record(record_of(one)) as found:
            found.set_limit(UPLOAD, Rate.parse("8M"))
        notice(throttles)
        assert [live.limits[UPLOAD] for live in (one, other)] == [Rate.parse("8M"), BOTH[UPLOAD]]
        throttle.open_record(record_of(one)).remove()
        notice(throttles)
        assert [live.ended() for live in throttles] == ["", "removed", ""]
        assert attached(cgroups[1], HOOKS) == []
        assert attached(cgroups[2], HOOKS)
        send_from(cgroups[2])
        assert packets(other) == 10


def test_there_is_room_for_any_number(scratch: Cgroup) -> None:
    """The first programs are shared by few, and those that are loaded then by more."""
    with children(scratch, 12) as cgroups, limited(*cgroups) as throttles:
        assert len(set(banks(*throttles))) == 3
        send_from(cgroups[-1])
        assert [packets(one) for one in throttles] == [0] * 11 + [10]


def test_those_inside_each_other_share_nothing(scratch: Cgroup) -> None:
    """A packet is counted by each, and what is known of a connection is each one's own."""
    with children(scratch, 2) as cgroups, children(cgroups[1], 1) as (inner,):
        with limited(cgroups[0], cgroups[1], inner) as throttles:
            assert len(set(banks(*throttles))) == 3
            send_from(inner)
            assert [packets(one) for one in throttles] == [0, 10, 10]


def test_those_for_other_networks_share_nothing(scratch: Cgroup) -> None:
    """The networks are looked up in a map that is shared too."""
    with children(scratch, 3) as cgroups, limited(*cgroups[:2]) as throttles:
        local = Traffic(loopback=True, kind="local")
        with limited(cgroups[2], traffic=local) as (another,):
            assert len(set(banks(*throttles, another))) == 3
            send_from(cgroups[2])
            assert packets(another) == 10


def test_one_that_stays_shares_too(scratch: Cgroup) -> None:
    """What it is entered by is pinned, as it must work without the process that has made it."""
    with children(scratch, 2) as (one, kept), limited(one):
        spec = ThrottleSpec(What(cgroups=(kept.path,)), BOTH, kept=True)
        live = throttle.start(spec)
        try:
            assert record_of(live).handles["slot"] > 0
            [place] = pins.of(live.id)
            assert len(os.listdir(place)) > len(set(attached(kept, HOOKS)))
        finally:
            live.remove()


def test_what_others_have_removed_has_no_pins_again(scratch: Cgroup) -> None:
    """Its process may limit another cgroup before it notices, and does not undo the removal."""
    with children(scratch, 2) as (first, other):
        live = throttle.start(ThrottleSpec(What(cgroups=(first.path,)), BOTH, kept=True))
        try:
            with throttle.open_record(record_of(live)) as found:
                found.remove()
            assert not pins.of(live.id)
            live.add(other)
            assert not pins.of(live.id)
            assert live.ended() == "removed"
        finally:
            live.remove()


def test_processes_are_limited_by_shared_programs_too(scratch: Cgroup) -> None:
    """Their sockets of before and later ones, and nobody else's."""
    with children(scratch, 2) as (first, other), limited(first):
        with target(other) as own, target(other) as another:
            before = own.do("make(AF_INET, SOCK_DGRAM)")
            selection = Selection((Process(own.pid),))
            live = throttle.apply([], BOTH, traffic=LOOPBACK, processes=selection)
            try:
                assert record_of(live).handles["slot"] > 0
                after = own.do("make(AF_INET, SOCK_DGRAM)")
                elsewhere = another.do("make(AF_INET, SOCK_DGRAM)")
                for one, number in ((own, before), (own, after), (another, elsewhere)):
                    one.do(f"socket.socket(fileno={number}).sendto(b'', ('127.0.0.1', 9)) and 0")
                assert packets(live) == 2
            finally:
                live.remove()


def test_what_the_kernel_refuses_is_not_shared(
    scratch: Cgroup, sharing: Sharing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then each has all for itself, as on older kernels."""

    def refuse(*_: object) -> None:
        raise ProgramLoadError("no", errno=22)

    monkeypatch.setattr(Bank, "load", refuse)
    with children(scratch, 3) as cgroups, limited(*cgroups) as throttles:
        assert len(set(banks(*throttles))) == 3
        assert [record_of(one).handles["slot"] for one in throttles] == [0, 0, 0]
        assert sharing.refused == "no"
        send_from(cgroups[2])
        assert packets(throttles[2]) == 10


def test_other_networks_do_not_make_programs_larger(scratch: Cgroup) -> None:
    """The room that is allocated grows with the throttles that share it, and with no others."""
    with children(scratch, 4) as cgroups, limited(cgroups[0]), ExitStack() as stack:
        for number, each in enumerate(cgroups[1:]):
            local = Traffic(loopback=True, to=(f"192.0.2.{number}",))
            stack.enter_context(limited(each, traffic=local))
        assert [bank.slots for bank in shared.sharing._banks] == [shared._FIRST] * 3
