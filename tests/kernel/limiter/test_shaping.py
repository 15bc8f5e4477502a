"""Shaping: TCP keeps to its limit by itself, and is as it was before when the limit ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import pytest
import unadopted
from lab import ENVIRONMENT, TOOL, Lab, attached, lab
from since import is_emulated, needs_machine, needs_release, parse, running
from targets import eventually, live_map

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.backends.ebpf.keeping import KeeperProcess
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.backends.ebpf.records import ThrottleBucket, ThrottleFlags
from pybpfthrottle.bpf import links, programs, syscall
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.demo import peer
from pybpfthrottle.linux import sockets
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.sockets import TcpInfo
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.throttle import Throttle

pytestmark = pytest.mark.timed

UNLIMITED = (1 << 64) - 1
GETSOCKOPT = 57  # bpf_getsockopt
FIN_WAIT2 = 5  # include/net/tcp_states.h
RATE = Rate.parse("2M")
# In an emulated machine the gate's keeper comes late, and one second is unlike the other.
SHARES = (0.3, 1.6) if is_emulated() else (0.9, 1.1)
# It may also stand still for half a second, and a connection without a limit has no more than a few
# times RATE there; the window of one with a limit is good for less than twice.
LEAST, FASTER = (0.7, 2) if is_emulated() else (0.9, 5)
# The second is not tried before a connection is there.
SHAPES_SINCE = {
    Direction.UPLOAD: ("5.10", "socket storage for programs of cgroups"),
    Direction.DOWNLOAD: ("6.1", "bpf_getsockopt of TCP_WINDOW_CLAMP"),
}
# From then on a program at the setsockopt hook can adopt connections that are open; before, only
# uploads are shaped, from user space.
ADOPTS_SINCE = "6.12"
METHODS = {Direction.UPLOAD: "pace", Direction.DOWNLOAD: "window"}
# A receive window is no means on a way as short as that between two namespaces.
WAYS = {Direction.UPLOAD: 0.0, Direction.DOWNLOAD: 0.02}


class Connection(NamedTuple):
    """What struct tcp_info and TCP_WINDOW_CLAMP tell of a connection."""

    max_pacing: int
    clamp: int
    acked: int
    received: int

    @classmethod
    def of(cls, cgroup: Cgroup) -> Optional[Connection]:
        """The first connection of the processes in a cgroup."""
        return next(cls.all_of(cgroup), None)

    @classmethod
    def all_of(cls, cgroup: Cgroup) -> Iterator[Connection]:
        """All connections of the processes in a cgroup."""
        for own in sockets.tcp_of(cgroup.pids_below()):
            info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
            clamp = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP)
            max_pacing, acked, received = struct.unpack_from("=QQQ", info, 112)
            yield cls(max_pacing, clamp, acked, received)

    def transferred(self, direction: Direction) -> int:
        """Payload bytes in a direction."""
        return self.acked if direction is Direction.UPLOAD else self.received


@contextmanager
def client(own: Lab, cgroup: Cgroup, direction: Direction) -> Iterator[None]:
    """Curl, as fast as it can, in a cgroup."""
    command = ["curl", "-sN", "--max-time", "60", own.url]
    if direction is Direction.UPLOAD:
        command += ["-T", "-"]
    with (
        open("/dev/zero", "rb") as zeros,
        subprocess.Popen(
            own.inside(*command),
            stdin=zeros,
            stdout=subprocess.DEVNULL,
            preexec_fn=lambda: cgroup.move_in(0),
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 10
            while (found := Connection.of(cgroup)) is None or not found.transferred(direction):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield
        finally:
            process.kill()


def limited(cgroup: Cgroup, direction: Direction, rate: Rate = RATE, shape: str = ""):
    """A throttle for one direction, shaped by what the kernel does alone."""
    options = Options(shape={direction: shape or METHODS[direction]})
    return throttle.apply([cgroup], {direction: rate}, options=options)


def now(cgroup: Cgroup) -> Connection:
    """The connection, which has to be there."""
    found = Connection.of(cgroup)
    assert found is not None
    return found


def rate_over(cgroup: Cgroup, direction: Direction, seconds: float) -> float:
    """What the connection transfers, over RATE."""
    begin, before = time.monotonic(), now(cgroup).transferred(direction)
    time.sleep(seconds)
    count = now(cgroup).transferred(direction) - before
    return count / (time.monotonic() - begin) / RATE.bytes_per_s


def need_shaping(live: Throttle, direction: Direction) -> None:
    """Skip where this kernel is too old to shape; on others it has to."""
    how = live.how()[direction]
    if how["shape"] == "police":
        needs_release(*SHAPES_SINCE[direction])
    assert how["shape"] == METHODS[direction], how["shape_reason"]


@pytest.mark.parametrize("direction", Direction)
def test_a_shaped_transfer_keeps_to_its_limit(scratch: Cgroup, direction: Direction) -> None:
    """A connection that begins under the limit; of an upload nothing is dropped."""
    with lab(round_trip_s=WAYS[direction]) as own, limited(scratch, direction) as live:
        need_shaping(live, direction)
        with client(own, scratch, direction):
            need_shaping(live, direction)
            assert live.how()[direction]["shape"] == METHODS[direction]
            assert 0.94 <= rate_over(scratch, direction, 4) <= 1.06
            counters = live.counters()[direction]
    if direction is Direction.UPLOAD:
        assert counters.packets_dropped == 0
    else:
        assert counters.bytes_dropped < 0.05 * counters.bytes_total


def test_a_window_follows_the_round_trip(scratch: Cgroup) -> None:
    """It is measured while data comes: of the handshake's, a longer way would get a seventh."""
    direction = Direction.DOWNLOAD
    with (
        lab(round_trip_s=0.02, control="reno", later=[(1.0, 0.15)]) as own,
        limited(scratch, direction) as live,
    ):
        need_shaping(live, direction)
        with client(own, scratch, direction):
            need_shaping(live, direction)
            time.sleep(4)
            assert 0.9 <= rate_over(scratch, direction, 3) <= 1.05
            counters = live.counters()[direction]
    assert counters.bytes_dropped < 0.05 * counters.bytes_total


