"""Packets that come in for a cgroup take a longer way, and nothing else is different."""

from __future__ import annotations

import random
import time
from typing import Callable, Iterator

import pytest
from echo import PORT, Far, Near

from pybpfthrottle import diversion
from pybpfthrottle.conditions.model import Impairment, Loss
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.diversion.impairing import Impairing
from pybpfthrottle.linux.cgroup import Cgroup

pytestmark = pytest.mark.since("5.10")

# Far more than a machine takes by itself, and far less than a busy one may add.
DELAY_S = 0.1


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    """Two namespaces with an echo at the far end."""
    with Wire() as made:
        far = Far(made.server.inside)
        try:
            yield made
        finally:
            far.end()


@pytest.fixture
def near(wire: Wire, scratch: Cgroup) -> Iterator[Near]:
    """A process in the near namespace and in a cgroup of its own."""
    made = Near(wire.client.inside)
    scratch.move_in(made.process.pid)
    try:
        yield made
    finally:
        made.end()


def until(is_so: Callable[[], object]) -> None:
    """Wait for something that is sure to come."""
    deadline_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


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
        until(lambda: late.counts().delivered >= 5)
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
    with diversion.open(scratch, wanted):
        near.ask("send", wire.server.address, PORT, 300, 100)
        assert near.ask("receive", 2, 300)[0] == list(range(300))


@pytest.mark.parametrize("loss", [Loss.chance(0.1), Loss.burst(0.1, 4), Loss.every(7)])
def test_the_same_packets_are_lost_with_the_same_seed(
    wire: Wire, near: Near, scratch: Cgroup, loss: Loss
) -> None:
    """Those that the seed chooses, and no others."""
    wanted = Impairment(loss=loss, seed=random.randrange(1 << 64))
    impairing = Impairing(wanted)
    passing = [number for number in range(400) if impairing.decide(0).copies]
    with diversion.open(scratch, wanted) as lossy:
        near.ask("send", wire.server.address, PORT, 400, 100)
        assert near.ask("receive", 1, len(passing))[0] == passing
        counts = lossy.counts()
    assert (counts.seen, counts.lost) == (400, 400 - len(passing))
