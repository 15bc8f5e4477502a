"""Groups: flows share a total by weights, lend what they do not use, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import Iterator, Sequence

import pytest
from lab import Lab, lab
from targets import eventually

import pybpfthrottle
from pybpfthrottle import Direction, Rate, registry
from pybpfthrottle.backends.ebpf.records import ThrottleConfig, element
from pybpfthrottle.backends.ebpf.registry import slot_of
from pybpfthrottle.bpf import maps
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.errors import ShareError, ThrottleError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.plan import Wish
from pybpfthrottle.throttle import Throttle

DOWNLOAD, UPLOAD = Direction.DOWNLOAD, Direction.UPLOAD
TOTAL = Rate.parse("4M")
# So long after a change the rates are what they should be, on a busy machine too.
SETTLED_S = 0.7
MEASURED_S = 1.2


@pytest.fixture
def places(scratch: Cgroup) -> Iterator[list[Cgroup]]:
    """Cgroups of their own for some members."""
    with ExitStack() as stack:
        made = [scratch.create_child(str(number)) for number in range(3)]
        for place in made:
            stack.callback(place.remove, patience_s=5)
        yield made


@contextmanager
def transferring(
    own: Lab, place: Cgroup, direction: Direction
) -> Iterator[subprocess.Popen[bytes]]:
    """A transfer in a cgroup, as fast as it may be."""
    command = ["curl", "--globoff", "-sN", "--max-time", "60", own.url]
    if direction is UPLOAD:
        command += ["-T", "/dev/zero"]
    client = subprocess.Popen(
        own.inside(*command), stdout=subprocess.DEVNULL, preexec_fn=lambda: place.move_in(0)
    )
    try:
        yield client
    finally:
        client.kill()
        client.wait()


def rates(
    members: Sequence[Throttle], direction: Direction, seconds: float = MEASURED_S
) -> list[float]:
    """What each member moves, as a part of the total."""

    def passed() -> list[int]:
        return [member.counters()[direction].bytes_passed for member in members]

    begin, before = time.monotonic(), passed()
    time.sleep(seconds)
    spent = (time.monotonic() - begin) * TOTAL.bytes_per_s
    return [(now - then) / spent for now, then in zip(passed(), before)]


@pytest.mark.timed
@pytest.mark.parametrize("direction", [DOWNLOAD, UPLOAD], ids=str)
def test_flows_share_by_weights_and_lend_what_they_do_not_use(
    places: list[Cgroup], direction: Direction
) -> None:
    """4:1, with a third one that is idle; and all for the small one when the other has stopped."""
    with lab() as own, pybpfthrottle.group(**{str(direction): TOTAL}) as line:
        weights = (4, 1, 5)
        members = [line.limit(cgroup=place.path, weight=w) for place, w in zip(places, weights)]
        with transferring(own, places[1], direction), ExitStack() as stack:
            first = stack.enter_context(transferring(own, places[0], direction))
            time.sleep(SETTLED_S)
            assert rates(members, direction) == pytest.approx([0.8, 0.2, 0], abs=0.1)
            first.kill()
            first.wait()
            eventually(lambda: rates(members, direction, 0.2)[1] > 0.85)
            assert rates(members, direction)[1] == pytest.approx(1, abs=0.15)


@pytest.mark.timed
def test_a_floor_holds_beside_others_with_more_weight(places: list[Cgroup]) -> None:
    """Half of the total, although the other has nine times the weight."""
    with lab() as own, pybpfthrottle.group(download=TOTAL) as line:
        members = [
            line.limit(cgroup=places[0].path, weight=1, floor=TOTAL.bytes_per_s // 2),
            line.limit(cgroup=places[1].path, weight=9),
        ]
        with transferring(own, places[0], DOWNLOAD), transferring(own, places[1], DOWNLOAD):
            time.sleep(SETTLED_S)
            assert rates(members, DOWNLOAD) == pytest.approx([0.5, 0.5], abs=0.1)


def in_force(member: Throttle) -> tuple[int, ...]:
    """The rates that a throttle's programs keep to, by direction."""
    (record,) = [one for one in registry.records() if one.id == member.id]
    ids = record.handles["maps"]
    slot = slot_of(ids.values())
    with maps.open_by_id(ids["CGROUP_CONFIGS"]) as found:
        configs = found.typed(U32, StructureCodec(ThrottleConfig))
        return tuple(int(configs[element(slot, each)].rate_bytes_per_s) for each in Direction)


