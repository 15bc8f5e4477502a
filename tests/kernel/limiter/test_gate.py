"""The gate: downloads keep to their limit on any way, and nothing is lost or sent twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator

import pytest
from echo import PORT, Near
from lab import Lab, lab
from since import needs_command, needs_option, needs_release
from targets import eventually, live_map
from test_udp import RECEIVER, SENDER

from pybpfthrottle import diversion, throttle
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.records import ThrottleBucket, ThrottleGate
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.conditions.model import Impairment
from pybpfthrottle.demo.wire import DEVICE, Wire
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.throttle import Throttle

pytestmark = pytest.mark.timed

DOWNLOAD = Direction.DOWNLOAD
RATE = Rate.parse("2M")
# Both ends of a download whose segments have signatures (struct tcp_md5sig).
SIGNED = """
import socket, struct, sys
role, own, other = sys.argv[1:]
signed = socket.socket()
address = struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(other))
signed.setsockopt(6, 14, struct.pack("=128sBBHi80s", address, 0, 0, 3, 0, b"key"))
if role == "serve":
    signed.bind((own, 7001))
    signed.listen()
    print("ready", flush=True)
    accepted, _ = signed.accept()
    while True:
        accepted.sendall(bytes(1 << 16))
signed.connect((other, 7001))
while signed.recv(1 << 16):
    pass
"""
# A server that sends so many bytes each 20 ms on each of some connections, once it has them all,
# and their client, which opens them so many milliseconds apart.
SLOW = """
import select, socket, sys, time
role, server, count, octets, apart_ms = *sys.argv[1:3], *map(int, sys.argv[3:])
if role == "serve":
    listening = socket.create_server((server, 7002))
    print("ready", flush=True)
    accepted = [listening.accept()[0] for _ in range(count)]
    while True:
        for one in accepted:
            one.sendall(bytes(octets))
        time.sleep(0.02)
connected = []
for _ in range(count):
    connected.append(socket.create_connection((server, 7002)))
    time.sleep(apart_ms / 1000)
print("ready", flush=True)
while True:
    for one in select.select(connected, [], [])[0]:
        one.recv(1 << 16)
"""
# Connections on which nothing comes, and which end, every other one by a reset, at a line of input.
SILENT = """
import socket, struct, sys
listening = socket.create_server((sys.argv[2], 7003)) if sys.argv[1] == "serve" else None
if not listening:
    ends = [socket.create_connection((sys.argv[2], 7003)) for _ in range(20)]
    for one in ends[::2]:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
print("ready", flush=True)
sys.stdin.readline()
if not listening:
    for one in ends:
        one.close()
    print("closed", flush=True)
    sys.stdin.readline()
