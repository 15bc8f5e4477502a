"""Limits that systemd itself starts, and limits of its units, with a real systemd."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Iterator

import pytest
from booted import Machine, booted
from targets import eventually

UNITS = "/etc/systemd/system"
# Datagrams to nobody: what is counted of them is all that is sent.
SEND = """
import socket
for _ in range(3):
    socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9))
"""
# Each connection gets so many bytes.
ANSWER_BYTES = 50_000
SERVE = f"""
import socket
listener = socket.socket(fileno=3)
while True:
    connection, _ = listener.accept()
    connection.sendall(b"x" * {ANSWER_BYTES})
    connection.close()
"""
FETCH = """
import socket
connection = socket.create_connection(("127.0.0.1", 8080))
print(sum(iter(lambda: len(connection.recv(65536)), 0)))
"""
# A network with another machine, which sends datagrams of 1 KB to a service, 1 MB/s for 3 s.
FAR = "ip netns add far && ip link add near type veth peer name far netns far"
FAR += " && ip addr add 10.9.0.1/24 dev near && ip link set near up"
FAR += " && ip -n far addr add 10.9.0.2/24 dev far && ip -n far link set far up"
TAKE = """
import socket
taker = socket.socket(type=socket.SOCK_DGRAM)
taker.bind(("10.9.0.1", 9))
while True:
    taker.recv(2048)
"""
FLOOD = """
import socket, time
sender = socket.socket(type=socket.SOCK_DGRAM)
for _ in range(300):
    for _ in range(10):
        sender.sendto(bytes(1000), ("10.9.0.1", 9))
    time.sleep(0.01)
