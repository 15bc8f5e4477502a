"""Which process the kernel's counts are for, without a kernel; and the rows of top."""

from __future__ import annotations

from dataclasses import replace
from typing import Iterable, Optional

import pytest

from pybpfthrottle import traffic
from pybpfthrottle.backends.ebpf.accounting import Creator, Move
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.inforce import Cover
from pybpfthrottle.linux import netns
from pybpfthrottle.traffic import ProcessTraffic, Scope, Usage
from pybpfthrottle.usage import Interval


class Counts:
    """What the kernel would have counted: download bytes by process, all from the internet."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}
        self.interface = 2
        self.addresses: dict[tuple[int, int, int, bytes], tuple[int, ...]] = {}
        self.moves: list[Move] = []
        self.counts_remotes = False
        self.forgotten: list[int] = []

    def begin(self) -> None:
        """As Accounting.begin."""

    def counts(self):
        """As Accounting.counts."""
        return [
            (pid, Scope.INTERNET, self.interface, (1, count, 0, 0))
            for pid, count in self.found.items()
        ]

    def remotes(self):
        """As Accounting.remotes."""
        return [(*key, sums) for key, sums in self.addresses.items()]

    def creator(self, pid: int) -> Optional[Creator]:
        """As Accounting.creator."""
        return Creator("born", 1, 0)

    def forget(self, pid: int, places: Iterable[tuple[int, int]]) -> None:
        """As Accounting.forget."""
        self.forgotten.append(pid)
        del self.found[pid]

    def forget_remotes(self, pid: int, remotes: Iterable[tuple[int, int, bytes]]) -> None:
        """As Accounting.forget_remotes."""
        for remote in remotes:
            self.addresses.pop((pid, *remote), None)

    def scan(self, pids: Iterable[int]):
        """As Accounting.scan."""
        moves, self.moves = self.moves, []
        return moves

    def close(self) -> None:
        """As Accounting.close."""


class Lives:
    """A process that is alive until it is told otherwise."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lives = True

    def alive(self) -> bool:
        """As Process.alive."""
        return self.lives


@pytest.fixture
def world(monkeypatch):
    """Counts, and the processes that there are by their ids."""
    counts, alive = Counts(), {}
    monkeypatch.setattr(traffic, "Accounting", lambda **_: counts)
    monkeypatch.setattr(traffic.process, "running", lambda: [p for p in alive if alive[p].lives])
    monkeypatch.setattr(
        traffic, "_process", lambda pid: alive[pid] if pid in alive and alive[pid].lives else None
    )
    monkeypatch.setattr(traffic.process, "instance", lambda pid: id(alive.get(pid)))
    monkeypatch.setattr(traffic.process, "name_of", lambda pid: alive[pid].name)
    monkeypatch.setattr(traffic.process, "user_of", lambda pid: 0)
    monkeypatch.setattr(traffic.process, "in_first_namespace", lambda: True)
    monkeypatch.setattr(traffic._Cgroups, "of", lambda self, pid: "/sys/fs/cgroup/one")
    monkeypatch.setattr(traffic.netns, "number", lambda pid: 1)
    interfaces = netns.Interfaces(cookie=9, names={1: "lo", 2: "eth0", 3: "eth1"})
    monkeypatch.setattr(traffic.netns, "interfaces", lambda pid: interfaces)
    return counts, alive


def bytes_of(watch: traffic.Watch) -> list[tuple[Optional[int], str, int]]:
    """What each process has received, in order."""
    return [(one.pid, one.name, one.download_bytes) for one in watch.snapshot()]


def test_a_process_that_ended_before_it_was_met_has_its_creators_name(world) -> None:
    """The kernel remembers who has created a socket."""
    counts, _ = world
    with traffic.watch() as watch:
        counts.found[7] = 100
        assert bytes_of(watch) == [(7, "born", 100), (None, "unknown", 0)]