def test_on_a_short_way_a_download_is_policed(scratch: Cgroup) -> None:
    """A window would be too coarse; the limit holds all the same, and the window is left alone."""
    direction = Direction.DOWNLOAD
    with lab() as own, limited(scratch, direction) as live, client(own, scratch, direction):
        need_shaping(live, direction)
        assert 0.9 <= rate_over(scratch, direction, 4) <= 1.1
        assert now(scratch).clamp > 60_000


@pytest.mark.parametrize("direction", Direction)
def test_a_connection_gets_back_what_it_had(scratch: Cgroup, direction: Direction) -> None:
    """When the limit ends, pacing and window are as they were, at once."""
    with lab(round_trip_s=WAYS[direction]) as own:
        with limited(scratch, direction) as live:
            need_shaping(live, direction)
            with client(own, scratch, direction):
                need_shaping(live, direction)
                time.sleep(0.5)
                during = now(scratch)
                live.remove()
                after = now(scratch)
                assert rate_over(scratch, direction, 1) > FASTER
    if direction is Direction.UPLOAD:
        assert during.max_pacing <= RATE.bytes_per_s * 9 // 8
    else:
        assert during.clamp <= RATE.bytes_per_s
    assert after.max_pacing == UNLIMITED
    assert after.clamp > 60_000


@pytest.fixture
def hidden_clamp() -> Iterator[None]:
    """A kernel that tells programs of no window's clamp, as before Linux 6.1."""
    shipped.read.cache_clear()
    asked, ask = map(re.escape, (asm.mov_imm(3, socket.TCP_WINDOW_CLAMP), asm.call(GETSOCKOPT)))
    objects = map(shipped.read, ("throttle", "throttle-direct"))
    for program in (one for spec in objects for one in spec.programs.values()):
        code = program.function.code
        code = re.sub(asked + b"(.{,24}" + ask + b")", asm.mov_imm(3, 0) + rb"\1", code, flags=re.S)
        program.function = program.function.changed(code=code)
    yield
    shipped.read.cache_clear()