"""
LIMIT = ("--upload-limit", "2M", "--loopback")

# Throttles of the whole kernel are listed: other tests may have machines of their own.
OWN = f"{os.getpid()}x{time.monotonic_ns()}"
WEB, SOCKET, ALIAS = f"web{OWN}.service", f"web{OWN}.socket", f"alias{OWN}.service"
TAKER = f"take{OWN}.service"
# With what systemd itself escapes, and its template.
UNIT, TEMPLATE = f"send{OWN}@a\\x2db.service", f"send{OWN}@.service"
KEEPER = f"pybpfthrottle-limit-{UNIT}"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """One for all of these tests, with two services."""
    with booted() as made:
        made.write("/opt/send.py", SEND)
        made.write("/opt/serve.py", SERVE)
        made.write(
            f"{UNITS}/{TEMPLATE}",
            "[Service]\nExecStartPre=python3 /opt/send.py\nExecStart=sleep 600\n"
            "ExecStartPost=python3 /opt/send.py\n",
        )
        made.write(f"{UNITS}/{SOCKET}", "[Socket]\nListenStream=127.0.0.1:8080\n")
        made.write(f"{UNITS}/{WEB}", "[Service]\nExecStart=python3 /opt/serve.py\n")
        made.run("ln", "-s", WEB, f"{UNITS}/{ALIAS}")
        made.run("systemctl", "daemon-reload")
        yield made


def limits_of(machine: Machine, unit: str) -> list[dict[str, Any]]:
    """The throttles in force on a unit, as they are shown."""
    shown = machine.tool("show", "--unit", unit, "--json", check=False).stdout
    return json.loads(shown)["throttles"] if shown else []


def limiting(machine: Machine, unit: str) -> list[dict[str, Any]]:
    """The throttles in force whose target has the name of a unit, as rules have them."""
    shown = json.loads(machine.tool("list", "--json").stdout)["throttles"]
    return [one for one in shown if unit in json.dumps(one["target"])]


def sent(machine: Machine, unit: str) -> Any:
    """What the limit of a unit has counted of what it sends."""
    (one,) = limits_of(machine, unit)
    return one["counters"]["upload"]


def fetched(machine: Machine) -> int:
    """How many bytes a connection to web.socket gives."""
    return int(machine.run("python3", "-c", FETCH).stdout)


@pytest.mark.parametrize("given", [UNIT, TEMPLATE], ids=["instance", "template"])
def test_a_drop_in_limits_from_the_first_packet_on(machine: Machine, given: str) -> None:
    """Whenever the service starts, also what its first commands send; and it ends with it."""
    machine.tool("drop-in", given, *LIMIT)
    try:
        machine.run("systemctl", "start", UNIT)
        assert sent(machine, UNIT)["packets_total"] == 6
        first = limits_of(machine, UNIT)
        machine.run("systemctl", "restart", UNIT)
        assert sent(machine, UNIT)["packets_total"] == 6
        assert limits_of(machine, UNIT)[0]["id"] != first[0]["id"]
        machine.run("systemctl", "stop", UNIT)
        eventually(lambda: machine.state(KEEPER) == "inactive")
        assert limits_of(machine, UNIT) == []
    finally:
        machine.tool("drop-in", given, "--remove")
        machine.run("systemctl", "stop", UNIT)
    assert not machine.exists(f"{UNITS}/{given}.d")
    assert not machine.exists(f"{UNITS}/pybpfthrottle-limit-{given}")


def test_a_service_that_runs_is_limited_at_once(machine: Machine) -> None:
    """And no longer when the drop-in is removed, while it goes on."""
    machine.run("systemctl", "start", UNIT)
    said = machine.tool("drop-in", UNIT, *LIMIT).stdout
    assert "is limited now, and whenever it runs" in said
    assert len(limits_of(machine, UNIT)) == 1
    machine.tool("drop-in", UNIT, "--upload-limit", "3M")
    assert [one["limits"]["upload"] for one in limits_of(machine, UNIT)] == [3 << 20]
    machine.tool("drop-in", UNIT, "--remove")
    assert limits_of(machine, UNIT) == []
    assert machine.state(UNIT) == "active"
    machine.run("systemctl", "stop", UNIT)


@pytest.mark.parametrize("optional", [False, True])
def test_what_cannot_be_limited_does_not_start(machine: Machine, optional: bool) -> None:
    """Unless that is wanted."""
    machine.write(f"{UNITS}/{KEEPER}.d/fails.conf", "[Service]\nExecStartPre=/bin/false\n")
    machine.tool("drop-in", UNIT, *LIMIT, *["--optional"] * optional)
    started = machine.run("systemctl", "start", UNIT, check=False)
    state = machine.state(UNIT)
    machine.run("systemctl", "stop", UNIT)
    machine.tool("drop-in", UNIT, "--remove")
    machine.run("rm", "-r", f"{UNITS}/{KEEPER}.d")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "reset-failed")
    assert (started.returncode == 0, state) == ((True, "active") if optional else (False, "failed"))


def test_a_drop_in_that_fails_is_taken_back(machine: Machine) -> None:
    """The service that runs is not left with a limit that keeps it from its next start."""
    machine.run("systemctl", "start", UNIT)
    machine.write(f"{UNITS}/{KEEPER}.d/fails.conf", "[Service]\nExecStartPre=/bin/false\n")
    done = machine.tool("drop-in", UNIT, *LIMIT, check=False)
    assert done.returncode == 1
    assert "systemctl restart" in done.stderr
    assert not machine.exists(f"{UNITS}/{UNIT}.d")
    machine.run("rm", "-r", f"{UNITS}/{KEEPER}.d")
    machine.run("systemctl", "stop", UNIT)
    machine.run("systemctl", "reset-failed")


@pytest.mark.since("5.10")
def test_what_comes_in_by_udp_waits_in_a_queue(machine: Machine) -> None:
    """A service that keeps a limit may use the one device that this needs."""
    machine.run("sh", "-c", FAR)
    machine.write("/opt/take.py", TAKE)
    machine.write(f"{UNITS}/{TAKER}", "[Service]\nExecStart=python3 /opt/take.py\n")
    machine.run("systemctl", "daemon-reload")
    machine.tool("drop-in", TAKER, "--download-limit", "200K")
    try:
        machine.run("systemctl", "start", TAKER)
        machine.run("ip", "netns", "exec", "far", "python3", "-c", FLOOD)
        (one,) = limits_of(machine, TAKER)
        assert one["how"]["download"]["udp"] == "queue", one["how"]
    finally:
        machine.tool("drop-in", TAKER, "--remove")
        machine.run("systemctl", "stop", TAKER)


def test_an_alias_is_the_service_itself(machine: Machine) -> None:
    """Its cgroup has the other name; what systemd does not know is refused."""
    shown = machine.tool("drop-in", ALIAS, *LIMIT, "--dry-run").stdout
    assert f"--unit={WEB} " in shown
    assert f"{UNITS}/{WEB}.d/" in shown
    unknown = machine.tool("drop-in", f"no{WEB}", *LIMIT, check=False)
    assert unknown.returncode == 1
    assert f"systemd has no service no{WEB} (its state: not-found)" in unknown.stderr


def test_what_a_socket_unit_accepts_is_limited(machine: Machine) -> None:
    """Its sockets are in a cgroup of their own; the connection that starts the service counts."""
    machine.run("systemctl", "start", SOCKET)
    said = machine.tool("drop-in", WEB, *LIMIT).stdout
    try:
        assert f"{SOCKET} starts it" in said
        assert fetched(machine) == ANSWER_BYTES
        assert sent(machine, WEB)["bytes_total"] >= ANSWER_BYTES
    finally:
        machine.tool("drop-in", WEB, "--remove")
        machine.run("systemctl", "stop", SOCKET, WEB)


# Any command that limits has another process keep what is kept by the kernel alone.
@pytest.mark.alone
def test_a_limit_that_is_kept_waits_for_its_unit(machine: Machine) -> None:
    """Though its process is killed, and the unit does not run when another one takes over.

    The service that has another one do so may end meanwhile.
    """
    machine.tool("drop-in", UNIT, *LIMIT)
    machine.run("systemctl", "start", SOCKET, WEB)
    machine.tool("--unit", WEB, *LIMIT, "--detach")
    try:
        owner = limits_of(machine, WEB)[0]["owner_pid"]
        machine.run("systemctl", "restart", WEB)
        fetched(machine)
        assert sent(machine, WEB)["bytes_total"] >= ANSWER_BYTES
        machine.run("kill", "-9", str(owner))
        machine.run("systemctl", "stop", SOCKET, WEB)
        machine.run("systemctl", "start", UNIT)
        machine.run("systemctl", "stop", UNIT)
        eventually(lambda: machine.state(KEEPER) == "inactive")
        eventually(lambda: limits_of(machine, WEB)[0]["supervised"])
        machine.run("systemctl", "start", SOCKET, WEB)
        fetched(machine)
        assert sent(machine, WEB)["bytes_total"] >= ANSWER_BYTES
    finally:
        machine.tool("remove", "--unit", WEB, check=False)
        machine.tool("drop-in", UNIT, "--remove")
        machine.run("systemctl", "stop", SOCKET, WEB)


def test_the_service_is_installed_and_removed(machine: Machine) -> None:
    """It runs now and after each boot, keeps the rules, reads them again, and ends with them."""
    machine.run("systemctl", "start", SOCKET, WEB)
    rules = "/etc/pybpfthrottle/rules.d/web.toml"
    text = f'[[rule]]\nname = "w"\nmatch = {{ unit = "{WEB}" }}\nupload = '
    machine.write(rules, f'{text}"2M"\n')

    def uploads() -> list[int]:
        return [one["limits"]["upload"] for one in limiting(machine, WEB)]

    machine.tool("install-service")
    try:
        assert machine.state("pybpfthrottle") == "active"
        assert machine.run("systemctl", "is-enabled", "pybpfthrottle").stdout == "enabled\n"
        assert uploads() == [2 << 20]
        machine.write(rules, f'{text}"3M"\n')
        machine.run("systemctl", "reload", "pybpfthrottle")
        eventually(lambda: uploads() == [3 << 20])
    finally:
        machine.tool("install-service", "--uninstall")
        machine.run("systemctl", "stop", SOCKET, WEB)
    assert machine.state("pybpfthrottle") == "inactive"
    assert not machine.exists(f"{UNITS}/pybpfthrottle.service")
    assert uploads() == []


def test_a_boot_finds_the_same_limits(tmp_path: Path) -> None:
    """Nothing is left of a machine that was turned off but its files; they give the same state."""
    service = f"boot{OWN}.service"

    def state(machine: Machine) -> list[Any]:
        """What is in force for the service, but for what is of one boot: ids, times, counters."""
        kept = ("target", "limits", "rule", "shape", "traffic", "backend", "supervised")
        found = eventually(lambda: limiting(machine, service))
        return [{name: one.get(name) for name in kept} for one in found]

    with booted(str(tmp_path)) as machine:
        machine.write(
            f"{UNITS}/{service}",
            "[Service]\nExecStart=sleep 600\n[Install]\nWantedBy=multi-user.target\n",
        )
        machine.write(
            "/etc/pybpfthrottle/rules.d/boot.toml",
            f'[[rule]]\nname = "b{OWN}"\nmatch = {{ unit = "{service}" }}\n'
            'upload = "2M"\ndownload = "3M"\ntraffic = "internet"\n',
        )
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "enable", "--now", service)
        machine.tool("install-service")
        before = state(machine)
    assert [one["limits"] for one in before] == [{"download": 3 << 20, "upload": 2 << 20}]
    with booted(str(tmp_path)) as machine:
        assert state(machine) == before
        assert machine.state(service) == "active"
        assert machine.state("pybpfthrottle") == "active"