"""
# Those that any network namespace may choose: reno, and the machine's own.
CONTROLS = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()


@contextmanager
def limited(own: Lab, cgroup: Cgroup, rate: Rate = RATE) -> Iterator[Throttle]:
    """A throttle whose downloads go by way of the gate, with a process where they will begin."""
    waits = subprocess.Popen(
        own.inside("cat"), stdin=subprocess.PIPE, preexec_fn=lambda: cgroup.move_in(0)
    )
    try:
        while os.readlink(f"/proc/{waits.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.005)
        with gated(cgroup, rate) as live:
            yield live
    finally:
        waits.kill()
        waits.communicate()


def gated(cgroup: Cgroup, rate: Rate = RATE) -> Throttle:
    """The same without a process."""
    live = throttle.apply([cgroup], {DOWNLOAD: rate}, options=Options(shape={DOWNLOAD: "gate"}))
    how = live.how()[DOWNLOAD]
    if how["shape"] != "gate":
        live.remove()
        needs_release("5.10", how["shape_reason"])
        needs_option("CONFIG_DEBUG_INFO_BTF", works=False)
    return live


@contextmanager
def downloads(
    own: Lab, cgroup: Cgroup, count: int = 1, *, url: str = "", user: int = 0, device: str = ""
) -> Iterator[None]:
    """So many downloads in a cgroup, which go on meanwhile."""
    command = ["curl", "--globoff", "-sN", "--max-time", "60", url or own.url]
    if device:
        command += ["--interface", device]
    if user:
        command = ["setpriv", f"--reuid={user}", "--clear-groups", *command]
    with ExitStack() as ending:
        for _ in range(count):
            client = subprocess.Popen(
                own.inside(*command),
                stdout=subprocess.DEVNULL,
                preexec_fn=lambda: cgroup.move_in(0),
            )
            ending.callback(client.wait)
            ending.callback(client.kill)
        yield


def passed(live: Throttle) -> int:
    """What has come so far."""
    return live.counters()[DOWNLOAD].bytes_passed


def ratio(live: Throttle, seconds: float, rate: Rate = RATE) -> float:
    """What comes meanwhile, over the limit."""
    begin, before = time.monotonic(), passed(live)
    time.sleep(seconds)
    return (passed(live) - before) / (time.monotonic() - begin) / rate.bytes_per_s


def sent_twice(own: Lab) -> int:
    """The segments that the server has sent once more so far."""
    nstat = own.wire.server.inside("cat", "/proc/net/snmp")
    names, values = [
        line.split()
        for line in subprocess.run(nstat, capture_output=True, text=True).stdout.splitlines()
        if line.startswith("Tcp:")
    ]
    return int(values[names.index("RetransSegs")])


def keeper() -> int:
    """The keeper of the throttle of this process, by its id."""
    tasks = Path("/proc/self/task").iterdir()
    own = [pid for task in tasks for pid in (task / "children").read_text().split()]
    found = [pid for pid in own if Path(f"/proc/{pid}/comm").read_text().strip() == "pybpft-keeper"]
    assert len(found) == 1, own
    return int(found[0])


def taken() -> int:
    """How many packets the gate has told its keeper of."""
    with live_map("GATE") as shared:
        gates = shared.typed(U32, StructureCodec(ThrottleGate)).values()
        return int(sum(gate.taken for gate in gates))


# On a wire nothing limits how soon an acknowledgement comes: there the window is no means.
CASES = {
    "one": {"rate": "1M"},
    "eight": {"rate": "1M", "count": 8},
    "many": {"rate": "2M", "count": 40},
    "fast": {"rate": "20M", "count": 4},
    "slow": {"rate": "200K"},
    "ipv6": {"rate": "2M", "ipv6": True},
    "far": {"rate": "2M", "count": 2, "round_trip_s": 0.02},
    "jumbo frames": {"rate": "2M", "count": 4, "link": "mtu 9000"},
    "largest packets": {"rate": "10M", "link": "mtu 65535"},
    "one packet at a time": {"rate": "2M", "count": 4, "link": "gso_max_segs 1"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_download_keeps_to_its_limit_without_a_loss(scratch: Cgroup, case: str) -> None:
    """However short or long the way is: that is what the gate is for."""
    given = dict(CASES[case])
    rate, count = Rate.parse(given.pop("rate")), given.pop("count", 1)
    link = given.pop("link", "")
    with lab(**given) as own, limited(own, scratch, rate) as live:
        if link:
            own.wire.change(link)
        with downloads(own, scratch, count):
            time.sleep(1)
            assert 0.94 <= ratio(live, 3, rate) <= 1.04
            counters = live.counters()[DOWNLOAD]
            assert live.how()[DOWNLOAD]["shape"] == "gate"
            assert taken() > 0
        assert sent_twice(own) <= 0.01 * counters.packets_total
    assert counters.bytes_dropped <= 0.01 * counters.bytes_total


@contextmanager
def slow_servers(
    own: Lab, cgroup: Cgroup, count: int, octets: int, apart_ms: int = 0
) -> Iterator[None]:
    """So many connections in a cgroup, on each of which so many bytes come each 20 ms."""
    given = (own.wire.server.address, *map(str, (count, octets, apart_ms)))
    with ExitStack() as ending:
        for role, side in (("serve", own.wire.server), ("ask", own.wire.client)):
            started = subprocess.Popen(
                side.inside(sys.executable, "-c", SLOW, role, *given),
                stdout=subprocess.PIPE,
                preexec_fn=None if role == "serve" else lambda: cgroup.move_in(0),
            )
            ending.callback(started.communicate)
            ending.callback(started.kill)
            assert started.stdout is not None
            assert started.stdout.readline()
        yield


def test_slow_servers_leave_the_limit_to_a_fast_one(scratch: Cgroup) -> None:
    """They do not use their windows, whose sum is many times what the limit lets pass."""
    rate = Rate.parse("10M")
    with lab(round_trip_s=0.05) as own, limited(own, scratch, rate) as live:
        with slow_servers(own, scratch, 8, 2000):
            time.sleep(2)
            with downloads(own, scratch):
                time.sleep(2)
                assert ratio(live, 3, rate) >= 0.9


def test_many_small_flows_leave_the_limit_to_a_large_one(scratch: Cgroup) -> None:
    """Each has a window of two segments, and uses some hundred bytes of it in a round trip."""
    rate = Rate.parse("1M")
    with lab(round_trip_s=0.003) as own, limited(own, scratch, rate) as live:
        with downloads(own, scratch), slow_servers(own, scratch, 30, 300):
            time.sleep(1.5)
            assert 0.9 <= ratio(live, 3, rate) <= 1.05


def test_what_many_connections_were_promised_one_by_one_may_come_at_once(scratch: Cgroup) -> None:
    """Each has a first window of a segment or two: together most of a second's worth."""
    with lab() as own, limited(own, scratch, Rate.parse("250K")) as live:
        with slow_servers(own, scratch, 80, 2000, apart_ms=50):
            time.sleep(1.5)
            assert live.counters()[DOWNLOAD].bytes_passed >= 80 * 1448
            assert live.counters()[DOWNLOAD].packets_dropped == sent_twice(own) == 0


