"""Packets that come in for a cgroup take a longer way, and nothing else is different."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from echo import PORT, Far, Near
from lab import ENVIRONMENT, attached
from since import needs_command
from targets import PATIENCE_S, eventually, live_map

import pybpfthrottle
from pybpfthrottle import diversion, traffic
from pybpfthrottle.backends.ebpf.marks import MARKS
from pybpfthrottle.bpf import links
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.conditions.model import Impairment, Injected, Loss
from pybpfthrottle.demo.wire import DEVICE, Wire
from pybpfthrottle.diversion import keeping
from pybpfthrottle.diversion.impairing import Impairing
from pybpfthrottle.diversion.records import DivertBounds
from pybpfthrottle.linux import cgroup, netns, process
from pybpfthrottle.linux.cgroup import Cgroup

pytestmark = pytest.mark.since("5.10")

# Far more than a machine takes by itself, and far less than a busy one may add.
DELAY_S = 0.1


def numbers(
    wire: Wire, near: Near, scratch: Cgroup, wanted: Impairment, count: int, most: int
) -> tuple[list[int], Injected]:
    """Which of so many numbered datagrams arrive, ``most`` of them, and what was counted.

    Where the keeper does not get the CPU for too long some pass: then chance meets others, and
    this is done once more.
    """
    for _ in range(5):
        with diversion.open(scratch, wanted) as impaired:
            near.ask("send", wire.server.address, PORT, count, 100)
            found = near.ask("receive", 1 + 2 * wanted.delay_s, most)[0]
            eventually(lambda: _is_over(impaired.counts(), count))
            counts = impaired.counts()
        if not counts.passed_undelayed:
            break
    return found, counts


def _is_over(counts: Injected, count: int) -> bool:
    is_seen = counts.seen + counts.passed_undelayed == count
    return is_seen and counts.delivered + counts.lost == count + counts.duplicated


@pytest.mark.parametrize("kind", ["tcp", "udp", "unconnected"])
@pytest.mark.parametrize("version", [4, 6])
def test_a_round_trip_takes_the_delay_longer(
    wire: Wire, near: Near, scratch: Cgroup, kind: str, version: int
) -> None:
    """TCP and UDP, IPv4 and IPv6, and as it was at the end."""
    host = wire.server.address if version == 4 else wire.server.address6
    with diversion.open(scratch, Impairment(delay_s=DELAY_S)) as late:
        times_s = near.ask("ping", host, PORT, kind, 5)
        assert min(times_s) >= DELAY_S
        assert min(times_s) < 2 * DELAY_S
        eventually(lambda: late.counts().delivered >= 5)
        counts = late.counts()
    assert counts.seen >= counts.delivered  # the end of a connection may be on its way
    assert counts.delay_p50_s == pytest.approx(DELAY_S, rel=0.3)
    assert min(near.ask("ping", host, PORT, kind, 5)) < DELAY_S


def test_others_are_not_delayed(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """A process beside it in the same namespace, which is in no such cgroup."""
    other = Near(wire.client.inside)
    try:
        with diversion.open(scratch, Impairment(delay_s=1)):
            assert max(other.ask("ping", wire.server.address, PORT, "udp", 20)) < 1
    finally:
        other.end()


def test_order_is_kept(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """A jitter does not change it, unless that is asked for."""
    wanted = Impairment(delay_s=0.1, jitter_s=0.1)
    found, counts = numbers(wire, near, scratch, wanted, 300, 300)
    assert (found, counts.late_dropped) == (list(range(300)), 0)


@pytest.mark.parametrize("loss", [Loss.chance(0.1), Loss.burst(0.1, 4), Loss.every(7)])
def test_the_same_packets_are_lost_with_the_same_seed(
    wire: Wire, near: Near, scratch: Cgroup, loss: Loss
) -> None:
    """Those that the seed chooses, and no others."""
    wanted = Impairment(loss=loss, seed=random.randrange(1 << 64))
    impairing = Impairing(wanted)
    passing = [number for number in range(400) if impairing.decide(0).copies]
    found, counts = numbers(wire, near, scratch, wanted, 400, len(passing))
    assert found == passing
    assert (counts.seen, counts.lost) == (400, 400 - len(passing))


@pytest.mark.parametrize(
    "wanted",
    [
        Impairment(delay_s=0.02),
        Impairment(delay_s=0.02, loss=Loss.chance(0.005), duplicate=0.02, reorder=0.02),
        Impairment(delay_s=0.02, jitter_s=0.01, keep_order=False, corrupt=0.005),
    ],
)
@pytest.mark.parametrize("version", [4, 6])
def test_a_transfer_arrives_whole(
    wire: Wire, near: Near, scratch: Cgroup, wanted: Impairment, version: int
) -> None:
    """TCP makes up for all that may happen to packets of any size."""
    host = wire.server.address if version == 4 else wire.server.address6
    with diversion.open(scratch, wanted) as impaired:
        assert near.ask("bulk", host, PORT, 1_000_000)
        counts = impaired.counts()
    assert counts.delivered > 500
    assert (counts.lost > 0, counts.duplicated > 0, counts.reordered > 0, counts.corrupted > 0) == (
        *(bool(wanted.loss), bool(wanted.duplicate)),
        *(bool(wanted.reorder), bool(wanted.corrupt)),
    )
    assert counts.late_dropped == 0


def test_packets_come_twice_early_and_damaged(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """Those that the seed chooses; the kernel drops the damaged ones."""
    wanted = Impairment(delay_s=0.2, duplicate=0.1, reorder=0.1, corrupt=0.1, seed=3)
    impairing = Impairing(wanted)
    fates = [impairing.decide(0) for _ in range(200)]
    expected = [
        number
        for number, fate in enumerate(fates)
        for _ in range(fate.copies)
        if not fate.is_damaged
    ]
    found, counts = numbers(wire, near, scratch, wanted, 200, len(expected))
    assert sorted(found) == expected
    assert found != expected
    assert counts.corrupted == sum(fate.is_damaged for fate in fates)
    assert counts.duplicated == sum(fate.copies == 2 for fate in fates)
    assert counts.reordered == sum(fate.is_early for fate in fates)


def test_a_change_applies_to_what_comes_next(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """And what is on its way is not overtaken."""
    with diversion.open(scratch, Impairment(delay_s=1)) as late:
        near.ask("send", wire.server.address, PORT, 3, 100)
        eventually(lambda: late.counts().seen == 3)
        late.change(Impairment(delay_s=0.01))
        assert late.impairment == Impairment(delay_s=0.01)
        assert near.ask("receive", 5, 3)[0] == [0, 1, 2]
        assert min(near.ask("ping", wire.server.address, PORT, "udp", 5)) < 0.5


def test_what_is_held_is_given_back_at_the_end(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """At once and in order; nothing is lost."""
    with diversion.open(scratch, Impairment(delay_s=60)) as late:
        near.ask("send", wire.server.address, PORT, 50, 100)
        eventually(lambda: late.counts().seen == 50)
        assert late.counts().delivered == 0
    assert near.ask("receive", 5, 50)[0] == list(range(50))


def test_two_on_one_socket_add_up(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """Of a cgroup and of one above it, in one process."""
    below = scratch.create_child("below")
    try:
        below.move_in(near.process.pid)
        with diversion.open(scratch, Impairment(delay_s=0.1)) as outer:
            with diversion.open(below, Impairment(delay_s=0.15)) as inner:
                times_s = near.ask("ping", wire.server.address, PORT, "udp", 4)
                assert 0.25 <= min(times_s) < 0.5
                assert outer.counts().seen == inner.counts().seen == 4
    finally:
        near.end()
        below.remove(patience_s=5)


def keeper_of(process_id: int) -> int:
    """The keeper of a process's diversions."""
    found = [
        pid
        for pid in process.families().get(process_id, ())
        if Path(f"/proc/{pid}/comm").read_text().strip() == "pybpfd-keeper"
    ]
    assert len(found) == 1
    return found[0]


