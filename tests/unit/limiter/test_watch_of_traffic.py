"""Which process the kernel's counts are for, without a kernel; and the rows of top."""

from __future__ import annotations

from typing import Iterable, Optional

import pytest

from pybpfthrottle import traffic
from pybpfthrottle.backends.ebpf.accounting import Creator
from pybpfthrottle.cli import top
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.traffic import ProcessTraffic, Scope, Usage


class Counts:
    """What the kernel would have counted: download bytes by process, all from the internet."""

    def __init__(self) -> None:
        self.found: dict[int, int] = {}
        self.forgotten: list[int] = []

    def counts(self):
        """As Accounting.counts."""
        return [(pid, Scope.INTERNET, (1, count, 0, 0)) for pid, count in self.found.items()]

    def creator(self, pid: int) -> Optional[Creator]:
        """As Accounting.creator."""
        return Creator("born", 1, 0)

    def forget(self, pid: int, scopes: Iterable[int]) -> None:
        """As Accounting.forget."""
        self.forgotten.append(pid)
        del self.found[pid]

    def scan(self, pids: Iterable[int]) -> None:
        """As Accounting.scan."""

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
    monkeypatch.setattr(traffic, "Accounting", lambda: counts)
    monkeypatch.setattr(
        traffic, "_process", lambda pid: alive[pid] if pid in alive and alive[pid].lives else None
    )
    monkeypatch.setattr(traffic.process, "name_of", lambda pid: alive[pid].name)
    monkeypatch.setattr(traffic.process, "user_of", lambda pid: 0)
    monkeypatch.setattr(traffic.process, "in_first_namespace", lambda: True)
    monkeypatch.setattr(traffic, "_cgroup_of", lambda pid: "/sys/fs/cgroup/one")
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
        assert [count for *_, count in bytes_of(watch)] == [100, 5, 0]


def test_what_nobody_owns_is_a_line_of_its_own(world) -> None:
    """The sum is that of all packets."""
    counts, _ = world
    with traffic.watch() as watch:
        counts.found[0] = 40
        assert bytes_of(watch) == [(None, "unknown", 40)]


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
def rows(monkeypatch):
    """Makes the rows of an interval of two seconds."""
    monkeypatch.setattr(top.registry, "records", list)

    def make(*found: ProcessTraffic, before: Iterable[ProcessTraffic] = (), **options):
        known = {one.number: one for one in before}
        return top._rows(found, known, 2.0, top.Options(**options))

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


def test_a_scope_leaves_the_rest_out(rows) -> None:
    """Loopback counts only where it was asked for."""
    assert rows(one(1, "a", 0), scope="internet")[0].total == (1, 0, 0, 0)
    assert rows(one(1, "a", 5), scope="loopback")[0].total == (1, 7, 1, 7)
    assert rows(one(1, "a", 5), scope="all")[0].total == (2, 12, 1, 7)
    assert rows(one(1, "a", 5), scope="local") == []
