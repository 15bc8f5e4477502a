"""UDP downloads over their limit wait in a queue; where they cannot, the limit goes on without."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest
from echo import PORT, Near
from lab import attached
from targets import eventually

import pybpfthrottle
from pybpfthrottle import registry
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.records import ThrottleFlags
from pybpfthrottle.bpf.loader import Loadable
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.diversion import diverted as owner
from pybpfthrottle.diversion import keeping, tap
from pybpfthrottle.diversion.keeping import DiversionKeeper
from pybpfthrottle.diversion.limit_queue import LimitQueue
from pybpfthrottle.linux import cgroup, netns, process, tuntap
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.throttle import Throttle, apply, open_record

pytestmark = pytest.mark.since("5.10")

RATE = 200 << 10
SIZE, HEADERS = 1200, 28
DOWNLOAD = Direction.DOWNLOAD


@pytest.fixture
def other(wire: Wire, scratch: Cgroup) -> Iterator[Near]:
    """A second process, beside that which is limited."""
    made = Near(wire.client.inside)
    scratch.move_in(made.process.pid)
    yield made
    made.end()


def told(live: Throttle) -> str:
    """How UDP downloads are kept to the limit."""
    return live.how()[DOWNLOAD].get("udp", "")


def told_to_others(live: Throttle) -> str:
    """The same by the record of it in the kernel."""
    (record,) = (one for one in registry.records() if one.id == live.id)
    with open_record(record) as found:
        return told(found)


def comes_to(near: Near, wire: Wire, is_so: Callable[[], bool]) -> None:
    """Have more come in than the limit allows, until something is so."""

    def more() -> bool:
        near.ask("send", wire.server.address, PORT, 100, SIZE, 0.001)
        return is_so()

    eventually(more)


def meet_the_limit_once(near: Near, wire: Wire, live: Throttle) -> None:
    """What comes in stays in order, and is counted when it has come back, not before."""
    eventually(lambda: not live._queue._diverted.open[0]._state[0].waits)  # type: ignore[union-attr]
    near.ask("receive", 0.5)  # no answer to what was sent before is on its way
    before = live.counters()[DOWNLOAD]
    near.ask("send", wire.server.address, PORT, 150, SIZE, 0)
    numbers, _ = near.ask("receive", 1.5)
    after = live.counters()[DOWNLOAD]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == after.packets_total - before.packets_total - (
        after.packets_dropped - before.packets_dropped
    )
    assert after.packets_total - before.packets_total <= 150


def diverted(live: Throttle) -> int:
    """How many packets have gone to the keeper."""
    queue = live._queue
    assert queue is not None
    return sum(one._state[0].taken for one in queue._diverted.open)


def devices(wire: Wire) -> list[str]:
    """Our devices in the near namespace."""
    names = netns.interfaces(wire.client.process.pid).names.values()
    return [name for name in names if name.startswith("pybpfd")]


def keepers() -> list[int]:
    """The processes of ours that hold packets."""
    found = []
    for pid in process.families().get(os.getpid(), ()):
        with suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "pybpfd-keeper":
                found.append(pid)
    return found


@pytest.mark.parametrize("by", ["cgroup", "marks"])
def test_they_wait_and_stay_in_order(wire: Wire, near: Near, scratch: Cgroup, by: str) -> None:
    """Not before they are over the limit; then all of it is told, and what passes is the limit."""
    target = {"cgroup": scratch.path} if by == "cgroup" else {"pid": near.process.pid}
    with pybpfthrottle.limit(**target, download=RATE) as live:  # type: ignore[arg-type]
        near.ask("ping", wire.server.address, PORT, "udp", 3)
        assert (told(live), keepers(), devices(wire)) == ("", [], [])
        comes_to(near, wire, lambda: told(live) == "queue" and diverted(live) > 0)
        assert any("waits in a queue" in note for note in live.notes())
        meet_the_limit_once(near, wire, live)
        eventually(lambda: told_to_others(live) == "queue")
    assert (keepers(), devices(wire)) == ([], [])


def test_it_is_the_limit_that_passes(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """And not once for the queue, and once for the limit."""
    with pybpfthrottle.limit(cgroup=scratch.path, download=RATE) as live:
        comes_to(near, wire, lambda: diverted(live) > 0)
        passed = live.counters()[DOWNLOAD].bytes_passed
        begin_ns = live._parts[DOWNLOAD]._bucket._buckets[DOWNLOAD].even_at_ns  # type: ignore
        for _ in range(3):
            near.ask("send", wire.server.address, PORT, 150, SIZE, 0)
            near.ask("receive", 1)
        end_ns = live._parts[DOWNLOAD]._bucket._buckets[DOWNLOAD].even_at_ns  # type: ignore
        passed = live.counters()[DOWNLOAD].bytes_passed - passed
        # All that passed was charged for, or the bucket would lag behind.
        assert 0 < passed <= (end_ns - begin_ns) / 1e9 * RATE + 2 * (SIZE + HEADERS)


@pytest.mark.since("6.1")  # the gate tells of it
@pytest.mark.parametrize("by", ["cgroup", "marks"])
def test_it_is_ready_before_it_is_needed(wire: Wire, near: Near, scratch: Cgroup, by: str) -> None:
    """A large datagram that is sent begins it: a burst loses nothing. It is told when used."""
    target = {"cgroup": scratch.path} if by == "cgroup" else {"pid": near.process.pid}
    with pybpfthrottle.limit(**target, download=RATE) as live:  # type: ignore[arg-type]
        near.ask("send", wire.server.address, PORT, 1, SIZE, 0)
        eventually(lambda: any(one._kept.is_open for one in live._queue._diverted.open))  # type: ignore[union-attr]
        assert (told(live), diverted(live)) == ("", 0)
        near.ask("receive", 0.5)
        near.ask("send", wire.server.address, PORT, 50, SIZE, 0)
        numbers, _ = near.ask("receive", 1.5)
        assert numbers == list(range(50))
        assert diverted(live) > 0
        assert live.counters()[DOWNLOAD].packets_dropped == 0
        eventually(lambda: told(live) == "queue")


@pytest.mark.since("6.1")
def test_a_limit_that_fails_at_last_leaves_nothing(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs are attached by then."""

    def refuse(*_: object) -> None:
        assert attached(scratch)
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(LimitQueue, "__init__", refuse)
    with pytest.raises(OSError, match="not here"):
        pybpfthrottle.limit(cgroup=scratch.path, download=RATE)
    assert not attached(scratch)


