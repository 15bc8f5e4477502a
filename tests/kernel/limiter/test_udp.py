"""UDP: billed by its IP length, dropped without an error to the program."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import ENVIRONMENT, TOOL
from since import needs_release

from pybpfthrottle.demo.wire import Namespace, Wire
from pybpfthrottle.model import Rate

pytestmark = pytest.mark.timed

PAYLOAD = 1200
HEADERS = {4: 28, 6: 48}
SECONDS = 4

# Sends faster than the limit, and tells how often sendto failed and with what.
SENDER = """
import json, socket, sys, time
address, rate, seconds = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
errors, sent, begin = {}, 0, time.monotonic()
while (now := time.monotonic() - begin) < seconds:
    if sent > rate * now / 1200:
        time.sleep(0.001)
        continue
    try:
        s.sendto(bytes(1200), (address, 9999))
    except OSError as error:
        errors[error.errno] = errors.get(error.errno, 0) + 1
    sent += 1
print(json.dumps({"sent": sent, "errors": errors}))
"""

# Counts what comes in so many seconds from the first datagram on.
RECEIVER = """
import json, socket, sys, time
address, seconds = sys.argv[1], float(sys.argv[2])
s = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
s.bind((address, 9999))
print("ready", flush=True)
s.settimeout(30)
count = len(s.recv(65535)) // 1200
begin = time.monotonic()
s.settimeout(0.2)
while time.monotonic() - begin < seconds:
    try:
        s.recv(65535)
        count += 1
    except TimeoutError:
        pass
print(json.dumps({"count": count}))
"""

# Slows down for a loss or a mark, 20 times a second at most, and otherwise sends more and more.
ADAPTING = """
import json, socket, struct, sys, time
address, tos, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
s.connect((address, 9999))
s.setblocking(False)
rate, number, due, troubles, cut, lost, marked = 300e3, 0, 0.0, 0, 0.0, 0, 0
begin = last = time.monotonic()
while (now := time.monotonic()) - begin < seconds:
    try:
        while True:
            highest, count, marked = struct.unpack("!III", s.recv(100))
            lost = highest + 1 - count
    except OSError:
        pass
    if lost + marked > troubles and now - cut > 0.05:
        rate, cut = rate * 0.7, now
    troubles = lost + marked
    rate, due = rate + 400e3 * (now - last), due + rate * (now - last)
    last = now
    while due >= 1228:
        s.send(struct.pack("!I", number) + bytes(1196))
        number, due = number + 1, due - 1228
    time.sleep(0.001)
print(json.dumps({"sent": number, "lost": lost, "marked": marked}))
"""

# Tells the sender what has come, and with which marks.
ANSWERING = """
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IP, socket.IP_RECVTOS, 1)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
s.bind((sys.argv[1], 9999))
print("ready", flush=True)
highest = count = marked = 0
while True:
    data, ancillary, _, peer = s.recvmsg(2000, 100)
    highest, count = max(highest, struct.unpack_from("!I", data)[0]), count + 1
    marked += any(value[0] & 3 == 3 for _, _, value in ancillary)
    s.sendto(struct.pack("!III", highest, count, marked), peer)
"""


def limited(direction: str, rate: Rate, options: list[str], command: list[str]) -> list[str]:
    """The command below ``pybpfthrottle run``."""
    limit = [f"--{direction}-limit", str(rate.bytes_per_s)]
    return [*TOOL, "run", "-q", *limit, *options, "--", *command]


def exchange(direction: str, rate: Rate, *options: str, version: int = 4) -> tuple[int, dict]:
    """A flood at twice the limit; how many datagrams came, and the sender's errors."""
    with Wire() as wire:
        sender, receiver = wire.client, wire.server
        if direction == "download":
            sender, receiver = receiver, sender
        address = address_of(receiver, version)
        receive = [sys.executable, "-c", RECEIVER, address, str(SECONDS)]
        send = [sys.executable, "-c", SENDER, address, str(2 * rate.bytes_per_s), str(SECONDS + 1)]
        if direction == "download":
            receive = limited(direction, rate, list(options), receive)
        else:
            send = limited(direction, rate, list(options), send)
        with subprocess.Popen(
            receiver.inside(*receive), stdout=subprocess.PIPE, env=ENVIRONMENT
        ) as counting:
            assert counting.stdout
            assert counting.stdout.readline() == b"ready\n"
            sent = subprocess.run(
                sender.inside(*send), stdout=subprocess.PIPE, env=ENVIRONMENT, check=True
            )
            received = json.loads(counting.stdout.readline())
        return received["count"], json.loads(sent.stdout)["errors"]


def address_of(namespace: Namespace, version: int) -> str:
    """Its IPv4 or IPv6 address."""
    return namespace.address if version == 4 else namespace.address6


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("direction", ["download", "upload"])
def test_a_flood_of_datagrams_keeps_to_its_limit(direction: str, version: int) -> None:
    """The IP bytes of a UDP flood are what the limit allows, and no sendto fails."""
    if direction == "upload":
        needs_release("5.3", "a verdict that is no error to the sender")
    rate = Rate.parse("1M")
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: exchange(direction, rate, version=version), range(3)))
    size = PAYLOAD + HEADERS[version]
    came = statistics.median(count for count, _ in results) * size
    assert 0.94 <= came / rate.bytes_per_s / SECONDS <= 1.06
    assert [errors for _, errors in results] == [{}, {}, {}]


def test_the_denying_verdict_shows_as_eperm() -> None:
    """With --egress-verdict deny the program's sendto fails with EPERM, and the limit holds."""
    rate = Rate.parse("1M")
    count, errors = exchange("upload", rate, "--egress-verdict", "deny")
    assert list(errors) == ["1"]
    assert 0.9 <= count * (PAYLOAD + HEADERS[4]) / rate.bytes_per_s / SECONDS <= 1.1


@pytest.mark.parametrize("tos", [0, 1, 2], ids=["no ECN", "ECT(1)", "ECT(0)"])
def test_a_sender_that_slows_down_for_losses_or_marks_uses_its_limit(tos: int) -> None:
    """Losses come early and apart from each other; who understands marks has none."""
    rate, seconds = Rate.parse("1M"), 6
    with Wire() as wire:
        answer = [sys.executable, "-c", ANSWERING, wire.client.address]
        with subprocess.Popen(
            wire.client.inside(*limited("download", rate, [], answer)),
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
        ) as answering:
            assert answering.stdout
            assert answering.stdout.readline() == b"ready\n"
            send = [sys.executable, "-c", ADAPTING, wire.client.address, str(tos), str(seconds)]
            sent = subprocess.run(
                wire.server.inside(*send), stdout=subprocess.PIPE, env=ENVIRONMENT, check=True
            )
            answering.terminate()
    found = json.loads(sent.stdout)
    if tos == 2 and not found["marked"]:
        needs_release("5.1", "marks of congestion by cgroup_skb programs")
    size = PAYLOAD + HEADERS[4]
    assert 0.85 <= (found["sent"] - found["lost"]) * size / rate.bytes_per_s / seconds <= 1.05
    assert found["lost"] <= (0 if tos == 2 else 0.03 * found["sent"])
    assert bool(found["marked"]) == (tos == 2)
