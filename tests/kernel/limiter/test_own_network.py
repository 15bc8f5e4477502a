"""run --netns: a network namespace of its own, whose packets pass a line of ours both ways."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import pytest
from click.testing import CliRunner
from echo import PORT, Near
from lab import ENVIRONMENT, TOOL
from targets import PATIENCE_S, eventually

from pybpfthrottle import wayout
from pybpfthrottle.cli.commands.bare import cli
from pybpfthrottle.demo.wire import Namespace, Wire
from pybpfthrottle.line.own import _QUEUE_PACKETS
from pybpfthrottle.linux import netns, process
from pybpfthrottle.wayout import WayOut

pytestmark = pytest.mark.since("5.10")

DELAY_S = 0.1


def command(*options: str) -> list[str]:
    """The tool that runs a command in a network namespace."""
    return ["env", f"PYTHONPATH={ENVIRONMENT['PYTHONPATH']}", *TOOL, "run", "--netns", *options]


@contextmanager
def behind(end: Namespace, *options: str) -> Iterator[Near]:
    """A process below ``run --netns``."""
    one = Near(lambda *argv: end.inside(*command("-q", *options, "--", *argv)))
    try:
        yield one
    finally:
        one.process.communicate(timeout=PATIENCE_S)  # the end of its input ends it


def state(end: Namespace) -> tuple[dict[str, str], str, list[str]]:
    """What may be left in a network namespace: settings, rules of nftables, devices."""

    def look() -> tuple[dict[str, str], str, list[str]]:
        settings = {
            str(path): path.read_text()
            for version in ("ipv4", "ipv6")
            for path in Path(f"/proc/sys/net/{version}/conf").glob("*/forwarding")
        }
        rules = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True)
        return settings, rules.stdout, sorted(interfaces())

    fd = os.open(f"/proc/{end.process.pid}/ns/net", os.O_RDONLY)
    try:
        return netns.inside(fd, look)
    finally:
        os.close(fd)


def keeper_of(near: Near) -> int:
    """The keeper of the line of ``run``."""
    return next(
        pid
        for pid in process.families()[near.process.pid]
        if b"line.keeper" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def set_router(end: Namespace, value: int, version: int = 4) -> None:
    """Have a namespace forward packets, or not."""
    set_forwarding(end, "all", value, version)


def set_forwarding(end: Namespace, device: str, value: int, version: int = 4) -> None:
    """Have a device forward packets, or not."""
    setting = f"net.ipv{version}.conf.{device}.forwarding={value}"
    subprocess.run(end.inside("sysctl", "-qw", setting), check=True)


@contextmanager
def stays_a_router(end: Namespace, version: int = 4) -> Iterator[None]:
    """Afterwards a namespace forwards IPv4 or IPv6, and not the other; then it is none any more."""
    try:
        yield
        settings = state(end)[0]
        for one in (4, 6):
            now = settings[f"/proc/sys/net/ipv{one}/conf/wire/forwarding"]
            assert now == f"{int(one == version)}\n"
    finally:
        set_router(end, 0)
        set_router(end, 0, 6)


def in_own_run(end: Namespace, program: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a namespace, with a /run of its own: no other start restores what it leaves."""
    apart = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh"]
    environment = ["env", f"PYTHONPATH={ENVIRONMENT['PYTHONPATH']}"]
    return subprocess.run(
        end.inside(*apart, *environment, sys.executable, "-c", program),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def interfaces() -> list[str]:
    """The devices of this thread's network namespace."""
    return list(netns._own_interfaces().names.values())


def told(file: Path) -> dict[str, Any]:
    """What the last line of a --json-file says of the network."""
    found: dict[str, Any] = json.loads(file.read_text().splitlines()[-1])["network"]
    return found


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_both_directions_are_late_and_nothing_is_left(
    wire: Wire, tmp_path: Path, kind: str
) -> None:
    """A round trip takes as much longer as is asked for, by half in each direction."""
    before = state(wire.client)
    file = tmp_path / "network.jsonl"
    with behind(wire.client, "--delay", "100ms", "--json-file", str(file)) as near:
        for host in (wire.server.address, wire.server.address6):
            assert DELAY_S <= min(near.ask("ping", host, PORT, kind, 3)) < 5 * DELAY_S
        assert near.ask("bulk", wire.server.address, PORT, 100_000)
        assert state(wire.client) != before
    assert state(wire.client) == before
    done = told(file)
    assert done["addresses"]["command"][0].startswith("198.19.")
    for direction in ("download", "upload"):
        assert done[direction]["diverted"]["delay_p50_s"] >= DELAY_S / 2 * 0.95
        assert done[direction]["diverted"]["passed_undelayed"] == 0


def test_what_is_sent_gets_lost_doubled_and_damaged(wire: Wire, tmp_path: Path) -> None:
    """Which only a line can do; TCP's data arrives all the same."""
    file = tmp_path / "network.jsonl"
    bad = ["--upload-loss", "every:4", "--duplicate", "10%", "--corrupt", "5%", "--seed", "1"]
    with behind(wire.client, *bad, "--json-file", str(file)) as near:
        near.ask("send", wire.server.address, PORT, 100, 64)
        numbers, _ = near.ask("receive", 1.0)
        assert near.ask("bulk", wire.server.address, PORT, 50_000)
    done = told(file)["upload"]["diverted"]
    assert set(range(3, 100, 4)).isdisjoint(numbers)
    assert 0 < len(set(numbers)) <= 75
    assert all(done[name] > 0 for name in ("lost", "duplicated", "corrupted"))
    assert done["lost"] == done["seen"] // 4


def test_what_was_sent_last_arrives_although_the_command_has_ended(wire: Wire) -> None:
    """A datagram that is under way, and what a socket still had to send."""
    program = f"""
import socket, sys
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.sendto(b"bye", ({wire.client.address!r}, {PORT}))
tcp = socket.create_connection(({wire.client.address!r}, {PORT}))
tcp.sendall(bytes(200_000))
"""
    received = f"""
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", {PORT}))
listener = socket.create_server(("0.0.0.0", {PORT}))
print("ready", flush=True)
one, _ = listener.accept()
count = 0
while data := one.recv(1 << 16):
    count += len(data)
udp.setblocking(False)
print(count, udp.recv(9).decode())
"""
    python = [sys.executable, "-I", "-S", "-c"]
    with subprocess.Popen(
        wire.client.inside(*python, received), stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout
            assert server.stdout.readline() == "ready\n"
            run = command("-q", "--delay", "200ms", "--", *python, program)
            subprocess.run(wire.client.inside(*run), check=True, timeout=PATIENCE_S)
            assert server.communicate(timeout=PATIENCE_S)[0] == "200000 bye\n"
        finally:
            server.kill()


def test_who_does_not_wait_for_what_was_sent_last_leaves_nothing_either(wire: Wire) -> None:
    """Ctrl-C at the end restores all before the program ends."""
    program = f"""
import socket, time
from contextlib import suppress
from pybpfthrottle.line.own import OwnNetwork
from pybpfthrottle.linux import netns, run_files
from pybpfthrottle.model import Direction

def send():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"", ({wire.server.address!r}, {PORT}))

def interrupt(self, keeper):
    raise KeyboardInterrupt

OwnNetwork._drain = interrupt
with suppress(KeyboardInterrupt), OwnNetwork() as network:
    network.open("abcdef")
    netns.inside(network._namespace, send)
    while not network.counts()[Direction.UPLOAD].seen:
        time.sleep(0.01)
    print(run_files.stems(run_files.WAYS_OUT))
print(run_files.stems(run_files.WAYS_OUT))
"""
    before = state(wire.client)
    done = in_own_run(wire.client, program)
    assert done.stdout == "['abcdef']\n[]\n", done.stderr
    assert state(wire.client) == before


def test_others_are_not_forwarded(wire: Wire) -> None:
    """Although the machine is a router now, it is none but for the command."""
    with behind(wire.client, "--delay", "1ms"):
        rules = state(wire.client)[1]
    assert 'meta nfproto ipv4 iifname "wire" ct state invalid,new,untracked drop' in rules
    assert "meta nfproto ipv6 ct state invalid,new,untracked drop" in rules


@pytest.mark.parametrize("routes", [0, 1])
def test_the_command_is_reached_from_this_machine_alone(wire: Wire, routes: int) -> None:
    """Not by others who send packets for its address here, be the machine a router or not."""
    connect = """
import socket, sys
one = socket.socket()
one.settimeout(float(sys.argv[2]))
print(one.connect_ex((sys.argv[1], 9)))
"""
    set_router(wire.client, routes)
    with behind(wire.client, "--delay", "1ms"):
        namespace = netns.number(wire.client.process.pid)
        way = next(one for one in wayout._known() if one.namespace == namespace)
        address = str(way.ends[0].inner.ip)
        to = ["ip", "route", "add", address, "via", wire.client.address]
        subprocess.run(wire.server.inside(*to), check=True)
        here, far = (
            subprocess.run(
                end.inside(sys.executable, "-I", "-S", "-c", connect, address, str(patience_s)),
                capture_output=True,
                text=True,
            )
            for end, patience_s in ((wire.client, PATIENCE_S), (wire.server, 1.0))
        )
    subprocess.run(wire.server.inside("ip", "route", "del", address), check=True)
    set_router(wire.client, 0)
    assert here.stdout == f"{errno.ECONNREFUSED}\n"
    assert far.stdout == f"{errno.EAGAIN}\n"  # nobody answers


def test_rules_that_somebody_removes_come_back(wire: Wire) -> None:
    """As a firewall does that is started anew. Without them the machine were everybody's router."""
    with behind(wire.client, "--delay", "1ms") as near:
        before = state(wire.client)
        subprocess.run(wire.client.inside("nft", "flush", "ruleset"), check=True)
        eventually(lambda: state(wire.client) == before)
        assert near.ask("ping", wire.server.address, PORT, "udp", 1)


@pytest.mark.parametrize("version", [4, 6])
def test_who_forwards_meanwhile_goes_on_to_do_so(wire: Wire, version: int) -> None:
    """As Docker does, which may be started while a command runs; our rules then let it do so."""
    drops = 'ipv4 iifname "wire"' if version == 4 else "nfproto ipv6 ct"
    with stays_a_router(wire.client, version), behind(wire.client, "--delay", "1ms"):
        assert drops in state(wire.client)[1]
        set_router(wire.client, 1, version)
        eventually(lambda: drops not in state(wire.client)[1])


def test_devices_go_on_as_others_set_them(wire: Wire) -> None:
    """IPv6 needs them for nothing: only its switch is on, and back at the end."""
    before = state(wire.client)[0]
    with behind(wire.client, "--delay", "1ms") as near:
        changed = {path for path, now in state(wire.client)[0].items() if before.get(path) != now}
        assert [path for path in sorted(changed) if "ipv6" in path and "pybpfn" not in path] == [
            "/proc/sys/net/ipv6/conf/all/forwarding"
        ]
        set_forwarding(wire.client, "wire", 1, 6)
        assert near.ask("ping", wire.server.address6, PORT, "udp", 1)
    after = state(wire.client)[0]
    set_forwarding(wire.client, "wire", 0, 6)
    assert after == {**before, "/proc/sys/net/ipv6/conf/wire/forwarding": "1\n"}


@pytest.mark.parametrize(("device", "version"), [("wire", 4), ("all", 6)])
def test_forwarding_that_somebody_switches_off_comes_back(
    wire: Wire, tmp_path: Path, device: str, version: int
) -> None:
    """As systemd-networkd does when it sets up a device anew; the user is told."""
    before = state(wire.client)
    file = tmp_path / "network.jsonl"
    host = wire.server.address if version == 4 else wire.server.address6
    with behind(wire.client, "--delay", "1ms", "--json-file", str(file)) as near:
        during = state(wire.client)
        set_forwarding(wire.client, device, 0, version)
        eventually(lambda: state(wire.client) == during)
        assert near.ask("ping", host, PORT, "udp", 1)
    told_notes = [json.loads(line).get("text", "") for line in file.read_text().splitlines()]
    name = f"net.ipv{version}.conf.{device}.forwarding"
    assert any(note.startswith(f"{name}, which others had switched off") for note in told_notes)
    assert state(wire.client) == before


@pytest.mark.parametrize("device_before", [0, 1])
def test_a_kill_in_the_middle_of_switching_on_leaves_nothing(
    wire: Wire, device_before: int
) -> None:
    """When IPv6 is on for all devices, and not yet back for those that are to be as before."""
    set_forwarding(wire.client, "wire", device_before, 6)
    before = state(wire.client)
    program = """
import os, signal
from pybpfthrottle import wayout
from pybpfthrottle.cli.commands.bare import cli
set_one = wayout._set
def kill(path, value):
    set_one(path, value)
    if path == wayout._ALL6:
        os.kill(os.getpid(), signal.SIGKILL)
wayout._set = kill
cli(["run", "--netns", "--delay", "1ms", "--", "true"])
"""
    assert in_own_run(wire.client, program).returncode == -signal.SIGKILL
    eventually(lambda: state(wire.client) == before)
    set_forwarding(wire.client, "wire", 0, 6)


def test_a_line_that_begins_on_a_router_leaves_it_one(wire: Wire) -> None:
    """Although one that began earlier has changed the same settings."""
    with stays_a_router(wire.client):
        with behind(wire.client, "--delay", "1ms") as first:
            set_router(wire.client, 1)
            with behind(wire.client, "--delay", "1ms") as second:
                assert second.ask("ping", wire.server.address, PORT, "udp", 1)
                first.process.communicate(timeout=PATIENCE_S)
                assert 'ipv4 iifname "wire"' not in state(wire.client)[1]


def test_two_lines_do_not_disturb_each_other(wire: Wire) -> None:
    """The settings are restored when the second ends, whichever that is."""
    before = state(wire.client)
    with behind(wire.client, "--delay", "1ms") as second:
        with behind(wire.client, "--delay", "1ms") as first:
            assert first.ask("ping", wire.server.address, PORT, "udp", 1)
        for host in (wire.server.address, wire.server.address6):
            assert second.ask("ping", host, PORT, "udp", 1)
    assert state(wire.client) == before


@pytest.mark.parametrize("who", ["owner", "both"])
def test_after_a_kill_all_is_restored(wire: Wire, who: str) -> None:
    """By the keeper, or else at the next start."""
    before = state(wire.client)
    with behind(wire.client, "--delay", "1ms") as near:
        assert near.ask("ping", wire.server.address, PORT, "udp", 1)
        tool = near.process.pid
        keeper = keeper_of(near)
        for pid in (*([keeper] if who == "both" else ()), tool):
            os.kill(pid, signal.SIGKILL)
        near.process.wait()
        if who == "both":
            eventually(lambda: process.has_ended(keeper))
            wayout.tidy_up()
        eventually(lambda: state(wire.client) == before)
    assert eventually(lambda: not wayout.abandoned())


@pytest.mark.since("5.14")
def test_a_namespace_that_has_got_the_number_of_another_is_left_alone(wire: Wire) -> None:
    """What a killed process has recorded of one that has ended is not restored in the next."""
    number = netns.number(wire.client.process.pid)
    gone = process.Identity(1 << 22, process.identity().pid_namespace, 1)
    path = "/proc/sys/net/ipv4/conf/wire/forwarding"
    set_forwarding(wire.client, "wire", 1)
    cookie = netns.cookie(number)
    for other, value in ((cookie + 1, "1\n"), (cookie, "0\n")):
        way = WayOut("abcdef", gone, number, (), ((path, "0"),), "0", cookie=other)
        way.write()
        wayout.tidy_up()  # or another test's
        eventually(lambda: not wayout.abandoned())
        assert state(wire.client)[0][path] == value


def test_a_kill_while_a_line_is_being_laid_leaves_nothing(wire: Wire) -> None:
    """When the settings are changed already, and the keeper has no devices yet."""
    before = state(wire.client)
    program = """
import os, signal
from pybpfthrottle import wayout
from pybpfthrottle.cli.commands.bare import cli
wayout.firewalls = lambda: os.kill(os.getpid(), signal.SIGKILL)
cli(["run", "--netns", "--delay", "1ms", "--", "true"])
"""
    assert in_own_run(wire.client, program).returncode == -signal.SIGKILL
    eventually(lambda: state(wire.client) == before)


def test_a_keeper_that_dies_is_replaced(wire: Wire) -> None:
    """The devices stay, and with them the connections."""
    with behind(wire.client, "--delay", "1ms") as near:
        os.kill(keeper_of(near), signal.SIGKILL)
        assert near.ask("bulk", wire.server.address, PORT, 50_000)


def test_a_keeper_that_was_away_loses_only_what_found_no_room_and_tells_it(
    wire: Wire, tmp_path: Path
) -> None:
    """However long that was; nothing can overtake what waits for it."""
    file = tmp_path / "network.jsonl"
    count = _QUEUE_PACKETS + 200
    with behind(wire.client, "--delay", "20ms", "--json-file", str(file)) as near:
        assert near.ask("ping", wire.server.address, PORT, "udp", 1)
        near.ask("send", wire.server.address, PORT, 200, 100, 0)
        keeper = keeper_of(near)
        os.kill(keeper, signal.SIGSTOP)
        try:
            near.ask("send", wire.server.address, PORT, count, 20, 0)
            time.sleep(1.3)
        finally:
            os.kill(keeper, signal.SIGCONT)
        assert near.ask("ping", wire.server.address, PORT, "tcp", 1)  # it comes last
    done = told(file)["upload"]["diverted"]
    assert 200 <= done["no_room"] <= 400
    assert done["late_dropped"] == done["no_room"]
    assert done["seen"] >= 200 + count
    # What ends the last connection may be on its way still.
    assert 0 <= done["seen"] - done["delivered"] - done["no_room"] < 5
    assert done["too_late"] == done["refused"] == done["passed_undelayed"] == 0


@pytest.mark.parametrize("which", ["net0", "pybpfn0"])
def test_a_device_that_somebody_removes_is_told_in_a_line(wire: Wire, which: str) -> None:
    """The command goes on without a network, whatever it asks for; nothing is left at its end."""
    before = state(wire.client)
    here = f"nsenter -t {wire.client.process.pid} -n" if which == "pybpfn0" else ""
    program = f"{here} ip link del {which}; sleep 0.5; exit 7"
    done = subprocess.run(
        wire.client.inside(*command("--delay", "1ms", "--loss", "1%", "--", "sh", "-c", program)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 7
    assert f"network is down: somebody has removed the device {which}" in done.stderr
    assert done.stderr.count("network is down") == 1
    assert "Traceback" not in done.stderr
    assert state(wire.client) == before


def test_a_network_without_its_device_can_be_changed(wire: Wire) -> None:
    """As a replay does all the time; the keeper lives on."""
    program = f"""
import subprocess, time
from pybpfthrottle.conditions.model import Conditions, Impairment, Loss
from pybpfthrottle.line.own import OwnNetwork
from pybpfthrottle.linux import netns

with OwnNetwork() as network:
    network.open("abcdef")
    keeper = network._keeper
    first = keeper.pid
    netns.inside(network._namespace, lambda: subprocess.run(["ip", "link", "del", "net0"]))
    network.set(Conditions(download=Impairment(loss=Loss.chance(0.5))))
    network.set(Conditions(upload=Impairment(loss=Loss.chance(0.5))))
    keeper.wait_until(lambda: keeper.gone, {PATIENCE_S})
    network.set(Conditions())
    keeper.drain({PATIENCE_S})
    print(keeper._is_empty, keeper.pid == first, network.notes()[-1])
"""
    done = in_own_run(wire.client, program)
    assert done.stdout.startswith("True True the command's network is down"), done
    assert not done.stderr


def test_what_the_command_has_no_room_for_is_told(wire: Wire, tmp_path: Path) -> None:
    """Its own sockets may be too full for what arrives: that is no loss that was asked for."""
    file = tmp_path / "network.jsonl"
    with behind(wire.client, "--delay", "1ms", "--json-file", str(file)) as near:
        near.ask("send", wire.server.address, PORT, 2500, 1000)
        found, _ = near.ask("receive", 1.0)
    done = told(file)["download"]
    assert done["diverted"]["unread"] > 0
    assert len(found) + done["diverted"]["unread"] == 2500
    assert done["dropped"] == 0


def test_the_command_asks_name_servers_that_it_can_reach(wire: Wire, tmp_path: Path) -> None:
    """Those of systemd-resolved in place of 127.0.0.53; the machine's own file stays."""
    stub, upstream = tmp_path / "stub", tmp_path / "upstream"
    stub.write_text("nameserver 127.0.0.53\noptions edns0\n")
    upstream.write_text("nameserver 192.0.2.53\n")
    script = f"""
        mount --bind {stub} /etc/resolv.conf && mount -t tmpfs none /run &&
        mkdir -p /run/systemd/resolve && cp {upstream} /run/systemd/resolve/resolv.conf || exit 9
        "$@" --delay 1ms -q -- cat /etc/resolv.conf
        cat /etc/resolv.conf
        rm /run/systemd/resolve/resolv.conf
        "$@" --delay 1ms -- true
    """
    done = subprocess.run(
        wire.client.inside("unshare", "--mount", "sh", "-c", script, "sh", *command()),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.stdout == upstream.read_text() + stub.read_text(), done.stderr
    assert "names may not be found" in done.stderr


def test_limits_work_beside_it(wire: Wire, tmp_path: Path) -> None:
    """They count what the command sends and receives."""
    file = tmp_path / "network.jsonl"
    options = ["--delay", "1ms", "-d", "100M", "-u", "100M", "--json-file", str(file)]
    with behind(wire.client, *options) as near:
        assert near.ask("bulk", wire.server.address, PORT, 101_000)
    last = json.loads(file.read_text().splitlines()[-1])
    for direction in ("download", "upload"):
        assert last[direction]["bytes_total"] >= 100_000


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("mount --bind /dev/null $(command -v nft)", "cannot be translated: .*Linux 5.2"),
        (
            "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys",
            "packets cannot be forwarded: .*Read-only",
        ),
    ],
)
def test_what_is_missing_is_told(wire: Wire, lacks: str, said: str) -> None:
    """And nothing is left."""
    before = state(wire.client)
    script = f'{lacks} && exec "$@"'
    done = subprocess.run(
        wire.client.inside(
            *("unshare", "--mount", "sh", "-c", script, "sh"),
            *command("--delay", "1ms", "--", "true"),
        ),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 125
    assert re.search(said, done.stderr), done.stderr
    assert state(wire.client) == before


@pytest.mark.parametrize(
    "rules",
    ["policy drop", "ct state established accept; counter reject with icmpx admin-prohibited"],
)
def test_a_firewall_that_drops_what_is_forwarded_is_told(wire: Wire, rules: str) -> None:
    """By a policy or, as that of firewalld, by its last rule; with what it has to accept."""
    chain = f"chain forward {{ type filter hook forward priority 0; {rules}; }}"
    table = f"table inet other {{ {chain}; }}"
    subprocess.run(wire.client.inside("nft", table), check=True)
    try:
        done = subprocess.run(
            wire.client.inside(*command("--delay", "1ms", "--", "true")),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    finally:
        subprocess.run(wire.client.inside("nft", "delete table inet other"), check=True)
    assert "table inet other has its chain forward drop" in done.stderr
    assert 'iifname "pybpfn*"' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-d", "1M"], "--netns is for a bad network"),
        (["--loss", "1%", "--loopback"], "omit --loopback"),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments: list[str], said: str) -> None:
    """Before anything is made."""
    result = CliRunner().invoke(cli, ["run", "--netns", *arguments, "--", "true"])
    assert result.exit_code == 2
    assert said in result.output