def test_nothing_is_awaited_on_connections_that_have_ended(scratch: Cgroup) -> None:
    """What they were promised may not be owed by others for as long as the limit is in force."""

    def awaited() -> int:
        with live_map("CGROUP_BUCKETS") as shared:
            buckets = shared.typed(U32, StructureCodec(ThrottleBucket)).values()
            return int(sum(bucket.awaited for bucket in buckets))

    with lab() as own, limited(own, scratch), ExitStack() as ending:
        for role, side in (("serve", own.wire.server), ("ask", own.wire.client)):
            started = subprocess.Popen(
                side.inside(sys.executable, "-c", SILENT, role, own.wire.server.address),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                preexec_fn=None if role == "serve" else lambda: scratch.move_in(0),
            )
            ending.callback(started.communicate)
            ending.callback(started.kill)
            assert started.stdin is not None
            assert started.stdout is not None
            assert started.stdout.readline() == b"ready\n"
        assert awaited() >= 20 * 536
        started.stdin.write(b"\n")
        started.stdin.flush()
        assert started.stdout.readline() == b"closed\n"
        eventually(lambda: awaited() == 0)


def test_downloads_do_not_run_ahead_beside_a_small_flow(scratch: Cgroup) -> None:
    """Of that, TCP takes for the round trip how long it takes until a window is full: a second."""
    rate = Rate.parse("500K")
    with lab(round_trip_s=0.003) as own, limited(own, scratch, rate) as live:
        with slow_servers(own, scratch, 1, 64), downloads(own, scratch, 4):
            time.sleep(0.5)
            assert 0.94 <= ratio(live, 3, rate) <= 1.03


def test_a_pause_is_not_made_up_for(scratch: Cgroup) -> None:
    """A slow start from far away is, but nothing was sent too slowly when nothing was asked for."""
    with lab(round_trip_s=0.1) as own, limited(own, scratch) as live:
        with downloads(own, scratch, 4):
            time.sleep(1.5)
        time.sleep(1)
        before = passed(live)
        with downloads(own, scratch, 4):
            while passed(live) == before:
                time.sleep(0.01)
            assert ratio(live, 1.5) <= 1.06


def test_nothing_is_saved_before_a_download(scratch: Cgroup) -> None:
    """Its first packets would come at once, and never be made up for."""
    rate = Rate.parse("500K")
    with lab(round_trip_s=0.02) as own, limited(own, scratch, rate) as live:
        with slow_servers(own, scratch, 1, 64):
            time.sleep(0.5)
            before = passed(live)
            with downloads(own, scratch, 8):
                while passed(live) - before < 3000:
                    time.sleep(0.005)
                assert 0.97 <= ratio(live, 2, rate) <= 1.02


def test_when_the_limit_ends_nothing_waits(scratch: Cgroup) -> None:
    """Windows that were closed are opened, and TCP goes on by itself."""
    with lab() as own, limited(own, scratch) as live, downloads(own, scratch):
        time.sleep(0.5)
        live.set_limit(DOWNLOAD, None)
        assert ratio(live, 1) > 5
        live.set_limit(DOWNLOAD, RATE)
        time.sleep(1)
        assert 0.9 <= ratio(live, 2) <= 1.06


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("round_trip_s", [0, 0.02])
def test_a_download_that_was_open_has_to_slow_down_at_once(
    scratch: Cgroup, round_trip_s: float, control: str
) -> None:
    """Its window of megabytes is taken back; what was on its way is all that is dropped."""
    rate = Rate.parse("500K")
    with lab(round_trip_s=round_trip_s, control=control) as own, downloads(own, scratch):
        time.sleep(2)
        with gated(scratch, rate) as live:
            time.sleep(2)
            before = live.counters()[DOWNLOAD].bytes_dropped
            if not before:
                needs_release("6.12", "connections that are open are not adopted")
            # Reno takes its time to send again what was dropped.
            assert 0.85 <= ratio(live, 3, rate) <= 1.06
            assert live.counters()[DOWNLOAD].bytes_dropped - before <= rate.bytes_per_s * 0.05


