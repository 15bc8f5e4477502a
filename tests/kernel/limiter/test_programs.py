"""Each program of each shipped object: what it bills a packet, and what it does over the limit."""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Iterator

import pytest
from since import needs_release

from pybpfthrottle import networks
from pybpfthrottle.backends.ebpf import features
from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.backends.ebpf.bucket import config_for, with_room
from pybpfthrottle.backends.ebpf.programs import Role, Scope, Shipped
from pybpfthrottle.backends.ebpf.records import (
    RECORD,
    ThrottleBucket,
    ThrottleConfig,
    ThrottleRecord,
    ThrottleStats,
)
from pybpfthrottle.bpf import links, loader
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.linux import clock
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import MAX_RATE, MIN_RATE, Direction, Rate

TCP, UDP, ICMPV6 = 6, 17, 58
HOP, ROUTING, FRAGMENT, AUTHENTICATION, DESTINATION, MOBILITY = 0, 43, 44, 51, 60, 135


def tcp(payload: int, *, options: int = 0) -> bytes:
    """A TCP header with so many bytes of options, and a payload."""
    data_offset = (5 + options // 4) << 4
    return struct.pack(">HHIIBBHHH", 1, 2, 0, 0, data_offset, 16, 0, 0, 0) + bytes(
        options + payload
    )


def ipv4(protocol: int, rest: bytes, *, options: int = 0, fragment: int = 0) -> bytes:
    """An IPv4 packet; ``fragment`` is its field of flags and offset."""
    first = 0x40 | 5 + options // 4
    length = 20 + options + len(rest)
    header = struct.pack(">BBHHHBBHII", first, 0, length, 0, fragment, 64, protocol, 0, 1, 2)
    return header + bytes(options) + rest


def ipv6(next_header: int, rest: bytes) -> bytes:
    """An IPv6 packet."""
    return struct.pack(">IHBB32s", 6 << 28, len(rest), next_header, 64, b"\x20" * 32) + rest


def extension(next_header: int, *, units: int = 0) -> bytes:
    """An extension header of 8 bytes, and 8 more for each unit."""
    return bytes([next_header, units]) + bytes(6 + 8 * units)


def fragment(next_header: int, *, offset: int) -> bytes:
    """A fragment header; the offset is in units of 8 bytes."""
    return struct.pack(">BBHI", next_header, 0, offset << 3, 7)


AUTHENTICATION_HEADER = bytes([TCP, 4]) + bytes(22)  # (4 + 2) * 4 bytes

# The packet, and what it is billed; None is its whole length.
PACKETS = {
    "TCP": (ipv4(TCP, tcp(1000)), 1000),
    "TCP with options": (ipv4(TCP, tcp(1000, options=12)), 1000),
    "TCP with IP options": (ipv4(TCP, tcp(1000), options=8), 1000),
    "a pure ACK": (ipv4(TCP, tcp(0, options=12)), 0),
    "UDP": (ipv4(UDP, bytes(108)), None),
    "less than IP and TCP": (ipv4(UDP, bytes(8)), None),
    "a first fragment of TCP": (ipv4(TCP, tcp(1000), fragment=0x2000), 1000),
    "a later fragment of TCP": (ipv4(TCP, tcp(1000), fragment=0x2000 | 185), None),
    "a TCP header that is too long": (ipv4(TCP, tcp(0)[:12] + b"\xf0" + bytes(27)), None),
    "IPv6 TCP": (ipv6(TCP, tcp(1000)), 1000),
    "IPv6 TCP with options": (ipv6(TCP, tcp(1000, options=20)), 1000),
    "IPv6 UDP": (ipv6(UDP, bytes(208)), None),
    "IPv6 ICMP": (ipv6(ICMPV6, bytes(64)), None),
    "one extension header": (ipv6(HOP, extension(TCP) + tcp(1000)), 1000),
    "a long extension header": (ipv6(DESTINATION, extension(TCP, units=5) + tcp(999)), 999),
    "three extension headers": (
        ipv6(HOP, extension(ROUTING) + extension(DESTINATION) + extension(TCP) + tcp(1000)),
        1000,
    ),
    "six extension headers": (
        ipv6(HOP, extension(DESTINATION) * 5 + extension(TCP) + tcp(1000)),
        1000,
    ),
    "seven extension headers": (
        ipv6(HOP, extension(DESTINATION) * 6 + extension(TCP) + tcp(50)),
        None,
    ),
    "a first IPv6 fragment": (ipv6(FRAGMENT, fragment(TCP, offset=0) + tcp(1000)), 1000),
    "a later IPv6 fragment": (ipv6(FRAGMENT, fragment(TCP, offset=100) + tcp(1000)), None),
    "an authentication header": (ipv6(AUTHENTICATION, AUTHENTICATION_HEADER + tcp(777)), 777),
    "a mobility header": (ipv6(MOBILITY, extension(TCP) + tcp(5)), 5),
    "no IP": (b"\x00" * 100, None),
}  # fmt: skip


NETWORKS = networks.traffic(
    to=["192.0.2.0/24", "2001:db8::/32"], but=["192.0.2.64/26", "2001:db8:7::/48"]
)


class Bench:
    """The programs of one object with their maps."""

    def __init__(self, loaded: Object) -> None:
        self.programs = loaded.programs
        self.configs = loaded.maps["CGROUP_CONFIGS"].typed(U32, StructureCodec(ThrottleConfig))
        self.buckets = loaded.maps["CGROUP_BUCKETS"].typed(U32, StructureCodec(ThrottleBucket))
        self.maps = loaded.maps
        self.stats = loaded.maps["CGROUP_STATS"].typed(U32, StructureCodec(ThrottleStats))

    def run(self, program: str, packet: bytes, *, repeat: int = 1) -> int:
        """Run on a packet of the loopback device, as test packets are; the verdict."""
        version = 0x86DD if packet[0] >> 4 == 6 else 0x0800
        ethernet = bytes(12) + struct.pack(">H", version)
        return self.programs[program].test_run(ethernet + packet, repeat=repeat).retval

    def total(self, direction: Direction, field: str) -> int:
        """A counter over all CPUs."""
        return sum(getattr(cpu, field) for cpu in self.stats[direction])


@pytest.fixture(params=["throttle", "throttle-direct"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """All programs of an object, the loopback device limited to a rate that is never reached."""
    if request.param == "throttle-direct":
        needs_release(features.TEST_RUN_PACKET.since, features.TEST_RUN_PACKET.name)
    spec = shipped.read(request.param)
    if request.param == "throttle-direct":
        spec = with_room(spec, NETWORKS)
    with loader.load(spec, PROGRAMS) as loaded:
        own = Bench(loaded)
        for direction in Direction:
            own.configs[direction] = config_for(MAX_RATE, loopback=True)
        yield own


# The direction of each, and what it returns for a packet that it drops.
PROGRAMS = {
    program.name: (program.direction, 2 if program.verdict == "congestion" else 0)
    for program in shipped.with_role(Role.POLICE, Scope.ALL)
}


@pytest.mark.parametrize("name", PACKETS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_packet_is_billed(bench: Bench, program: str, name: str) -> None:
    """TCP is billed by its payload, all else by its IP length."""
    packet, billed = PACKETS[name]
    direction, _ = PROGRAMS[program]
    assert bench.run(program, packet) == 1
    assert bench.total(direction, "packets_total") == 1
    assert bench.total(direction, "bytes_total") == (len(packet) if billed is None else billed)


@pytest.mark.parametrize("program", PROGRAMS)
def test_over_the_limit_packets_are_dropped_and_counted(bench: Bench, program: str) -> None:
    """Once the bucket owes its debt, a packet is dropped and counted as such."""
    direction, drop = PROGRAMS[program]
    bench.configs[direction] = config_for(MIN_RATE, loopback=True)
    packet, _ = PACKETS["TCP"]
    verdicts = [bench.run(program, packet) for _ in range(100)]
    dropped = verdicts.count(drop)
    assert verdicts == [1] * (100 - dropped) + [drop] * dropped
    assert 0 < dropped < 100
    assert bench.total(direction, "packets_dropped") == dropped
    assert bench.total(direction, "bytes_dropped") == 1000 * bench.total(
        direction, "packets_dropped"
    )
    other = Direction.UPLOAD if direction is Direction.DOWNLOAD else Direction.DOWNLOAD
    assert bench.total(other, "program_calls") == 0


def test_a_pure_acknowledgement_passes_over_the_limit(bench: Bench) -> None:
    """What is billed nothing is never dropped."""
    bench.configs[Direction.DOWNLOAD] = config_for(MIN_RATE, loopback=True)
    bench.run("pybpft_ingress", PACKETS["TCP"][0], repeat=1000)
    dropped = bench.total(Direction.DOWNLOAD, "packets_dropped")
    assert dropped > 0
    assert bench.run("pybpft_ingress", PACKETS["a pure ACK"][0]) == 1
    assert bench.total(Direction.DOWNLOAD, "packets_dropped") == dropped


def test_small_packets_have_an_allowance(bench: Bench) -> None:
    """A packet below 160 bytes passes for 20 ms after larger ones are dropped."""
    config = config_for(MIN_RATE, loopback=True)
    config.debt_ns = 0
    config.small_ns = 3_600_000_000_000
    bench.configs[Direction.DOWNLOAD] = config
    large, small = ipv4(UDP, bytes(140)), ipv4(UDP, bytes(139))
    bench.run("pybpft_ingress", large)
    bench.run("pybpft_ingress", large)
    assert bench.run("pybpft_ingress", large) == 0
    assert bench.run("pybpft_ingress", small) == 1


def test_loopback_is_exempt_unless_asked_for(bench: Bench) -> None:
    """Without the flag a packet of the loopback device is let through and not counted."""
    bench.configs[Direction.DOWNLOAD] = config_for(MIN_RATE, loopback=False)
    assert bench.run("pybpft_ingress", PACKETS["TCP"][0]) == 1
    assert bench.total(Direction.DOWNLOAD, "program_calls") == 1
    assert bench.total(Direction.DOWNLOAD, "packets_total") == 0


def from_to(packet: bytes, source: str, target: str) -> bytes:
    """A packet with other addresses."""
    ends = ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed
    at = 12 if packet[0] >> 4 == 4 else 8
    return packet[:at] + ends + packet[at + len(ends) :]


@pytest.mark.parametrize(
    ("name", "near", "nearer", "far", "own"),
    [
        ("TCP", "192.0.2.9", "192.0.2.77", "198.51.100.1", "10.0.0.1"),
        ("IPv6 TCP", "2001:db8::9", "2001:db8:7::1", "2001:db9::1", "fd00::1"),
    ],
    ids=["IPv4", "IPv6"],
)
@pytest.mark.parametrize("bench", ["throttle-direct"], indirect=True)
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_smallest_network_of_the_other_end_decides(
    bench: Bench, program: str, name: str, near: str, nearer: str, far: str, own: str
) -> None:
    """What is sent is told by where it goes, what is received by where it comes from."""
    tree = bench.maps["CGROUP_NETWORKS"].elements
    for network, limited in networks.decisions(NETWORKS).items():
        tree.update(networks.key(network), U32.encode(limited))
    direction, _ = PROGRAMS[program]
    bench.configs[direction] = config_for(MAX_RATE, loopback=True, networks=True)
    counted = []
    for other in (near, nearer, far, own):
        ends = (other, own) if direction is Direction.DOWNLOAD else (own, other)
        assert bench.run(program, from_to(PACKETS[name][0], *ends)) == 1
        counted.append(bench.total(direction, "packets_total"))
    assert counted == [1, 1, 1, 1]


@pytest.mark.parametrize("program", PROGRAMS)
def test_after_its_time_all_packets_pass(bench: Bench, program: str) -> None:
    """And none is dropped any more, whatever is owed."""
    direction, drop = PROGRAMS[program]
    soon = clock.boottime_ns() + 400_000_000
    bench.configs[direction] = config_for(MIN_RATE, loopback=True, expires_ns=soon)
    packet, _ = PACKETS["TCP"]
    assert drop in [bench.run(program, packet) for _ in range(100)]
    time.sleep(max(0, soon - clock.boottime_ns()) / 1e9)
    assert {bench.run(program, packet) for _ in range(100)} == {1}


@pytest.mark.parametrize("program", PROGRAMS)
def test_rate_zero_is_unlimited(bench: Bench, program: str) -> None:
    """A record of zeros disarms a program: an orphan can be made harmless through its map."""
    direction, _ = PROGRAMS[program]
    bench.configs[direction] = config_for(MIN_RATE, loopback=True)
    bench.run(program, PACKETS["TCP"][0], repeat=1000)
    bench.configs[direction] = config_for(None, loopback=True)
    dropped = bench.total(direction, "packets_dropped")
    bench.run(program, PACKETS["TCP"][0], repeat=1000)
    assert bench.total(direction, "packets_dropped") == dropped > 0


def test_a_new_limit_keeps_the_bucket(bench: Bench) -> None:
    """Writing a configuration does not touch what the bucket owes."""
    bench.configs[Direction.DOWNLOAD] = config_for(MIN_RATE, loopback=True)
    bench.run("pybpft_ingress", PACKETS["TCP"][0], repeat=10)
    before = bench.buckets[Direction.DOWNLOAD].even_at_ns
    bench.configs[Direction.DOWNLOAD] = config_for(MAX_RATE, loopback=True)
    assert bench.buckets[Direction.DOWNLOAD].even_at_ns == before > 0


def owed_ns(bench: Bench) -> int:
    """How far the bucket of downloads runs ahead of the clock."""
    return bench.buckets[Direction.DOWNLOAD].even_at_ns - time.monotonic_ns()


def owe(bench: Bench, seconds: float, rate: Rate) -> None:
    """Let downloads have a limit, and owe so much time at it."""
    bench.configs[Direction.DOWNLOAD] = config_for(rate, loopback=True)
    bench.run("pybpft_ingress", PACKETS["TCP"][0])
    bucket = bench.buckets[Direction.DOWNLOAD]
    assert bucket.inverse_rate == bench.configs[Direction.DOWNLOAD].inverse_rate > 0
    bucket.even_at_ns = time.monotonic_ns() + int(seconds * 1e9)
    bench.buckets[Direction.DOWNLOAD] = bucket


@pytest.mark.parametrize(
    ("before", "after", "owed_s", "expected_s"),
    [
        (Rate(100_000), Rate(50_000), 1000, 2000),
        (Rate(50_000), Rate(100_000), 1000, 500),
        (Rate(100_000), Rate(100_000), 1000, 1000),
        (MIN_RATE, MAX_RATE, 8000, 8000 * MIN_RATE.bytes_per_s / MAX_RATE.bytes_per_s),
        (MAX_RATE, Rate(MAX_RATE.bytes_per_s // 1000), 5, 5000),
        # More than can be calculated with, which is 2.4 hours at any rate.
        (MAX_RATE, MIN_RATE, 10, 8796),
        (MIN_RATE, Rate(2 * MIN_RATE.bytes_per_s), 20_000, 4398),
    ],
)
def test_what_is_owed_is_owed_in_bytes(
    bench: Bench, before: Rate, after: Rate, owed_s: float, expected_s: float
) -> None:
    """At half the rate a debt lasts twice as long, whatever the rates, from the next packet on."""
    owe(bench, owed_s, before)
    bench.configs[Direction.DOWNLOAD] = config_for(after, loopback=True)
    bench.run("pybpft_ingress", PACKETS["TCP"][0])
    bucket = bench.buckets[Direction.DOWNLOAD]
    assert bucket.inverse_rate == bench.configs[Direction.DOWNLOAD].inverse_rate
    # A machine that is busy may take a while between writing and running.
    assert owed_ns(bench) / 1e9 == pytest.approx(expected_s, rel=0.05, abs=0.2)


def test_what_was_charged_once_is_not_scaled_again(bench: Bench) -> None:
    """The second packet after a change finds the debt as the first one has left it."""
    owe(bench, 1000, Rate(100_000))
    bench.configs[Direction.DOWNLOAD] = config_for(Rate(50_000), loopback=True)
    bench.run("pybpft_ingress", PACKETS["TCP"][0])
    first = bench.buckets[Direction.DOWNLOAD].even_at_ns
    bench.run("pybpft_ingress", PACKETS["TCP"][0])
    assert bench.buckets[Direction.DOWNLOAD].even_at_ns == first


def test_the_debt_outlasts_a_limit_that_was_lifted_meanwhile(bench: Bench) -> None:
    """Lifted and put in force again at half the rate, what is still owed lasts twice as long."""
    owe(bench, 1000, Rate(100_000))
    for rate in (None, Rate(50_000)):
        bench.configs[Direction.DOWNLOAD] = config_for(rate, loopback=True)
        bench.run("pybpft_ingress", PACKETS["TCP"][0])
    assert owed_ns(bench) / 1e9 == pytest.approx(2000, rel=0.05)


@pytest.mark.parametrize("of", ["config", "bucket"])
def test_the_greater_slack_counts(bench: Bench, of: str) -> None:
    """What user space allows beyond the debt and what the programs allow are not added up."""
    config = config_for(Rate(100_000), loopback=True)
    config.debt_ns, config.small_ns = 0, 0
    config.slack_ns = 100_000_000_000 if of == "config" else 1
    bench.configs[Direction.DOWNLOAD] = config
    bench.run("pybpft_ingress", PACKETS["TCP"][0])
    bucket = bench.buckets[Direction.DOWNLOAD]
    bucket.slack_ns = 100_000_000_000 if of == "bucket" else 1
    for ahead_s, passes in ((90, 1), (110, 0)):
        bucket.even_at_ns = time.monotonic_ns() + ahead_s * 1_000_000_000
        bench.buckets[Direction.DOWNLOAD] = bucket
        assert bench.run("pybpft_ingress", PACKETS["TCP"][0]) == passes


def test_programs_write_nothing_of_user_space(bench: Bench) -> None:
    """The configuration is as it was written after packets have passed and been dropped."""
    config = bytes(config_for(MIN_RATE, loopback=True))
    for program, (direction, _) in PROGRAMS.items():
        bench.configs[direction] = ThrottleConfig.from_buffer_copy(config)
        bench.run(program, PACKETS["TCP"][0], repeat=1000)
        assert bench.total(direction, "packets_dropped") > 0
        assert bytes(bench.configs[direction]) == config


@pytest.mark.parametrize(
    ("name", "program"),
    [
        (name, program)
        for name in shipped.OBJECTS
        for program in shipped.of_object(name)
        if program.role not in (Role.COUNT, Role.SHARED)  # of no throttle
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_each_program_holds_the_record(name: str, program: Shipped) -> None:
    """The kernel tells the id of the map with the throttle's record to whoever asks a program."""
    direct = name in ("throttle-direct", shipped.ENTRIES)
    for release in (program.needs.release, "5.0" if direct else "4.15"):
        needs_release(release)
    with loader.load(shipped.read(name), [program.name]) as loaded:
        record = loaded.maps[RECORD]
        assert record.info().id in loaded.programs[program.name].info().map_ids
        assert record.spec.value_size == ctypes.sizeof(ThrottleRecord)


def test_only_what_is_selected_is_loaded() -> None:
    """A program that was not selected is not loaded, nor is a map that nothing uses."""
    spec = shipped.read("throttle")
    with loader.load(spec, ["pybpft_ingress"]) as loaded:
        assert list(loaded.programs) == ["pybpft_ingress"]
    with loader.load(spec, []) as loaded:
        assert not loaded.programs
        assert not loaded.maps


def test_an_object_for_the_other_byte_order_is_refused() -> None:
    """The big-endian object is read here, but not loaded."""
    from pybpfthrottle.bpf.obj import elf
    from pybpfthrottle.errors import ObjectFileError

    other = "bpfeb" if sys.byteorder == "little" else "bpfel"
    spec = elf.read_object(shipped.data(f"throttle.{other}.o"))
    with pytest.raises(ObjectFileError, match="endian"):
        loader.load(spec)


CLIENT = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as own:
    own.sendall(bytes(5_000_000))
    own.shutdown(socket.SHUT_WR)
    while own.recv(1 << 16):
        pass
"""


def exchange(scratch: Cgroup, host: str) -> None:
    """Send 5 MB each way between a client in the cgroup and a server outside."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.create_server((host, 0), family=family)

    def answer() -> None:
        peer, _ = server.accept()
        with peer:
            while peer.recv(1 << 16):
                pass
            peer.sendall(bytes(5_000_000))

    thread = threading.Thread(target=answer)
    thread.start()
    with server:
        subprocess.run(
            [sys.executable, "-c", CLIENT, host, str(server.getsockname()[1])],
            preexec_fn=lambda: scratch.move_in(0),
            check=True,
        )
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("name", ["throttle", "throttle-direct"])
def test_a_real_connection_is_billed_to_the_byte(scratch: Cgroup, name: str, host: str) -> None:
    """Of 5 MB each way over TCP each object bills exactly that, in both directions."""
    if name == "throttle-direct":
        needs_release(features.DIRECT_PACKET_ACCESS.since, features.DIRECT_PACKET_ACCESS.name)
    policers = {each: shipped.policer(Scope.ALL, each, "deny") for each in Direction}
    billed = []
    with loader.load(shipped.read(name), PROGRAMS) as loaded, ExitStack() as stack:
        own = Bench(loaded)
        fd = scratch.open()
        stack.callback(os.close, fd)
        for direction, program in policers.items():
            own.configs[direction] = config_for(MAX_RATE, loopback=True)
            live = loaded.programs[program.name]
            stack.callback(links.attach_legacy(live, fd, program.attach_type).detach)
        # On a busy machine TCP may probe for a loss that was none, and send its last bytes twice.
        for _ in range(5):
            before = [own.total(direction, "bytes_total") for direction in policers]
            exchange(scratch, host)
            after = [own.total(direction, "bytes_total") for direction in policers]
            billed.append([last - first for first, last in zip(before, after)])
        assert [own.total(direction, "packets_dropped") for direction in policers] == [0, 0]
    assert [5_000_000, 5_000_000] in billed
    assert min(min(pair) for pair in billed) == 5_000_000