def devices(wire: Wire) -> list[str]:
    """Our devices in the near namespace."""
    return [
        name
        for name in netns.interfaces(wire.client.process.pid).names.values()
        if name.startswith("pybpfd")
    ]


def test_packets_pass_a_keeper_that_was_stopped(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """Undelayed, as soon as one waits too long; what is far too late is dropped."""
    with diversion.open(scratch, Impairment(delay_s=0.2)) as late:
        near.ask("ping", wire.server.address, PORT, "udp", 1)
        pid = keeper_of(os.getpid())
        os.kill(pid, signal.SIGSTOP)
        try:
            near.ask("send", wire.server.address, PORT, 1, 100)
            eventually(lambda: late._state[0].taken == 2)
            time.sleep(DivertBounds.DIVERT_STALE_NS / 1e9)
            assert max(near.ask("ping", wire.server.address, PORT, "udp", 3)) < 0.2
            time.sleep(1.3)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert late.counts().passed_undelayed == 3
        eventually(lambda: late.counts().too_late == late.counts().late_dropped == 1)
        assert min(near.ask("ping", wire.server.address, PORT, "udp", 3)) >= 0.2


@pytest.mark.parametrize("how", ["del", "set down"])
def test_a_device_that_somebody_removes_is_made_anew(
    wire: Wire, near: Near, scratch: Cgroup, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """What was to come back by it is counted; its keeper lives on, and delays what comes then."""
    with diversion.open(scratch, Impairment(delay_s=DELAY_S)) as late:
        near.ask("ping", wire.server.address, PORT, "udp", 1)
        first, (name,) = keeper_of(os.getpid()), devices(wire)
        verb, *more = how.split()
        subprocess.run(wire.client.inside("ip", "link", verb, name, *more), check=True)
        near.ask("send", wire.server.address, PORT, 3, 100)
        eventually(lambda: late.counts().refused == 3)
        late._keeper.wait_until(lambda: "there is a new one" in caplog.text, PATIENCE_S)
        eventually(lambda: min(near.ask("ping", wire.server.address, PORT, "udp", 3)) >= DELAY_S)
        assert late.counts().late_dropped == 3
        assert len(devices(wire)) == 1
        assert keeper_of(os.getpid()) == first
    assert not devices(wire)


def test_a_keeper_that_was_killed_is_replaced(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """Until then, packets pass undelayed, and nothing of it is there."""
    with diversion.open(scratch, Impairment(delay_s=0.3)) as late:
        first = keeper_of(os.getpid())
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not devices(wire))
        assert attached(scratch) == []
        assert max(near.ask("ping", wire.server.address, PORT, "udp", 3)) < 0.3
        (chore,) = late.chores()
        chore.run()
        eventually(lambda: near.ask("ping", wire.server.address, PORT, "udp", 1)[0] >= 0.3)
        assert keeper_of(os.getpid()) != first
        assert not late.problems()
    assert not devices(wire)


OWNER = """
import sys, time
from pybpfthrottle import diversion, traffic
from pybpfthrottle.conditions.model import Impairment
from pybpfthrottle.linux.cgroup import Cgroup
late = diversion.open(Cgroup(sys.argv[1]), Impairment(delay_s=60))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("dies", ["owner", "keeper"])
def test_nothing_is_left_after_a_kill(wire: Wire, near: Near, scratch: Cgroup, dies: str) -> None:
    """No program, no device, no process; an owner's keeper gives back what it holds."""
    command = [sys.executable, "-c", OWNER, scratch.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as owner:
        try:
            assert owner.stdout
            assert owner.stdout.readline() == b"ready\n"
            near.ask("send", wire.server.address, PORT, 5, 100)
            keeper = keeper_of(owner.pid)
            assert devices(wire)
            os.kill(owner.pid if dies == "owner" else keeper, signal.SIGKILL)
            eventually(lambda: not devices(wire))
            assert attached(scratch) == []
        finally:
            owner.kill()
    eventually(lambda: process.has_ended(keeper))
    if dies == "owner":
        assert near.ask("receive", 5, 5)[0] == list(range(5))


def test_before_tcx_the_device_has_a_filter(
    wire: Wire, near: Near, scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux 6.6 brought tcx."""
    create_link = links.create_link

    def create_older_link(program: Program, target: int, attach_type: AttachType) -> Link:
        if attach_type is AttachType.TCX_INGRESS:
            raise OSError(errno.EINVAL, "not known")
        return create_link(program, target, attach_type)

    monkeypatch.setattr(links, "create_link", create_older_link)
    with diversion.open(scratch, Impairment(delay_s=0.1)):
        assert min(near.ask("ping", wire.server.address, PORT, "tcp", 3)) >= 0.1
    assert not devices(wire)


def test_loopback_passes_unless_it_is_asked_for(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """Then its settings are changed for the time being."""
    far = Far(wire.client.inside)
    directory = "/proc/sys/net/ipv4/conf/lo"
    asked = wire.client.inside("cat", f"{directory}/accept_local", f"{directory}/route_localnet")
    try:
        with diversion.open(scratch, Impairment(delay_s=0.3)):
            assert max(near.ask("ping", "127.0.0.1", PORT, "udp", 3)) < 0.3
        with diversion.open(scratch, Impairment(delay_s=0.3), loopback=True):
            assert subprocess.check_output(asked).split() == [b"1", b"1"]
            for host in ("127.0.0.1", "::1", wire.client.address):
                for kind in ("tcp", "udp"):
                    assert min(near.ask("ping", host, PORT, kind, 1)) >= 0.3
            # Another one needs the same, and goes before this one does.
            with diversion.open(scratch, Impairment(delay_s=0.1), loopback=True):
                assert min(near.ask("ping", "127.0.0.1", PORT, "udp", 1)) >= 0.4
            assert min(near.ask("ping", "127.0.0.1", PORT, "udp", 1)) >= 0.3
        assert subprocess.check_output(asked).split() == [b"0", b"0"]
    finally:
        far.end()


def test_a_socket_that_is_bound_to_a_device(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """Its packets come back by that one; link-local addresses are of one too."""
    with diversion.open(scratch, Impairment(delay_s=0.1)):
        for kind in ("tcp", "udp"):
            times_s = near.ask("ping", wire.server.address, PORT, kind, 2, DEVICE)
            assert min(times_s) >= 0.1


@pytest.mark.parametrize("kind", ["tcp", "udp", "unconnected"])
@pytest.mark.parametrize("version", [4, 6])
def test_translated_packets(
    wire: Wire, near: Near, scratch: Cgroup, kind: str, version: int
) -> None:
    """With another source and port on the wire, the answer is given back as it came."""
    family, host = ("ip", wire.server.address) if version == 4 else ("ip6", wire.server.address6)
    near_host = wire.client.address if version == 4 else f"[{wire.client.address6}]"
    needs_command("nft")
    rules = (
        f"add table {family} shift; add chain {family} shift out"
        " { type nat hook postrouting priority srcnat; };"
        f" add rule {family} shift out meta l4proto {{ tcp, udp }} snat to {near_host}:40000-40999;"
        f" add table {family} strict; add chain {family} strict in"
        " { type filter hook input priority filter; };"
        f" add rule {family} strict in meta l4proto {{ tcp, udp }} ct state != established drop"
    )
    subprocess.run(wire.client.inside("nft", rules), check=True)
    try:
        with diversion.open(scratch, Impairment(delay_s=0.1)):
            assert min(near.ask("ping", host, PORT, kind, 3)) >= 0.1
    finally:
        for table in ("shift", "strict"):
            subprocess.run(wire.client.inside("nft", f"delete table {family} {table}"), check=True)


def test_a_namespace_that_appears_later_is_served(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """As soon as a packet comes in there."""
    near.end()  # so that nothing of that namespace is known
    with diversion.open(scratch, Impairment(delay_s=0.3)) as late:
        assert not devices(wire)
        later = Near(wire.client.inside)
        try:
            scratch.move_in(later.process.pid)
            assert min(later.ask("ping", wire.server.address, PORT, "udp", 1)) < 0.3
            eventually(lambda: late.counts().passed_undelayed and devices(wire))
            eventually(lambda: later.ask("ping", wire.server.address, PORT, "udp", 1)[0] >= 0.3)
        finally:
            later.end()


def taps_of(pid: int) -> int:
    """How many of our devices a keeper has."""
    found = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it was closed meanwhile
            found += os.readlink(fd) == "/dev/net/tun"
    return found


def test_a_namespace_that_nobody_is_in_is_given_up(
    near: Near, scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper's device would keep it there, and there is room for so many only."""
    monkeypatch.setattr(keeping, "_FORGET_S", 0.1)
    with diversion.open(scratch, Impairment(delay_s=0.1)) as late, Wire() as other:
        passing = Near(other.client.inside)
        scratch.move_in(passing.process.pid)
        (keeper,) = late.chores()
        inode = netns.number(passing.process.pid)
        keeper._serve_network(inode)
        keeper.run()
        assert inode in keeper._served()
        eventually(lambda: taps_of(keeper.pid) == 2)
        passing.end()
        other.close()
        eventually(lambda: [keeper.run(), inode not in keeper._served()][1])
        eventually(lambda: taps_of(keeper.pid) == 1)


def test_only_the_packets_of_marked_sockets_are_late(
    wire: Wire, near: Near, scratch: Cgroup
) -> None:
    """Beside a limit on a process, whose marks they are."""
    host = wire.server.address
    other = Near(wire.client.inside)
    scratch.move_in(other.process.pid)
    try:
        wanted = Impairment(delay_s=0.2)
        pids = [near.process.pid]
        with pybpfthrottle.limit(pid=pids[0], download="10M"), live_map(MARKS) as marks:
            with diversion.open(cgroup.root(), wanted, marks=marks, pids=lambda: pids):
                for kind in ("tcp", "udp"):
                    assert min(near.ask("ping", host, PORT, kind, 2)) >= 0.2
                    assert min(other.ask("ping", host, PORT, kind, 2)) < 0.2
    finally:
        other.end()


def test_what_comes_late_is_counted_once(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """By whoever counts the traffic of processes, and began before or after."""
    late = Impairment(delay_s=0.05)
    with traffic.watch() as before, diversion.open(scratch, late), traffic.watch() as after:
        assert min(near.ask("ping", wire.server.address, PORT, "udp", 5)) >= 0.05
        for watch in (before, after):
            usage = watch.of(near.process.pid).usage(*traffic.Scope)
            assert (usage.upload_packets, usage.download_packets) == (5, 5)