@pytest.mark.since("6.1")  # where it is to be hidden
def test_an_unknown_window_is_opened_again(scratch: Cgroup, hidden_clamp: None) -> None:
    """What a connection had is not known; afterwards it has as much as it may need."""
    direction = Direction.DOWNLOAD
    with lab(round_trip_s=WAYS[direction]) as own:
        with limited(scratch, direction) as live:
            with client(own, scratch, direction):
                need_shaping(live, direction)
                time.sleep(0.5)
                during = now(scratch)
                live.remove()
                after = now(scratch)
                assert any(rate_over(scratch, direction, 1) > FASTER for _ in range(5))
    assert during.clamp <= RATE.bytes_per_s
    assert after.clamp == 65535 << 7


@pytest.mark.parametrize("direction", Direction)
def test_what_the_kernel_has_refused_is_not_tried_again(
    scratch: Cgroup, direction: Direction
) -> None:
    """The programs note it beside the bucket; the limit is policed, and that is told."""
    with lab(round_trip_s=WAYS[direction]) as own, limited(scratch, direction) as live:
        need_shaping(live, direction)
        with live_map("CGROUP_BUCKETS") as found:
            buckets = found.typed(U32, StructureCodec(ThrottleBucket))
            buckets[direction] = ThrottleBucket(refused=ThrottleFlags.PACE | ThrottleFlags.WINDOW)
        with client(own, scratch, direction):
            eventually(lambda: live.counters()[direction].packets_dropped)
            during = now(scratch)
        assert live.how()[direction]["shape"] == "police"
        # Another rate is no reason to try it again.
        live.set_limit(direction, Rate(RATE.bytes_per_s * 2))
        assert live.how()[direction]["shape"] == "police"
    assert during.max_pacing == UNLIMITED
    assert during.clamp > 60_000


OPEN = {"kernel": TOOL, "user space": [TOOL[0], unadopted.__file__]}


@pytest.fixture(params=OPEN)
def shaped_by(request: pytest.FixtureRequest) -> Iterator[str]:
    """Who shapes the connections that were open before the limit."""
    need_as_many_bits()
    shipped.read.cache_clear()
    if request.param == "user space":
        unadopted.refuse()
    yield request.param
    shipped.read.cache_clear()


def need_as_many_bits() -> None:
    """Skip where the kernel asks no program at the setsockopt hook."""
    needs_machine(
        "a Python with as many bits as the kernel", found=not syscall.is_compatible_mode()
    )


def need_to_shape_open(
    live: Throttle, shaped_by: str, direction: Direction = Direction.UPLOAD
) -> None:
    """Skip where this kernel is too old to adopt open connections; on others it has to."""
    need_as_many_bits()
    need_shaping(live, direction)
    if shaped_by == "kernel":
        needs_release(ADOPTS_SINCE, "a program at the setsockopt hook that adopts open connections")
        assert "open_connections" not in live.how()[direction]


@pytest.mark.parametrize("direction", Direction)
def test_an_open_connection_is_shaped_too(
    scratch: Cgroup, direction: Direction, shaped_by: str
) -> None:
    """It is adopted when the limit begins, and restored when it ends."""
    with lab(round_trip_s=WAYS[direction]) as own, client(own, scratch, direction):
        time.sleep(0.5)
        before = now(scratch)
        with limited(scratch, direction) as live:
            need_shaping(live, direction)
            time.sleep(1)
            ratio = rate_over(scratch, direction, 3)
            during = now(scratch)
        after = now(scratch)
        # What was dropped of a faster connection's packets on their way may be waited for, and
        # where it could not be adopted but only policed, congestion control has to recover too.
        adopted = during.max_pacing != UNLIMITED or during.clamp < before.clamp
        faster = FASTER if adopted else 1.5
        assert any(rate_over(scratch, direction, 1) > faster for _ in range(20))
    assert ratio <= 1.2  # a fast one is still being caught
    if direction is Direction.UPLOAD:
        assert ratio >= LEAST
    by_kernel = shaped_by == "kernel" and running() >= parse(ADOPTS_SINCE)
    if direction is Direction.UPLOAD or by_kernel:
        assert adopted
    assert after.max_pacing == before.max_pacing
    assert after.clamp >= before.clamp


