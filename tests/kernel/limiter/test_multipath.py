"""MPTCP, whose packets are sent by sockets of the kernel. Go 1.24 and later listen by it."""

from __future__ import annotations

import socket
import time
from contextlib import contextmanager
from socket import IPPROTO_TCP as TCP
from typing import Iterator, NamedTuple

import pytest
from targets import Target, eventually, limited, selected, target

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import features, programs
from pybpfthrottle.backends.ebpf.programs import Scope
from pybpfthrottle.bpf.features import Feature
from pybpfthrottle.coverage import Coverage
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.proof import Outcome, Prover

MPTCP = 262
RATE = Rate.parse("1M")
DOWNLOAD, UPLOAD = Direction.DOWNLOAD, Direction.UPLOAD


@pytest.fixture(autouse=True)
def _multipath() -> None:
    """Skip where there is none, or where the kernel cannot tell whose packets those are."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP).close()
    except OSError as error:
        pytest.skip(f"this kernel has no MPTCP (Linux 5.6, CONFIG_MPTCP): {error}")
    if not features.MPTCP_SOCKET.available():
        pytest.skip("needs Linux 5.19, and the kernel's BTF")


class Pair(NamedTuple):
    """A server and a client of it, in two namespaces."""

    server: Target
    client: Target
    address: str
    listener: int

    def connect(self, protocol: int, *, server_sends: bool) -> int:
        """A connection of the client, which transfers at once; its descriptor there."""
        port = self.server.do(f"port({self.listener})")
        ends = f"{self.address!r}, {port}, {protocol}, sends={not server_sends}"
        return int(self.client.do(f"stream_client({ends})"))


@contextmanager
def pair(cgroup: Cgroup, protocol: int, *, server_sends: bool) -> Iterator[Pair]:
    """A server that sends or counts; its listener is of this protocol."""
    with (
        Wire() as wire,
        target(cgroup, wire.server.inside) as server,
        target(cgroup, wire.client.inside) as client,
    ):
        address = wire.server.address
        how = f"{address!r}, {protocol}, sends={server_sends}"
        yield Pair(server, client, address, server.do(f"stream_server({how})"))


def rate_of(receiving: Target, seconds: float) -> float:
    """Bytes per second that come in."""
    begin, before = time.monotonic(), receiving.do("received_in_all()")
    time.sleep(seconds)
    return float((receiving.do("received_in_all()") - before) / (time.monotonic() - begin))


@pytest.mark.timed
@pytest.mark.parametrize("moment", ["before", "later"])
@pytest.mark.parametrize("client", [TCP, MPTCP], ids=["tcp", "mptcp"])
@pytest.mark.parametrize("direction", [UPLOAD, DOWNLOAD])
def test_what_a_multipath_listener_accepts_is_limited(
    scratch: Cgroup, direction: Direction, client: int, moment: str
) -> None:
    """Whatever the client speaks, and whatever is limited; afterwards it is fast again."""
    sends = direction is UPLOAD
    with pair(scratch, MPTCP, server_sends=sends) as ends:
        receiving = ends.client if sends else ends.server
        if moment == "before":
            ends.connect(client, server_sends=sends)
            eventually(lambda: receiving.do("received_in_all()") > 1 << 20)
        with throttle.apply([], {direction: RATE}, processes=selected(ends.server.pid)) as live:
            if moment == "later":
                ends.connect(client, server_sends=sends)
            time.sleep(1.5)
            ratio = rate_of(receiving, 3) / RATE.bytes_per_s
            assert live.notes() == []
        # Of what was fast before so much is dropped at first that it has to recover.
        assert 0.3 <= ratio <= 1.3
        eventually(lambda: rate_of(receiving, 0.5) > 2 * RATE.bytes_per_s)


@pytest.mark.timed
@pytest.mark.parametrize("server", [TCP, MPTCP], ids=["tcp", "mptcp"])
@pytest.mark.parametrize("direction", [UPLOAD, DOWNLOAD])
def test_what_a_multipath_client_connects_to_is_limited(
    scratch: Cgroup, direction: Direction, server: int
) -> None:
    """A server of plain TCP too, which leaves the socket an MPTCP one."""
    sends = direction is DOWNLOAD
    with pair(scratch, server, server_sends=sends) as ends:
        receiving = ends.client if sends else ends.server
        with throttle.apply([], {direction: RATE}, processes=selected(ends.client.pid)):
            ends.connect(MPTCP, server_sends=sends)
            time.sleep(1.5)
            assert 0.3 <= rate_of(receiving, 3) / RATE.bytes_per_s <= 1.3
        # Nothing of the limit stays with a connection that nobody could give it back to.
        eventually(lambda: rate_of(receiving, 0.5) > 2 * RATE.bytes_per_s)


def test_a_proof_counts_multipath_connections(scratch: Cgroup) -> None:
    """Their subflows are TCP connections, which tell what they have carried."""
    with (
        pair(scratch, MPTCP, server_sends=True) as ends,
        throttle.apply([], {DOWNLOAD: RATE}, processes=selected(ends.client.pid)) as live,
    ):
        prover = Prover(live)
        ends.connect(MPTCP, server_sends=True)
        [evidence] = eventually(prover.sample).evidence
    assert evidence.at_sockets is not None
    assert evidence.at_sockets > 0
    assert evidence.outcome is Outcome.HOLDS
    assert set(evidence.past.values()) == {0}


def test_a_limited_cgroup_leaves_nothing_on_multipath_connections(scratch: Cgroup) -> None:
    """They are policed, not paced: their rate is their own when the limit has ended."""
    with pair(scratch, TCP, server_sends=False) as ends:
        with throttle.apply([scratch], {UPLOAD: RATE}):
            ends.connect(MPTCP, server_sends=False)
            eventually(lambda: ends.server.do("received_in_all()") > 1 << 19)
        eventually(lambda: rate_of(ends.server, 0.5) > 5 * RATE.bytes_per_s)


def test_the_listener_of_another_process_is_not_limited(scratch: Cgroup) -> None:
    """Nor is what it accepts, in the same cgroup."""
    with (
        pair(scratch, MPTCP, server_sends=True) as ends,
        target(scratch) as other,
        limited(other.pid),
    ):
        ends.connect(MPTCP, server_sends=True)
        ends.connect(TCP, server_sends=True)
        eventually(lambda: rate_of(ends.client, 0.5) > 20 * RATE.bytes_per_s)


def test_sockets_tells_that_it_is_covered(scratch: Cgroup) -> None:
    """The listener and a connection, open before and later."""
    with pair(scratch, MPTCP, server_sends=True) as ends, limited(ends.server.pid):
        ends.connect(MPTCP, server_sends=True)

        def covered() -> list[object]:
            with Coverage() as coverage:
                found = coverage.report(ends.server.pid).sockets
            return [one.covered for one in found if one.description.kind.is_mptcp()]

        assert eventually(lambda: len(covered()) == 2)
        assert covered() == [True, True]


def test_a_kernel_that_cannot_tell_is_given_the_other_programs(
    monkeypatch: pytest.MonkeyPatch, scratch: Cgroup
) -> None:
    """They limit all but MPTCP, and shape."""
    monkeypatch.setattr(Feature, "available", lambda feature: feature.since != "5.19")
    for scope in Scope:
        chosen = [programs.policer(scope, direction, "deny") for direction in Direction]
        assert not any(one.multipath for one in (programs.shaper(scope), *chosen))
    with target(scratch) as own, limited(own.pid) as live:
        assert "police" not in {how["shape"] for how in live.how().values()}