def test_a_number_that_is_used_again_is_another_process(world) -> None:
    """Each has what was counted while it ran."""
    counts, alive = world
    alive[7] = Lives("first")
    with traffic.watch() as watch:
        counts.found[7] = 100
        watch.refresh()
        alive[7].lives = False
        watch.refresh()  # the kernel uses all other numbers before
        alive[7] = Lives("second")
        counts.found[7] = 130
        assert bytes_of(watch) == [(7, "first", 100), (7, "second", 30), (None, "unknown", 0)]
        assert watch.of(7).download_bytes == 30


def test_what_the_kernel_forgets_is_not_lost(world, monkeypatch) -> None:
    """A process that has ended long ago makes room, and keeps its bytes."""
    counts, alive = world
    alive[7] = Lives("first")
    with traffic.watch() as watch:
        counts.found[7] = 100
        watch.refresh()
        alive[7].lives = False
        monkeypatch.setattr(traffic, "_LINGER_S", -1.0)
        watch.refresh()
        assert counts.forgotten == [7]
        assert bytes_of(watch) == [(7, "first", 100), (None, "unknown", 0)]
        counts.found[7] = 5  # a last segment
        monkeypatch.setattr(traffic, "_LINGER_S", 60.0)
        assert sum(count for *_, count in bytes_of(watch)) == 105


def test_what_comes_late_is_still_its_process_s(world, monkeypatch) -> None:
    """After the kernel was told to forget who has created the socket."""
    counts, alive = world
    alive[7] = Lives("first")
    counts.found[7] = 100
    with traffic.watch() as watch:
        watch.refresh()
        alive[7].lives = False
        monkeypatch.setattr(traffic, "_LINGER_S", -1.0)
        monkeypatch.setattr(counts, "creator", lambda pid: None)
        watch.refresh()
        monkeypatch.setattr(traffic, "_LINGER_S", 60.0)
        counts.found[7] = 5
        assert bytes_of(watch) == [(7, "first", 105), (None, "unknown", 0)]


def test_what_has_ended_long_ago_is_added_up(world, monkeypatch) -> None:
    """However many processes have ended, none of their bytes is lost."""
    counts, alive = world
    monkeypatch.setattr(traffic, "_LINGER_S", -1.0)
    monkeypatch.setattr(traffic, "_MOST_ENDED", 2)
    with traffic.watch() as watch:
        for pid in range(10, 20):
            alive[pid] = Lives("short" if pid % 2 else "other")
            counts.found[pid] = pid
            watch.refresh()
            alive[pid].lives = False
            watch.refresh()
        told = watch.snapshot()
    assert [(one.name, one.processes, one.download_bytes) for one in told] == [
        ("other", 4, 10 + 12 + 14 + 16),
        ("short", 4, 11 + 13 + 15 + 17),
        ("other", 1, 18),
        ("short", 1, 19),
        ("unknown", 1, 0),
    ]


def test_what_nobody_owns_is_a_line_of_its_own(world) -> None:
    """The sum is that of all packets."""
    counts, _ = world
    with traffic.watch() as watch:
        counts.found[0] = 40
        assert bytes_of(watch) == [(None, "unknown", 40)]


def test_what_another_process_was_charged_for_is_moved(world) -> None:
    """A worker gets what its master's listener was charged for; the sum stays."""
    counts, alive = world
    alive[7], alive[8] = Lives("master"), Lives("worker")
    with traffic.watch() as watch:
        counts.found[7] = 100
        counts.moves = [Move(7, 8, Scope.INTERNET, 2, bytes(16), (1, 90, 0, 0))]
        watch.due_s = 0.0
        assert sorted(bytes_of(watch)[:2]) == [(7, "master", 10), (8, "worker", 90)]
        counts.moves = [Move(0, 8, Scope.INTERNET, 2, bytes(16), (0, 5, 0, 0))]
        watch.due_s = 0.0
        counts.found[0] = 5
        assert sorted(bytes_of(watch)[:2]) == [(7, "master", 10), (8, "worker", 95)]
        assert bytes_of(watch)[2] == (None, "unknown", 0)


