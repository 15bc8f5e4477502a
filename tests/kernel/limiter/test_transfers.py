"""What a limit does to real transfers over a veth pair, from the first byte on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from lab import (
    ENVIRONMENT,
    LARGEST_PACKET,
    TOOL,
    Lab,
    Transfer,
    lab,
    median_ratio,
    median_windows,
    three_times,
)

from pybpfthrottle.backends.ebpf.bucket import POLICE, SMALL_NS
from pybpfthrottle.demo.peer import PORT
from pybpfthrottle.model import Rate

pytestmark = pytest.mark.timed

# Uploads by several connections after a pause; prints how long that took and what was acknowledged.
AFTER_A_PAUSE = """
import json, select, socket, struct, sys, time
host, port, flows, pause_s, seconds = sys.argv[1:]
port, flows, pause_s, seconds = int(port), int(flows), float(pause_s), float(seconds)
all_of_them = [socket.create_connection((host, port)) for _ in range(flows)]
def acked():
    infos = (one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128) for one in all_of_them)
    return sum(struct.unpack_from("=Q", info, 120)[0] for info in infos)
for one in all_of_them:
    one.sendall(b"PUT / HTTP/1.1\\r\\nHost: there\\r\\nContent-Length: 1000000000\\r\\n\\r\\n")
    one.setblocking(False)
time.sleep(pause_s)
begin, before = time.monotonic(), acked()
while time.monotonic() < begin + seconds:
    for one in select.select([], all_of_them, [], 0.01)[1]:
        one.send(bytes(65536))
print(json.dumps([time.monotonic() - begin, acked() - before]))
"""


def limited(direction: str, limit: str, seconds: int, *options: str):
    """A transfer in one direction with a limit."""

    def transfer(own: Lab) -> Transfer:
        if direction == "download":
            return own.download(["--download-limit", limit, *options], seconds)
        return own.upload(["--upload-limit", limit, *options], seconds)

    return transfer


def check(transfers: list[Transfer], limit: str, seconds: int) -> None:
    """The total, and where packets are small beside the limit each second but the first."""
    rate = Rate.parse(limit)
    assert 0.94 <= median_ratio(transfers, rate, seconds) <= 1.06
    if rate.bytes_per_s >= 1 << 20:
        windows = median_windows(transfers, rate, seconds)[1:]
        assert all(0.8 <= window <= 1.2 for window in windows), windows


@pytest.mark.parametrize("direction", ["download", "upload"])
@pytest.mark.parametrize(("limit", "seconds"), [("1M", 6), ("10M", 6), ("50M", 6), ("100K", 20)])
def test_a_transfer_keeps_to_its_limit(direction: str, limit: str, seconds: int) -> None:
    """Curl below run gets what its limit allows, in total and in each second."""
    check(three_times(limited(direction, limit, seconds)), limit, seconds)


@pytest.mark.parametrize("direction", ["download", "upload"])
def test_ipv6_is_limited_the_same(direction: str) -> None:
    """A transfer over IPv6 keeps to its limit."""
    check(three_times(limited(direction, "10M", 6), ipv6=True), "10M", 6)


@pytest.mark.parametrize("method", ["link", "legacy"])
def test_both_ways_to_attach_limit(method: str) -> None:
    """A limit that is attached by link or by the legacy call is the same limit."""
    check(three_times(limited("download", "10M", 4, "--bpf-attach-method", method)), "10M", 4)


def test_the_other_egress_verdict_limits_as_well() -> None:
    """An upload whose packets are denied instead of dropped keeps to its limit."""
    check(three_times(limited("upload", "10M", 6, "--egress-verdict", "deny")), "10M", 6)


def test_an_idle_time_saves_up_no_more_than_the_burst() -> None:
    """After two idle seconds a download gets rate * t, the burst and one packet at most."""
    rate = Rate.parse("2M")
    with lab() as own:
        transfer = own.download(
            ["--download-limit", "2M"],
            3,
            before=f"curl -sN --max-time 1 {own.url} >/dev/null; sleep 2;",
        )
    spare = rate.bytes_per_s * (POLICE.burst_ns + SMALL_NS) / 1e9 + LARGEST_PACKET
    came = 0
    for at, count in transfer.events:
        came += count
        assert came <= rate.bytes_per_s * at + spare
    assert came >= 0.9 * rate.bytes_per_s * 3


@pytest.mark.since("5.10")  # uploads are paced
def test_what_a_pause_has_saved_does_not_come_on_top() -> None:
    """Connections that share a limit hold a debt; together with the credit it would be 0.2 s."""
    rate = Rate.parse("2M")
    with lab() as own:
        upload = [sys.executable, "-c", AFTER_A_PAUSE, own.wire.server.address, str(PORT)]
        limited = [*TOOL, "run", "-q", "--upload-limit", "2M", "--", *upload, "8", "2.5", "3"]
        done = subprocess.run(
            own.inside(*limited), env=ENVIRONMENT, stdout=subprocess.PIPE, timeout=30, check=True
        )
    seconds, count = json.loads(done.stdout)
    assert 0.94 <= count / seconds / rate.bytes_per_s <= 1.04


@pytest.mark.parametrize("direction", ["download", "upload"])
def test_loopback_is_limited_where_that_is_asked_for(direction: str) -> None:
    """Packets of 64 KB over the loopback device flow and keep to their limit."""
    transfers = three_times(on_loopback(direction, ["--loopback"]))
    assert 0.94 <= median_ratio(transfers, Rate.parse("10M"), 4) <= 1.06


def test_loopback_is_exempt_otherwise() -> None:
    """Without --loopback a transfer over the loopback device is as fast as it can be."""
    transfer = on_loopback("download", [])
    with lab() as own:
        assert transfer(own).ratio(Rate.parse("10M"), 1) > 5


def on_loopback(direction: str, options: list[str]):
    """A transfer inside of the server's namespace, which the server is reached in by loopback."""

    def transfer(own: Lab) -> Transfer:
        # Its own address is routed over the loopback device.
        own.wire.client = own.wire.server
        seconds = 4 if options else 1
        if direction == "download":
            return own.download(["--download-limit", "10M", *options], seconds)
        return own.upload(["--upload-limit", "10M", *options], seconds)

    return transfer