def test_a_member_has_its_part_at_once_and_its_limit_again_afterwards(
    places: list[Cgroup],
) -> None:
    """The record has the most that it may have; a group in the group has its own ceiling."""
    guests = pybpfthrottle.GroupSpec.of(
        "guests", within=pybpfthrottle.Member.of("line", ceiling="1M")
    )
    with pybpfthrottle.group(total=TOTAL, groups=[guests]) as line:
        member = line.limit(cgroup=places[0].path, within="guests", weight=2)
        assert member.limits == dict.fromkeys(Direction, Rate.parse("1M"))
        assert in_force(member) == (1 << 20, 1 << 20)
        other = pybpfthrottle.throttle.apply([places[1]], line.limits(member_of_guests()))
        try:
            line.add(other, member_of_guests())
            expected = sorted([(1 << 20) // 3, (1 << 20) * 2 // 3] * 2)
            assert sorted(now.rate or 0 for now in line.state()) == expected
            line.discard(other)
            assert other not in line
            assert other.limits == dict.fromkeys(Direction, Rate.parse("1M"))
        finally:
            other.remove()
        (record,) = [one for one in registry.records() if one.id == member.id]
        assert record.spec.limits == member.limits
    assert not [one for one in registry.records() if one.id == member.id]


def member_of_guests() -> pybpfthrottle.Member:
    """One with a weight of 1."""
    return pybpfthrottle.Member("guests")


def test_what_others_do_to_a_member_is_noticed(places: list[Cgroup]) -> None:
    """A limit that is set is a ceiling, one that is paused leaves all to the others."""
    with pybpfthrottle.group(download=TOTAL) as line:
        first, second = (line.limit(cgroup=place.path) for place in places[:2])

        def guaranteed() -> list[int]:
            return [now.guaranteed for now in line.state()]

        half = TOTAL.bytes_per_s // 2
        assert guaranteed() == [half, half]
        first.set(download="1M")
        eventually(lambda: guaranteed() == [1 << 20, 3 << 20])
        first.pause()
        eventually(lambda: guaranteed() == [0, TOTAL.bytes_per_s])
        assert line.state()[0].rate is None
        first.resume()
        eventually(lambda: guaranteed() == [1 << 20, 3 << 20])
        first.remove()
        eventually(lambda: [now.throttle for now in line.state()] == [second.id])


SENDER = """
import socket, time
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind(("127.0.0.1", 0))
while True:
    own.sendto(bytes(1000), own.getsockname())
    time.sleep(0.005)
"""


def test_it_is_seen_who_of_them_moves_something(places: list[Cgroup]) -> None:
    """Throttles of one process share programs and maps, where they have elements of their own."""
    with pybpfthrottle.group(upload=TOTAL) as line:
        members = [line.limit(cgroup=place.path, loopback=True) for place in places]
        sender = subprocess.Popen(
            [sys.executable, "-c", SENDER], preexec_fn=lambda: places[1].move_in(0)
        )
        seen: dict[str, int] = {}

        def used() -> list[bool]:
            for now in line.state():
                seen[now.throttle] = max(now.used, seen.get(now.throttle, 0))
            return [seen[member.id] > 0 for member in members]

        try:
            assert eventually(lambda: used()[1])
            assert used() == [False, True, False]
        finally:
            sender.kill()
            sender.wait()


def test_what_cannot_share_is_refused_and_leaves_no_limit(places: list[Cgroup]) -> None:
    """Floors above the total, and a backend that takes its time."""
    with pybpfthrottle.group(download=TOTAL) as line:
        line.limit(cgroup=places[0].path, floor="3M")
        with pytest.raises(ShareError, match="the new throttle 2M"):
            line.limit(cgroup=places[1].path, floor="2M")
        with pytest.raises(ThrottleError, match="only the backend ebpf moves rates quickly"):
            line.limit(
                cgroup=places[1].path, wish=Wish(backends={DOWNLOAD: "nftables"}), loopback=True
            )
        assert len(line.state()) == 1
        assert not [one for one in registry.records() if places[1].path in one.cgroups]