def test_an_interface_has_the_name_of_its_namespace(world) -> None:
    """Or a number, if it has none there; others can be left out."""
    counts, alive = world
    alive[7] = Lives("one")
    counts.found[7] = 100
    with traffic.watch() as watch:
        assert watch.of(7).by_interface == {"eth0": {Scope.INTERNET: (1, 100, 0, 0)}}
    with traffic.watch(interfaces=["eth1"]) as watch:
        assert watch.of(7).download_bytes == 0
    counts.interface = 44
    with traffic.watch() as watch:
        assert [*watch.of(7).by_interface] == ["#44"]


def test_an_interface_of_nobody_is_an_error(world) -> None:
    """Rather than no traffic."""
    with pytest.raises(ThrottleError, match="no network interface 'etho'"):
        traffic.watch(interfaces=["etho"])


def test_the_interface_of_a_short_process_is_that_of_its_namespace(world, monkeypatch) -> None:
    """Where a process was met before; it has ended before it was met."""
    counts, _ = world
    counts.found[7] = 100
    born = Creator("born", 1, 0, namespace=9)
    monkeypatch.setattr(counts, "creator", lambda pid: born)
    with traffic.watch() as watch:
        assert [*watch.of(7).by_interface] == ["eth0"]
        born = born._replace(namespace=10)
        counts.found[8] = 50
        assert [*watch.of(8).by_interface] == ["#2"]


HERE = (7, Scope.INTERNET, 2)
ONE, TWO = bytes(10) + b"\xff\xff\xc0\x00\x02\x01", b"\x20\x01" + bytes(13) + b"\x01"


@pytest.fixture
def remotes(world):
    """Counts of a process by remote address, and what a watch tells of them."""
    counts, alive = world
    alive[7] = Lives("one")
    counts.counts_remotes = True
    with traffic.watch(remotes=True) as watch:
        yield (
            counts,
            lambda: {
                address: usage[Scope.INTERNET].download_bytes
                for address, usage in watch.of(7).by_remote.items()
            },
        )


def test_remote_addresses_are_told_as_text(remotes) -> None:
    """Of both versions."""
    counts, told = remotes
    counts.found[7] = 100
    counts.addresses = {(*HERE, ONE): (1, 60, 0, 0), (*HERE, TWO): (1, 40, 0, 0)}
    assert told() == {"192.0.2.1": 60, "2001::1": 40}


def test_what_the_kernel_forgets_of_a_remote_address_is_kept(remotes) -> None:
    """As far as it was seen; the rest is a line of its own, so that the sum is that of all."""
    counts, told = remotes
    counts.found[7] = 100
    counts.addresses = {(*HERE, ONE): (5, 60, 0, 0)}
    assert told() == {"192.0.2.1": 60, "other": 40}
    counts.addresses = {}
    assert told() == {"192.0.2.1": 60, "other": 40}
    counts.found[7] = 120
    counts.addresses = {(*HERE, ONE): (1, 10, 0, 0)}
    assert told() == {"192.0.2.1": 70, "other": 50}


def test_so_many_addresses_are_kept(remotes, monkeypatch) -> None:
    """And no more: what was first is among the rest."""
    counts, told = remotes
    monkeypatch.setattr(traffic, "_MOST_REMOTES", 1)
    counts.found[7] = 100
    counts.addresses = {(*HERE, ONE): (1, 60, 0, 0), (*HERE, TWO): (1, 40, 0, 0)}
    assert told() == {"2001::1": 40, "other": 60}


def test_process_ids_of_a_container_are_not_the_kernels(monkeypatch) -> None:
    """To count by them would blame others."""
    monkeypatch.setattr(traffic.process, "in_first_namespace", lambda: False)
    with pytest.raises(ThrottleError, match="pid namespace"):
        traffic.watch()


def one(pid: int, name: str, count: int, *, user: int = 0) -> ProcessTraffic:
    """A process that has received so much from the internet."""
    usage = {Scope.INTERNET: Usage(1, count, 0, 0), Scope.LOOPBACK: Usage(1, 7, 1, 7)}
    return ProcessTraffic(pid, pid, name, user, "/c", True, usage)