@pytest.mark.timed  # packets wait for 200 ms at most
@pytest.mark.since("6.1")
@pytest.mark.parametrize("by", ["cgroup", "marks"])
def test_packets_wait_for_a_keeper_that_starts(
    wire: Wire, near: Near, scratch: Cgroup, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst loses nothing, though it comes before the keeper; what is slow was done ahead."""
    start = DiversionKeeper.start
    stopped = []

    def start_slowly(keeper: DiversionKeeper) -> None:
        start(keeper)
        assert keeper.pid
        os.kill(keeper.pid, signal.SIGSTOP)
        stopped.append(keeper.pid)

    def prepared(*_: object) -> None:
        raise AssertionError("this takes too long by now")

    owner._loadable.cache_clear()
    keeping.program_of_device.cache_clear()
    target = {"cgroup": scratch.path} if by == "cgroup" else {"pid": near.process.pid}
    with pybpfthrottle.limit(**target, download=RATE) as live:  # type: ignore[arg-type]
        eventually(lambda: keeping.program_of_device.cache_info().currsize)  # it is the last
        assert not live._queue._diverted  # type: ignore[union-attr]
        monkeypatch.setattr(DiversionKeeper, "start", start_slowly)
        monkeypatch.setattr(Loadable, "__init__", prepared)
        near.ask("send", wire.server.address, PORT, 1, SIZE, 0)
        eventually(lambda: live._queue._diverted.open)  # type: ignore[union-attr]
        near.ask("receive", 0.5)
        near.ask("send", wire.server.address, PORT, 50, SIZE, 0)
        eventually(lambda: diverted(live) > 0)
        os.kill(stopped[0], signal.SIGCONT)
        numbers, _ = near.ask("receive", 1.5)
        assert numbers == list(range(50))
        assert live.counters()[DOWNLOAD].packets_dropped == 0


def lends(live: Throttle) -> bool:
    """Whether what comes before the queue may be owed."""
    return bool(live._parts[DOWNLOAD]._bucket.flags(DOWNLOAD) & ThrottleFlags.LEND)  # type: ignore


@pytest.mark.timed  # it is lent for 0.8 s
@pytest.mark.since("6.1")
def test_while_it_is_expected_more_may_be_owed(
    wire: Wire, near: Near, scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes before it is let in, 0.4 s of the limit here; if none comes it is as ever."""
    monkeypatch.setattr(LimitQueue, "_begin", lambda queue: False)
    rate = 1 << 20
    burst = int(0.4 * rate / (SIZE + HEADERS))
    with pybpfthrottle.limit(cgroup=scratch.path, download=rate) as live:
        eventually(lambda: lends(live))
        dropped = [0]
        for _ in range(2):
            near.ask("send", wire.server.address, PORT, burst, SIZE, 0)
            near.ask("receive", 1)
            dropped.append(live.counters()[DOWNLOAD].packets_dropped)
    # Early, of each hundred one; the second time about a third.
    assert dropped[1] <= burst // 50
    assert dropped[2] - dropped[1] > burst // 5


@pytest.mark.since("6.1")
def test_where_there_can_be_none_nothing_is_lent(
    near: Near, scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above its rate, and as soon as it is refused; a lower rate has it again."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not here")

    with pybpfthrottle.limit(cgroup=scratch.path, download=RATE) as live:
        assert lends(live)
        live.set_limit(DOWNLOAD, Rate(100_000_000))
        assert not lends(live)
        live.set_limit(DOWNLOAD, Rate(RATE))
        assert lends(live)
        monkeypatch.setattr(owner.Diversion, "join", refuse)
        near.ask("send", "127.0.0.1", PORT, 1, SIZE, 0)
        eventually(lambda: not lends(live))


@pytest.mark.timed  # packets wait for 200 ms at most
@pytest.mark.since("6.1")
def test_packets_wait_while_their_device_is_made(
    wire: Wire, near: Near, scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pays once, in whichever of two cgroups; the limit comes after the queue by then."""
    made, create = threading.Event(), tap.create

    def create_late(back: Program) -> tap.Tap:
        assert made.wait(5)
        return create(back)

    other = Near(wire.client.inside)
    both = [scratch.create_child("first"), scratch.create_child("second")]
    for place, one in zip(both, (near, other)):
        place.move_in(one.process.pid)
    monkeypatch.setattr(tap, "create", create_late)
    try:
        with pybpfthrottle.limit(cgroup=[each.path for each in both], download=RATE) as live:
            queue = live._queue
            assert queue is not None
            before = live.counters()[DOWNLOAD].packets_total
            near.ask("send", wire.server.address, PORT, 1, SIZE, 0)
            eventually(lambda: len(queue._diverted.open) == 2)
            eventually(lambda: queue._diverted.open[0]._state[0].on)
            near.ask("receive", 0.1)
            near.ask("send", wire.server.address, PORT, 40, SIZE, 0)
            eventually(lambda: diverted(live) > 0)
            made.set()
            eventually(lambda: queue._diverted.open[1]._state[0].on)
            other.ask("send", wire.server.address, PORT, 10, SIZE, 0)
            came = [one.ask("receive", 1.5)[0] for one in (near, other)]
            after = live.counters()[DOWNLOAD]
        assert came == [sorted(set(numbers)) for numbers in came]
        # A flow loses its first packet that waits for 200 ms.
        assert after.packets_dropped <= 1
        assert sum(map(len, came)) == 50 - after.packets_dropped
        assert after.packets_total - before == 1 + 50
    finally:
        made.set()
        other.end()
        scratch.move_in(near.process.pid)
        for place in both:
            place.remove(patience_s=5)


@pytest.mark.since("6.1")
def test_others_datagrams_begin_none(wire: Wire, near: Near, other: Near) -> None:
    """By marks the gate sees the packets of all processes."""
    with pybpfthrottle.limit(pid=near.process.pid, download=RATE) as live:
        other.ask("send", wire.server.address, PORT, 50, SIZE, 0)
        assert len(other.ask("receive", 1, 50)[0]) == 50
        assert not live._queue._is_expected  # type: ignore[union-attr]
        near.ask("send", wire.server.address, PORT, 1, SIZE, 0)
        eventually(lambda: live._queue._is_expected)  # type: ignore[union-attr]


@pytest.mark.parametrize("by", ["SIGKILL", "SIGSTOP"])
def test_without_its_keeper_packets_pass(wire: Wire, near: Near, scratch: Cgroup, by: str) -> None:
    """They are dropped early again; a killed keeper is replaced, and one that goes on serves."""
    with pybpfthrottle.limit(cgroup=scratch.path, download=RATE) as live:
        comes_to(near, wire, lambda: diverted(live) > 0)
        (pid,) = eventually(keepers)
        os.kill(pid, signal.Signals[by])
        try:
            comes_to(near, wire, lambda: bool(near.ask("receive", 0.5)[0]))
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        before = diverted(live)
        comes_to(near, wire, lambda: diverted(live) > before)
        assert (keepers() == [pid]) == (by == "SIGSTOP")
        eventually(lambda: told(live) == "queue")


def test_without_a_device_they_are_dropped_early(
    wire: Wire, near: Near, scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said why, and nothing is left attached for a queue."""
    monkeypatch.setattr(tuntap, "_TUN", "/dev/net/there-is-none")
    with pybpfthrottle.limit(cgroup=scratch.path, download=RATE) as live:
        before = len(attached(scratch))
        comes_to(near, wire, lambda: told(live) == "early drops")
        assert "there-is-none" in live.how()[DOWNLOAD]["udp_reason"]
        assert any("loses packets early" in note for note in live.notes())
        assert len(attached(scratch)) == before
        assert not keepers()
        comes_to(near, wire, lambda: bool(near.ask("receive", 0.5)[0]))


def test_who_asks_for_the_policer_gets_no_queue(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """A shape that was named is kept to."""
    options = Options(shape={DOWNLOAD: "police"})
    with apply([scratch], {DOWNLOAD: Rate(RATE)}, options=options) as live:
        comes_to(near, wire, lambda: told(live) == "early drops")
        assert live.how()[DOWNLOAD]["udp_reason"] == "--shape police"
        assert not live.notes()


def test_who_is_exempt_does_not_wait(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """A limit for some networks has a queue for what comes from them."""
    to = f"{wire.server.address}/32"
    with pybpfthrottle.limit(cgroup=scratch.path, download=RATE, to=to) as live:
        comes_to(near, wire, lambda: diverted(live) > 0)
        before = diverted(live)
        near.ask("send", wire.server.address6, PORT, 100, SIZE, 0)
        assert len(near.ask("receive", 1, 100)[0]) == 100
        assert diverted(live) == before


def test_one_that_shares_programs_has_a_queue(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """In its slot of maps that are larger."""
    with pybpfthrottle.limit(pid=os.getpid(), upload="1G"):
        with pybpfthrottle.limit(cgroup=scratch.path, download=RATE) as live:
            comes_to(near, wire, lambda: told(live) == "queue" and diverted(live) > 0)


def test_one_that_shares_marks_has_a_queue(wire: Wire, near: Near, other: Near) -> None:
    """It comes before the programs that others share, and is for the sockets of its limit alone."""
    with (
        pybpfthrottle.limit(pid=os.getpid(), upload="1G"),
        pybpfthrottle.limit(pid=other.process.pid, download="100M") as unhurried,
        pybpfthrottle.limit(pid=near.process.pid, download=RATE) as live,
    ):
        comes_to(near, wire, lambda: told(live) == "queue" and diverted(live) > 0)
        before = diverted(live)
        other.ask("send", wire.server.address, PORT, 100, SIZE, 0)
        assert len(other.ask("receive", 1, 100)[0]) == 100
        assert diverted(live) == before
        assert told(unhurried) == ""
        meet_the_limit_once(near, wire, live)
    assert (keepers(), devices(wire)) == ([], [])


def test_in_the_root_of_all_cgroups_there_is_none(wire: Wire, near: Near) -> None:
    """Nothing runs before the programs that others share there: it is said why."""
    cgroup.root().move_in(near.process.pid)
    with (
        pybpfthrottle.limit(pid=os.getpid(), upload="1G"),
        pybpfthrottle.limit(pid=near.process.pid, download=RATE) as live,
    ):
        comes_to(near, wire, lambda: told(live) == "early drops")
        assert "in the root of all cgroups" in live.how()[DOWNLOAD]["udp_reason"]


def test_a_rate_that_is_too_high_ends_it(wire: Wire, near: Near, scratch: Cgroup) -> None:
    """What waits is given back; a lower rate has a queue again."""
    with pybpfthrottle.limit(cgroup=scratch.path, download=RATE) as live:
        comes_to(near, wire, lambda: told(live) == "queue" and diverted(live) > 0)
        live.set(download="100M")
        eventually(lambda: told(live) == "early drops")
        assert not devices(wire)
        live.set(download=RATE)
        comes_to(near, wire, lambda: told(live) == "queue" and diverted(live) > 0)