def test_another_rate_takes_hold(scratch: Cgroup) -> None:
    """Faster or slower, at once."""
    with lab() as own, limited(own, scratch) as live, downloads(own, scratch, 2):
        for times in (2, 0.5, 1):
            rate = Rate(int(RATE.bytes_per_s * times))
            live.set_limit(DOWNLOAD, rate)
            time.sleep(0.5)
            assert 0.94 <= ratio(live, 1.5, rate) <= 1.06


def test_signed_segments_are_left_to_the_kernel(scratch: Cgroup) -> None:
    """Nobody else can sign an acknowledgement: they are policed, and it is said; others are not."""
    with lab() as own, limited(own, scratch) as live:
        ends = own.wire.client, own.wire.server
        client, server = (
            [*end.inside(sys.executable, "-c", SIGNED), role, end.address, other.address]
            for end, other, role in zip(ends, reversed(ends), ("get", "serve"))
        )
        with ExitStack() as ending:
            serving = subprocess.Popen(server, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            ending.callback(serving.communicate)
            ending.callback(serving.kill)
            assert serving.stdout
            assert serving.stdout.readline() == b"ready\n"
            getting = subprocess.Popen(client, preexec_fn=lambda: scratch.move_in(0))
            ending.callback(getting.wait)
            ending.callback(getting.kill)
            time.sleep(1)
            assert 0.8 <= ratio(live, 3) <= 1.2
        (note,) = [one for one in live.notes() if "policer" in one]
        assert note.startswith("1 connection was left to the policer: acknowledgements are signed")
        with downloads(own, scratch):
            time.sleep(1)
            assert 0.94 <= ratio(live, 2) <= 1.06


def test_a_keeper_that_is_stopped_holds_nobody_up(scratch: Cgroup) -> None:
    """Acknowledgements pass by it, and packets are dropped; it goes on where it was."""
    with lab() as own, limited(own, scratch) as live, downloads(own, scratch):
        time.sleep(0.5)
        os.kill(keeper(), signal.SIGSTOP)
        try:
            time.sleep(0.5)
            assert 0.7 <= ratio(live, 2) <= 1.2
        finally:
            os.kill(keeper(), signal.SIGCONT)
        time.sleep(1)
        before = sent_twice(own)
        assert 0.94 <= ratio(live, 2) <= 1.06
        assert sent_twice(own) - before <= 5


def test_a_keeper_that_dies_has_a_successor(scratch: Cgroup) -> None:
    """It takes over what is open."""
    with lab() as own, limited(own, scratch) as live, downloads(own, scratch, 2):
        time.sleep(0.5)
        first = keeper()
        os.kill(first, signal.SIGKILL)
        time.sleep(2)
        assert keeper() != first
        before = taken()
        assert 0.94 <= ratio(live, 2) <= 1.06
        assert taken() > before
        assert live.how()[DOWNLOAD]["shape"] == "gate"


def test_a_namespace_that_is_new_is_served_too(scratch: Cgroup) -> None:
    """The keeper gets sockets there as soon as the first connection begins."""
    with lab() as own, gated(scratch) as live, downloads(own, scratch, 2):
        time.sleep(2)
        before = sent_twice(own)
        assert 0.94 <= ratio(live, 2) <= 1.06
        assert sent_twice(own) - before <= 5


def test_limits_of_one_process_share_a_keeper(scratch: Cgroup) -> None:
    """Each is kept by itself, and goes on when another one ends."""
    with lab() as own, ExitStack() as ending:
        halves = [scratch.create_child(name) for name in ("one", "two")]
        for half in halves:
            ending.callback(half.remove)
        with gated(halves[1]) as second:
            with gated(halves[0], Rate.parse("1M")) as first:
                first_keeper = keeper()
                with downloads(own, halves[0]), downloads(own, halves[1], 2):
                    time.sleep(1)
                    assert 0.94 <= ratio(first, 1.5, Rate.parse("1M")) <= 1.06
                    assert 0.94 <= ratio(second, 1.5) <= 1.06
            with downloads(own, halves[1], 2):
                time.sleep(0.5)
                before = sent_twice(own)
                assert 0.94 <= ratio(second, 1.5) <= 1.06
                assert sent_twice(own) - before <= 5
                assert keeper() == first_keeper
        assert not Path(f"/proc/{first_keeper}").exists()


@pytest.mark.parametrize("address", ["10.99.0.2", "fe80::2"])
def test_a_connection_that_is_bound_to_a_device_is_served_there(
    scratch: Cgroup, address: str
) -> None:
    """As those of link-local addresses are, and those that no route leads to the device."""
    with lab(ipv6=":" in address, listen="::") as own:
        port = own.url.rstrip("/").rpartition(":")[2]
        if ":" in address:
            far = own.wire.server.inside(*f"ip address add {address}/64 dev {DEVICE} nodad".split())
            subprocess.run(far, check=True)
            url = f"http://[{address}%25{DEVICE}]:{port}/"
        else:
            in_client(own, f"ip route add {address}/32 dev lo")
            url = own.url
        with limited(own, scratch) as live:
            with downloads(own, scratch, 2, url=url, device=DEVICE):
                time.sleep(1)
                before = sent_twice(own)
                assert 0.94 <= ratio(live, 2) <= 1.06
                assert taken() > 0
                assert sent_twice(own) - before <= 5
            assert not live.notes()


def test_translated_connections_go_by_the_gate_too(scratch: Cgroup) -> None:
    """What the keeper sends is translated as the connection's own packets are."""
    with lab() as own:
        far, port = own.url.split("//")[1].rstrip("/").split(":")
        rules = f"""
            table ip translated {{
                chain out {{
                    type nat hook output priority -100
                    ip daddr 10.98.0.9 tcp dport 6000 dnat to {far}:{port}
                }}
                chain post {{
                    type nat hook postrouting priority 100
                    ip daddr {far} masquerade
                }}
                chain strict {{
                    type filter hook output priority 0
                    ct state invalid counter drop
                }}
            }}"""
        in_client(own, "ip route add 10.98.0.0/24 dev wire")
        in_client(own, f"{needs_command('nft')} -f -", rules)
        with limited(own, scratch) as live, downloads(own, scratch, url="http://10.98.0.9:6000/"):
            time.sleep(1)
            assert 0.94 <= ratio(live, 2) <= 1.06
            assert taken() > 0
        assert sent_twice(own) <= 5
        assert "packets 0 bytes 0" in in_client(own, "nft list ruleset")


def test_what_cannot_reach_the_sender_is_left_to_the_kernel(scratch: Cgroup) -> None:
    """A firewall that lets a user's packets through, and not the keeper's: it is told."""
    with lab() as own:
        rules = """
            table ip strict {
                chain out {
                    type filter hook output priority 0
                    meta skuid 0 ip daddr 10.99.0.2 counter drop
                }
            }"""
        in_client(own, f"{needs_command('nft')} -f -", rules)
        with limited(own, scratch) as live:
            with downloads(own, scratch, user=65534):
                time.sleep(3)
                assert 0.7 <= ratio(live, 3) <= 1.2
            assert any("packets of raw sockets" in note for note in live.notes())


def test_downloads_go_on_beside_datagrams_that_never_slow_down(scratch: Cgroup) -> None:
    """What has no window gets half, however much of it comes."""
    with lab() as own, limited(own, scratch) as live:
        receiver = subprocess.Popen(
            own.inside(sys.executable, "-c", RECEIVER, own.wire.client.address, "4"),
            stdout=subprocess.PIPE,
            preexec_fn=lambda: scratch.move_in(0),
        )
        with receiver, downloads(own, scratch, 4):
            assert receiver.stdout
            assert receiver.stdout.readline() == b"ready\n"
            flood = [own.wire.client.address, str(1.5 * RATE.bytes_per_s), "6"]
            sender = subprocess.Popen(
                own.wire.server.inside(sys.executable, "-c", SENDER, *flood),
                stdout=subprocess.DEVNULL,
            )
            time.sleep(0.2)
            total = ratio(live, 3.5)
            came = json.loads(receiver.stdout.readline())["count"] * 1228
            sender.wait(10)
    assert 0.9 <= total <= 1.06
    assert 0.35 <= came / 4 / RATE.bytes_per_s <= 0.65


def in_client(own: Lab, command: str, given: str = "") -> str:
    """Run a command in the client's namespace."""
    return subprocess.run(
        own.inside(*command.split()), input=given, capture_output=True, text=True, check=True
    ).stdout


def test_a_small_download_from_far_away_meets_the_keeper(
    wire: Wire, near: Near, scratch: Cgroup
) -> None:
    """Or it would stay at a packet or two each round trip, and never come to what is not small."""
    host = wire.server.address
    with diversion.open(scratch, Impairment(delay_s=0.1)), gated(scratch, Rate(200_000)):
        near.ask("ping", host, PORT, "udp", 4)  # so nothing is owed any more
        assert taken() == 0
        assert near.ask("bulk", host, PORT, 4016)
        assert taken() > 0