@pytest.fixture
def rows():
    """Makes the rows of an interval of two seconds."""

    def make(*found: ProcessTraffic, before: Iterable[ProcessTraffic] = (), **options):
        return Interval(list(before), found, 2.0, Cover([])).rows(**options)

    return make


def test_a_rate_is_of_the_interval(rows) -> None:
    """Not of the time since the watch began; the busiest comes first."""
    found = rows(one(1, "a", 1000), one(2, "b", 900), before=[one(1, "a", 1000), one(2, "b", 100)])
    assert [(row.members[0].name, row.down, row.total.download_bytes) for row in found] == [
        ("b", 400.0, 900),
        ("a", 0.0, 1000),
    ]


def test_what_belongs_together_is_added_up(rows) -> None:
    """And says for JSON only what all of it shares."""
    (row,) = rows(one(1, "a", 10), one(2, "a", 20), group="name")
    told = row.to_json()
    assert (told["name"], told["pid"], told["processes"]) == ("a", None, 2)
    assert told["download_bytes"] == 30


def test_a_process_has_a_share_in_each_remote_address(rows) -> None:
    """Whose rate is its own."""

    def moved(pid: int, **remotes: int) -> ProcessTraffic:
        return replace(
            one(pid, "a", 0),
            by_remote={name: {Scope.LOCAL: Usage(1, size, 0, 0)} for name, size in remotes.items()},
        )

    found = rows(
        moved(1, near=100, far=50), moved(2, far=10), before=[moved(1, far=40)], group="remote"
    )
    assert [(row.label, row.down, row.total.download_bytes) for row in found] == [
        ("near", 50.0, 100),
        ("far", 10.0, 60),
    ]
    assert [row.to_json()["remote"] for row in found] == ["near", "far"]
    assert found[1].to_json()["pid"] is None


@pytest.mark.parametrize(
    ("group", "label"), [("unit", "nginx.service"), ("container", "lxc/web"), ("interface", "eth0")]
)
def test_rows_are_of_units_containers_and_interfaces(rows, group, label) -> None:
    """Those of no container have a line of their own."""
    where = "/sys/fs/cgroup/lxc.payload.web/system.slice/nginx.service"
    inside = replace(one(1, "a", 10), cgroup=where)
    inside = replace(inside, by_interface={"eth0": inside.by_scope})
    (row, *_) = found = rows(inside, one(2, "b", 5), group=group)
    assert (row.label, row.total.download_bytes) == (label, 10)
    assert len(found) == (1 if group == "interface" else 2)
    told = row.to_json()
    assert (told["unit"], told["container"]) == ("nginx.service", "lxc/web")


def test_what_is_moved_to_another_process_is_no_negative_rate(rows) -> None:
    """A listener's process was charged for it before."""
    assert rows(one(1, "a", 10), before=[one(1, "a", 1000)])[0].down == 0.0


def test_ended_processes_that_are_added_up_have_no_rate(rows) -> None:
    """Their sum is that of both, which was moved long ago; what is new has one."""
    before = [one(1, "a", 1000), one(2, "a", 500), one(3, "b", 70)]
    for total, rate in ((1500, 0.0), (1600, 50.0)):
        found = rows(replace(one(1, "a", total), processes=2), one(3, "b", 70), before=before)
        assert [(row.down, row.total.download_bytes) for row in found] == [(rate, total), (0, 70)]


def test_a_scope_leaves_the_rest_out(rows) -> None:
    """Loopback counts only where it was asked for."""
    assert rows(one(1, "a", 0), scope="internet")[0].total == (1, 0, 0, 0)
    assert rows(one(1, "a", 5), scope="loopback")[0].total == (1, 7, 1, 7)
    assert rows(one(1, "a", 5), scope="all")[0].total == (2, 12, 1, 7)
    assert rows(one(1, "a", 5), scope="local") == []