@pytest.mark.alone
def test_a_running_download_comes_down_and_stays(scratch: Cgroup) -> None:
    """What it may owe while its old window is used up does not stop it when that is over."""
    direction = Direction.DOWNLOAD
    line = lab(round_trip_s=WAYS[direction], fastest=Rate.parse("20M"))
    with line as own, client(own, scratch, direction):
        time.sleep(1)
        with limited(scratch, direction) as live:
            need_to_shape_open(live, "kernel", direction)
            time.sleep(1)
            ratios = [rate_over(scratch, direction, 1) for _ in range(3)]
    assert all(0.88 <= ratio <= 1.12 for ratio in ratios), ratios


@pytest.mark.since("6.1")  # what the kernel needs for the gate
def test_an_open_download_goes_through_the_gate(scratch: Cgroup, shaped_by: str) -> None:
    """It loses nothing once its sender has come down; its window is given back at the end."""
    direction = Direction.DOWNLOAD
    line = lab(round_trip_s=WAYS[direction], fastest=Rate.parse("20M"))
    with line as own, client(own, scratch, direction):
        time.sleep(1)
        before = now(scratch)
        with limited(scratch, direction, shape="gate") as live:
            if shaped_by == "kernel":
                needs_release(ADOPTS_SINCE, "a program that adopts open connections")
            time.sleep(2)
            then = live.counters()[direction]
            ratios = [rate_over(scratch, direction, 1) for _ in range(3)]
            later = live.counters()[direction]
            clamp = now(scratch).clamp
            live.set_limit(direction, Rate(RATE.bytes_per_s // 4))
            time.sleep(1)
            less = rate_over(scratch, direction, 2)
            live.set_limit(direction, None)
            assert any(rate_over(scratch, direction, 1) > 2 for _ in range(10))
        after = now(scratch)
    # Of what is policed, a tenth and more is dropped.
    dropped = later.bytes_dropped - then.bytes_dropped
    assert dropped <= 0.02 * (later.bytes_total - then.bytes_total)
    least, most = SHARES
    assert least <= sum(ratios) / 3 <= most, ratios
    assert least / 4 <= less <= most / 4
    assert clamp < RATE.bytes_per_s // 4
    assert after.clamp >= before.clamp


HALF_CLOSES = """
import socket, sys, time
own = socket.create_connection((sys.argv[1], int(sys.argv[2])))
own.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
end = time.monotonic() + 2
while own.recv(1 << 20):
    if time.monotonic() > end:
        own.shutdown(socket.SHUT_WR)
        end = float("inf")
"""


@pytest.mark.since("6.1")  # what the kernel needs for the gate
def test_a_half_closed_download_goes_through_the_gate(scratch: Cgroup, shaped_by: str) -> None:
    """It still receives; it is limited, and gets its window back."""
    direction, line = Direction.DOWNLOAD, lab(round_trip_s=WAYS[Direction.DOWNLOAD])
    with line as own, ExitStack() as stack:
        address = own.wire.server.address
        command = own.inside(sys.executable, "-c", HALF_CLOSES, address, str(peer.PORT))
        client = stack.enter_context(
            subprocess.Popen(command, preexec_fn=lambda: scratch.move_in(0))
        )
        stack.callback(client.kill)
        time.sleep(1)
        before = now(scratch)
        with limited(scratch, direction, shape="gate") as live:
            if shaped_by == "kernel":
                needs_release(ADOPTS_SINCE, "a program that adopts open connections")
            time.sleep(2.5)
            found = sockets.tcp_of(scratch.pids_below())
            assert [TcpInfo.of(one).state for one in found] == [FIN_WAIT2]
            assert SHARES[0] <= rate_over(scratch, direction, 2) <= SHARES[1]
            live.set_limit(direction, None)
            assert any(rate_over(scratch, direction, 1) > 2 for _ in range(10))
        assert now(scratch).clamp >= before.clamp


@pytest.mark.since("6.1")  # what the kernel needs for the gate
@pytest.mark.parametrize("shaped_by", ["user space"], indirect=True)
def test_where_the_keeper_cannot_send_an_open_download_is_policed(
    scratch: Cgroup, shaped_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its window is left alone, and that is told."""
    monkeypatch.setattr(KeeperProcess, "_find_networks", lambda *_: [])
    direction, line = Direction.DOWNLOAD, lab(round_trip_s=WAYS[Direction.DOWNLOAD])
    with line as own, client(own, scratch, direction):
        time.sleep(1)
        before = now(scratch)
        with limited(scratch, direction, shape="gate") as live:
            # Its rounds take no more than a twentieth of the time, however slow the machine is.
            eventually(lambda: live.how()[direction]["open_connections"] == "1 policed")
            assert rate_over(scratch, direction, 3) >= 0.3
            assert now(scratch).clamp >= before.clamp


def test_a_new_rate_takes_hold_at_once(scratch: Cgroup) -> None:
    """Within 100 ms the connection is paced at the new rate; lifting the limit restores it."""
    direction = Direction.UPLOAD
    with lab(round_trip_s=WAYS[direction]) as own, limited(scratch, direction) as live:
        need_shaping(live, direction)
        with client(own, scratch, direction):
            time.sleep(0.5)
            live.set_limit(direction, Rate(RATE.bytes_per_s // 4))
            time.sleep(0.1)
            # It is a little more while there is credit: TCP paces its headers too.
            assert now(scratch).max_pacing <= RATE.bytes_per_s // 4 * 9 // 8
            assert 0.15 <= rate_over(scratch, direction, 2) <= 0.3
            live.set_limit(direction, None)
            time.sleep(0.5)
            assert now(scratch).max_pacing == UNLIMITED
            assert rate_over(scratch, direction, 1) > FASTER


@pytest.mark.parametrize(
    ("direction", "shape", "rate", "method"),
    [
        (Direction.UPLOAD, "police", "1M", "police"),
        (Direction.UPLOAD, "window", "1M", "police"),
        (Direction.DOWNLOAD, "pace", "1M", "police"),
        (Direction.DOWNLOAD, "auto", "100M", "gate"),
        (Direction.DOWNLOAD, "auto", "1G", "police"),
        (Direction.DOWNLOAD, "window", "100M", "window"),
        (Direction.UPLOAD, "auto", "1G", "pace"),
    ],
)
def test_the_method_is_chosen_and_told(
    scratch: Cgroup, direction: Direction, shape: str, rate: str, method: str
) -> None:
    """For the direction, the rate and what was asked for, with the reason."""
    with limited(scratch, direction, Rate.parse(rate), shape) as live:
        how = live.how()[direction]
        if method not in ("police", "gate"):
            need_shaping(live, direction)
        if method == "gate" != how["shape"]:
            needs_release("5.10", how["shape_reason"])
        assert how["shape"] == method
        assert how["shape_reason"]


@pytest.mark.parametrize("place", ["same", "above"])
def test_another_tools_exclusive_program_leaves_the_policer(scratch: Cgroup, place: str) -> None:
    """It has the hook of the shaper for itself; the limit is put in force all the same."""
    below = scratch.create_child("below")
    fd = (below if place == "same" else scratch).open()
    theirs = programs.load(
        asm.return_imm(1),
        type=ProgType.SOCK_OPS,
        license="GPL",
        name="theirs",
        expected_attach_type=AttachType.CGROUP_SOCK_OPS,
    )
    attachment = links.attach_legacy(theirs, fd, AttachType.CGROUP_SOCK_OPS, AttachMode.SINGLE)
    try:
        with limited(below, Direction.UPLOAD) as live:
            how = live.how()[Direction.UPLOAD]
            assert how["shape"] == "police"
            assert "cannot be had here: " in how["shape_reason"]
            assert len(attached(below, HOOKS)) == (2 if place == "same" else 1)
    finally:
        attachment.detach()
        theirs.close()
        os.close(fd)
        below.remove(patience_s=5)


class Uploading(NamedTuple):
    """A cgroup in which a connection uploads, and the tool that shapes it."""

    cgroup: Cgroup
    tool: list[str]

    @contextmanager
    def limited(self, *options: str) -> Iterator[subprocess.Popen[bytes]]:
        """The tool on the cgroup, once the connection is paced."""
        command = [*self.tool, "--upload-limit", "2M", "--whole-cgroup", "--cgroup"]
        with subprocess.Popen(
            [*command, self.cgroup.path, *options], stdout=subprocess.DEVNULL, env=ENVIRONMENT
        ) as process:
            try:
                deadline = time.monotonic() + 30
                while now(self.cgroup).max_pacing == UNLIMITED:
                    assert time.monotonic() < deadline
                    assert process.poll() is None
                    time.sleep(0.02)
                yield process
            finally:
                process.kill()


@pytest.fixture
def uploading(scratch: Cgroup, shaped_by: str) -> Iterator[Uploading]:
    """A connection that is open, and that can be shaped."""
    with lab() as own, client(own, scratch, Direction.UPLOAD):
        with limited(scratch, Direction.UPLOAD) as live:
            need_to_shape_open(live, shaped_by)
        yield Uploading(scratch, OPEN[shaped_by])


def restored(cgroup: Cgroup) -> bool:
    """Whether the connection is as it was, within a second."""
    deadline = time.monotonic() + 1
    while now(cgroup).max_pacing != UNLIMITED and time.monotonic() < deadline:
        time.sleep(0.02)
    return now(cgroup).max_pacing == UNLIMITED


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_the_tool_ends_connections_are_restored(
    uploading: Uploading, number: signal.Signals
) -> None:
    """Also after kill -9, by the process that waits for that."""
    with uploading.limited() as process:
        process.send_signal(number)
        process.wait()
        assert restored(uploading.cgroup)
    assert attached(uploading.cgroup) == []


@pytest.mark.alone
def test_cleanup_restores_what_a_crash_of_all_has_left(uploading: Uploading) -> None:
    """With the legacy call the programs stay, and so does what they know of connections."""
    with uploading.limited("--bpf-attach-method", "legacy") as process:
        [guard] = children(process.pid)
        os.kill(guard, signal.SIGKILL)
        process.kill()
        process.wait()
    assert now(uploading.cgroup).max_pacing != UNLIMITED
    subprocess.run([*TOOL, "cleanup"], env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True)
    assert restored(uploading.cgroup)
    assert attached(uploading.cgroup) == []


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()]


def test_other_connections_are_left_alone(scratch: Cgroup) -> None:
    """One of another cgroup keeps its pacing and its speed."""
    other = scratch.create_child("other")
    limited_one = scratch.create_child("limited")
    try:
        with lab() as own, client(own, other, Direction.UPLOAD):
            with limited(limited_one, Direction.UPLOAD):
                time.sleep(0.3)
                assert now(other).max_pacing == UNLIMITED
                assert rate_over(other, Direction.UPLOAD, 1) > FASTER
    finally:
        other.remove(patience_s=5)
        limited_one.remove(patience_s=5)


def test_an_open_connection_that_is_paced_loses_next_to_nothing(
    scratch: Cgroup, shaped_by: str
) -> None:
    """Once its packets that were on their way have arrived, it keeps to its limit by itself."""
    direction = Direction.UPLOAD
    with lab() as own, client(own, scratch, direction), limited(scratch, direction) as live:
        need_to_shape_open(live, shaped_by)
        time.sleep(1)
        before = live.counters()[direction]
        ratio = rate_over(scratch, direction, 4)
        after = live.counters()[direction]
    assert 0.9 <= ratio <= 1.1
    dropped = after.bytes_dropped - before.bytes_dropped
    assert dropped <= 0.02 * (after.bytes_total - before.bytes_total)


def test_open_connections_share_a_limit(scratch: Cgroup, shaped_by: str) -> None:
    """Two get about the same; when one of them ends the other has it all."""
    direction = Direction.UPLOAD
    first, second = (scratch.create_child(name) for name in ("first", "second"))
    try:
        with lab() as own, client(own, first, direction):
            with client(own, second, direction), limited(scratch, direction) as live:
                need_to_shape_open(live, shaped_by)
                time.sleep(1)
                before = [now(one).acked for one in (first, second)]
                time.sleep(4)
                acked = [now(one).acked - was for one, was in zip((first, second), before)]
                assert 0.9 <= sum(acked) / 4 / RATE.bytes_per_s <= 1.1
                assert min(acked) >= 0.4 * sum(acked)
                [kill] = second.pids()
                os.kill(kill, signal.SIGKILL)
                # What it had written already is still sent.
                assert any(0.9 <= rate_over(first, direction, 1) <= 1.1 for _ in range(8))
    finally:
        first.remove(patience_s=5)
        second.remove(patience_s=5)


def test_a_new_rate_is_for_open_connections_too(scratch: Cgroup, shaped_by: str) -> None:
    """A limit that is lifted gives them back what they had, and may come back."""
    direction = Direction.UPLOAD
    # The shaper has to wait for a segment, which may be one that was dropped.
    patience_s = {"kernel": 1.0, "user space": 0.1}[shaped_by]
    with lab() as own, client(own, scratch, direction), limited(scratch, direction) as live:
        need_to_shape_open(live, shaped_by)
        for rate, most in ((RATE, 2 << 20), (Rate(RATE.bytes_per_s // 4), 1 << 19)) * 2:
            live.set_limit(direction, rate)
            time.sleep(patience_s)
            assert now(scratch).max_pacing <= most * 9 // 8
            live.set_limit(direction, None)
            time.sleep(patience_s)
            assert now(scratch).max_pacing == UNLIMITED


def test_it_is_told_what_becomes_of_open_connections(scratch: Cgroup, shaped_by: str) -> None:
    """Where the kernel does not adopt them: how many are shaped from user space."""
    limits = dict.fromkeys(Direction, RATE)
    with lab() as own, client(own, scratch, Direction.UPLOAD):
        with throttle.apply([scratch], limits) as live:
            need_to_shape_open(live, shaped_by)
            has_gate = live.how()[Direction.DOWNLOAD]["shape"] == "gate"
            told = {str(name): how.get("open_connections") for name, how in live.how().items()}
    if running() >= parse("6.1"):
        assert has_gate
    if shaped_by == "kernel":
        assert told == {"upload": None, "download": None}
    else:
        downloads = "gated from user space" if has_gate else "policed"
        assert told == {"upload": "1 paced from user space", "download": f"1 {downloads}"}


def test_a_connection_that_was_brought_along_is_limited_too(
    scratch: Cgroup, shaped_by: str
) -> None:
    """It belongs to the cgroup that its process was in, and is limited by a mark beside it."""
    before, after = (scratch.create_child(name) for name in ("before", "after"))
    try:
        with lab() as own, client(own, before, Direction.UPLOAD):
            [pid] = before.pids()
            after.move_in(pid)
            with limited(after, Direction.UPLOAD):
                time.sleep(2)
                assert rate_over(after, Direction.UPLOAD, 2) < 2
    finally:
        before.remove(patience_s=5)
        after.remove(patience_s=5)


def test_what_is_paced_can_be_closed_by_its_owner(scratch: Cgroup, shaped_by: str) -> None:
    """Nobody else keeps a descriptor of it: it ends with its owner's."""
    with lab() as own, client(own, scratch, Direction.UPLOAD):
        with limited(scratch, Direction.UPLOAD) as live:
            need_to_shape_open(live, shaped_by)
            time.sleep(0.5)
            [pid] = scratch.pids()
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.3)
            table = subprocess.check_output(own.inside("cat", "/proc/net/tcp"), text=True)
            states = [line.split()[3] for line in table.splitlines()[1:]]
            assert "01" not in states  # ESTABLISHED
