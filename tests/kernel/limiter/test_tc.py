"""The backends by tc: what of others they leave alone, and what they do when something changes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Iterator

import pytest
from by_backend import (
    FAST,
    RATE,
    Case,
    answer,
    configuration,
    limiting,
    recorded_in,
    running_with,
    started,
    throttles,
    tool,
    unchanged,
)
from lab import ENVIRONMENT, TOOL, Lab, lab
from refusing import __file__ as refusing
from since import needs_command, needs_option, since
from targets import eventually

from pybpfthrottle.backends import files
from pybpfthrottle.backends.protocol import get
from pybpfthrottle.model import Direction

pytestmark = since("5.13")

HTB = Case("tc_htb", Direction.UPLOAD)
IFB = Case("ifb_tc", Direction.DOWNLOAD)
POLICE = Case("tc_police", Direction.DOWNLOAD)
each_case = pytest.mark.parametrize("case", [HTB, IFB], ids=lambda case: case.backend)


@pytest.fixture(autouse=True)
def _commands() -> None:
    """The commands that show what is in force."""
    for name in ("nft", "tc"):
        needs_command(name)


@pytest.fixture
def own() -> Iterator[Lab]:
    """Two namespaces, with a server in one of them, and a configuration to be left alone."""
    with lab(fastest=FAST) as made, unchanged(made):
        yield made


def tc(own: Lab, arguments: str) -> str:
    """What tc prints."""
    return answer(own, "tc", *arguments.split())


def qdiscs(own: Lab, device: str = "wire") -> list[dict]:
    """The queueing disciplines of a device."""
    return json.loads(tc(own, f"-j qdisc show dev {device}"))


@contextmanager
def in_force(own: Lab, case: Case, *command: str) -> Iterator[subprocess.Popen[str]]:
    """The tool with its limit in force."""
    with started(running_with(own, case, *command)) as running:
        limiting(running, *command[:1])
        yield running


def ended(running: subprocess.Popen[str]) -> str:
    """End the tool, and return what it has said."""
    running.terminate()
    return running.communicate()[1]


def run_once(own: Lab, case: Case, **environment: str) -> subprocess.CompletedProcess[str]:
    """The tool with a command that ends at once."""
    command = [*TOOL, "run", *case.options, "--", sys.executable, "-c", ""]
    changed = [f"{name}={value}" for name, value in environment.items()]
    return subprocess.run(
        own.inside("env", *changed, *command), env=ENVIRONMENT, capture_output=True, text=True
    )


@pytest.mark.parametrize("kind", ["pfifo", "tbf rate 8mbit burst 64k latency 9ms"])
def test_a_root_that_somebody_has_set_is_left_alone(own, kind):
    """Its kind and its device are told, and it is what it was."""
    tc(own, f"qdisc add dev wire root handle 7: {kind}")
    before = configuration(own)
    done = run_once(own, HTB)
    assert done.returncode == 125
    assert f"wire has a root qdisc that somebody has set ({kind.split()[0]} 7:)" in done.stderr
    assert configuration(own) == before
    tc(own, "qdisc delete dev wire root")


@pytest.mark.parametrize("kind", ["clsact", "ingress"])
def test_filters_of_others_are_left_alone(own, kind):
    """With the qdisc that they are in, whichever it is."""
    tc(own, f"qdisc add dev wire {kind}")
    match = "protocol ip u32 match ip dport 9 0xffff"
    tc(own, f"filter add dev wire ingress pref 31000 {match}")
    before = tc(own, "-j filter show dev wire ingress")
    with in_force(own, IFB) as running:
        assert before[1:-2] in tc(own, "-j filter show dev wire ingress")
        ended(running)
    assert tc(own, "-j filter show dev wire ingress") == before
    tc(own, f"qdisc delete dev wire {kind}")


def test_the_device_of_downloads_has_no_address(own):
    """Its address would be a route, and the limit would follow that to the device itself."""
    with in_force(own, IFB) as running:
        eventually(lambda: "pybpf-" in answer(own, "ip", "link"))
        assert "pybpf-" not in answer(own, "ip", "-6", "route")
        assert "followed" not in ended(running)


def test_a_qdisc_in_which_somebody_has_put_a_filter_stays(own):
    """Ours was there first; only ours goes."""
    with in_force(own, IFB) as running:
        tc(own, "filter add dev wire egress pref 7 protocol ip u32 match ip dport 9 0xffff")
        ended(running)
    assert [one["kind"] for one in qdiscs(own)] == ["noqueue", "clsact"]
    assert json.loads(tc(own, "-j filter show dev wire egress"))
    tc(own, "qdisc delete dev wire clsact")


@pytest.mark.timed
@each_case
def test_throttles_share_what_a_device_has_only_once(own, case):
    """The last one removes it, whoever has made it."""
    with in_force(own, case) as first, in_force(own, case) as second:
        shared = [one["kind"] for one in qdiscs(own)]
        ended(first)
        # One queue less, below HTB's root.
        left = [one["kind"] for one in qdiscs(own)]
        assert set(left) == set(shared)
        assert not throttles(first.pid)
        assert throttles(second.pid)
        time.sleep(1)
        assert "removed" not in ended(second)
    assert [one["kind"] for one in qdiscs(own)] == ["noqueue"]


@pytest.mark.timed
@each_case
def test_what_somebody_removes_is_put_back_once(own, case):
    """Within a second; the second time the limit ends."""
    remove = {HTB: "qdisc delete dev wire root", IFB: "qdisc delete dev wire clsact"}[case]
    kind = {HTB: "htb", IFB: "clsact"}[case]
    with in_force(own, case) as running:
        tc(own, remove)
        eventually(lambda: kind in [one["kind"] for one in qdiscs(own)])
        tc(own, remove)
        time.sleep(3)
        said = ended(running)
    assert said.count("it was restored, and will not be a second time") == 1
    assert said.count("was removed again, not by pybpfthrottle: the limit ends") == 1


@pytest.mark.timed
def test_an_ifb_device_that_somebody_deletes_is_put_back(own):
    """What is redirected there would be lost otherwise."""
    with in_force(own, IFB) as running:
        [name] = [one for one in devices(own) if one.startswith("pybpf-")]
        answer(own, "ip", "link", "delete", name)
        eventually(lambda: name in devices(own))
        time.sleep(2)
        assert name in devices(own)
        said = ended(running)
    assert "it was restored" in said
    assert "removed again" not in said


def devices(own: Lab) -> list[str]:
    """The devices in the client's namespace."""
    return [one["ifname"] for one in json.loads(answer(own, "ip", "-j", "link"))]


def devices_of(running: subprocess.Popen[str], case: Case) -> list[str]:
    """The devices on which a throttle is recorded to limit."""
    [record] = [one for one in files.records(case.backend) if one.owner.pid == running.pid]
    return list(record.handles["devices"])


@pytest.mark.timed
@each_case
def test_a_default_route_that_moves_takes_the_limit_along(own, case):
    """What is on the device that it leaves goes."""
    for command in (
        "ip link add other type veth peer name far",
        "ip link set other up",
        "ip address add 10.98.0.1/24 dev other",
        f"ip route add default via {own.wire.server.address}",
    ):
        answer(own, *command.split())
    kind = {HTB: "htb", IFB: "clsact"}[case]
    with in_force(own, case) as running:
        assert kind in [one["kind"] for one in qdiscs(own)]
        answer(own, *["ip", "route", "replace", "default", "via", "10.98.0.2"])
        eventually(lambda: kind in [one["kind"] for one in qdiscs(own, "other")])
        eventually(lambda: kind not in [one["kind"] for one in qdiscs(own)])
        answer(own, *["ip", "link", "set", "other", "down"])
        answer(own, *["ip", "link", "set", "other", "name", "another"])
        answer(own, *["ip", "link", "set", "another", "up"])
        answer(own, *["ip", "route", "replace", "default", "via", "10.98.0.2"])
        eventually(lambda: devices_of(running, case) == ["another"])
        assert kind in [one["kind"] for one in qdiscs(own, "another")]
        answer(own, *["ip", "link", "delete", "another"])
        time.sleep(3)
        said = ended(running)
    assert "packets are routed by other now: the limit has followed" in said
    assert "packets are routed by another now: the limit has followed" in said
    assert "was removed" not in said


@pytest.mark.timed
@each_case
@pytest.mark.parametrize("limit", ["none", "100G", "1000"])
def test_a_limit_is_changed_to_any_other(own, case, limit):
    """Lifted, the highest and the lowest one."""
    with in_force(own, case) as running:
        [listed] = throttles(running.pid)
        done = tool("set", listed["id"], f"--{case.direction}-limit", limit)
        assert done.returncode == 0, done.stderr
        time.sleep(3)
        assert f"The {case.direction} limit was" in ended(running)


def test_without_a_route_it_is_refused(tmp_path):
    """There is no device to limit on."""
    command = ["unshare", "--net", *TOOL, "run", *HTB.options, "--", "true"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 125
    assert "there is no route, so tc_htb has no device to limit" in done.stderr


@each_case
def test_without_tc_an_explicit_choice_is_refused_with_the_package(own, tmp_path, case):
    """And nothing is started."""
    for name in ("nft", "ip"):
        os.symlink(needs_command(name), tmp_path / name)
    done = run_once(own, case, PATH=str(tmp_path))
    assert done.returncode == 125
    assert done.stderr == (
        f"pybpfthrottle: error: cannot limit {case.direction}: {case.backend}: tc is not"
        " installed: install the package iproute2\n"
    )


FAILING = """#!/bin/sh
# Fails at a command that has this text, except on the loopback device, which trials use.
text=$(cat)
case "$* $text" in
*"dev lo"* | *--check*) ;;
*"{word}"*) echo "Error: out of luck" >&2; exit 1 ;;
esac
printf '%s\\n' "$text" | exec {program} "$@"
"""


@pytest.mark.parametrize(
    ("case", "program", "word"),
    [
        (HTB, "tc", "class replace"),
        (HTB, "nft", "create table inet pybpfthrottle"),
        (IFB, "tc", "qdisc add dev pybpf"),
        (IFB, "tc", "qdisc add dev wire"),
    ],
    ids=lambda value: str(getattr(value, "backend", value)),
)
def test_a_command_that_fails_half_way_leaves_nothing(own, tmp_path, case, program, word):
    """The error is its own; neither rules nor devices nor a file stay."""
    script = tmp_path / program
    script.write_text(FAILING.format(word=word, program=shutil.which(program)))
    script.chmod(0o755)
    done = run_once(own, case, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 125
    assert done.stderr == f"pybpfthrottle: error: {program} failed: Error: out of luck\n"
    assert recorded_in(own, case.backend) == []


def test_a_device_that_has_our_name_and_is_not_ours_is_left_alone(own):
    """Only IFB devices are deleted."""
    answer(own, *["ip", "link", "add", "pybpf-zzzzzz", "type", "veth"])
    before = answer(own, "ip", "-j", "link")
    assert tool("cleanup").returncode == 0
    assert answer(own, "ip", "-j", "link") == before
    answer(own, *["ip", "link", "delete", "pybpf-zzzzzz"])


WITHOUT_CGROUPS = ["unshare", "--mount", "sh", "-ec", 'umount -l -a -t cgroup2; exec "$@"', "sh"]


@pytest.mark.timed
@pytest.mark.parametrize(
    ("prefix", "options"),
    [([], IFB.options), (WITHOUT_CGROUPS, ["-d", str(RATE.bytes_per_s)])],
    ids=["named", "without cgroups"],
)
def test_a_connection_that_is_open_is_limited_by_ifb_tc(own, prefix, options):
    """With --pid: the sockets of the process are followed, wherever they were created."""
    with started(own.inside("curl", "--globoff", "-so", "/dev/null", own.url)) as client:
        time.sleep(0.5)
        command = [*prefix, *TOOL, "--pid", str(client.pid), *options, "--duration", "6"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        client.kill()
    assert done.returncode == 0, done.stderr
    assert "✅ THROTTLED" in done.stdout
    assert "a new connection is limited within 0.05 s" in done.stdout


def test_two_backends_do_not_limit_one_process_unasked(own):
    """And sockets tells by what the process's are limited."""
    with started(own.inside("curl", "--globoff", "-so", "/dev/null", own.url)) as client:
        command = ["--pid", str(client.pid), "-d", "1M", "--download-backend"]
        with started([*TOOL, *command, "ifb_tc"]) as running:
            eventually(lambda: throttles(running.pid))
            for other in ("ebpf", "nftables", "ifb_tc"):
                refused = tool(*command, other)
                assert refused.returncode == 1
                assert f"is already limited by process {running.pid}" in refused.stderr
            found = json.loads(tool("sockets", "--pid", str(client.pid), "--json").stdout)
        client.kill()
    listed = [one for one in found["processes"][0]["sockets"] if one["covered"]]
    assert [
        (cover["by"], cover["directions"]) for one in listed for cover in one["covered_by"]
    ] == [("process", ["download"])]


def test_without_ebpf_and_nftables_tc_is_used_and_that_is_said(own, tmp_path):
    """Downloads need no nft at all; a policer is not used unasked."""
    for name in ("tc", "ip"):
        os.symlink(needs_command(name), tmp_path / name)
    refused = [sys.executable, refusing, f"all={errno.ENOSYS}", "--", *TOOL]
    done = subprocess.run(
        own.inside("env", f"PATH={tmp_path}", *refused, "run", "-d", "1M", "--", "/bin/true"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ifb_tc limits downloads, as nftables cannot: nft is not installed" in done.stderr
    assert "tc_police" not in done.stderr


@pytest.mark.parametrize("case", [HTB, IFB, POLICE], ids=lambda case: case.backend)
def test_the_other_direction_is_refused(own, case):
    """With what it can do."""
    other = next(one for one in Direction if one is not case.direction)
    done = run_once(own, Case(case.backend, other))
    assert done.returncode == 125
    assert f"{case.backend}: it limits {case.direction}s only" in done.stderr


@pytest.fixture
def policer(own) -> None:
    """A kernel that can police."""
    done = run_once(own, POLICE)
    works = "CONFIG_NET_ACT_POLICE" not in done.stderr
    if not works:
        assert done.returncode == 125
        assert "cannot limit download: tc_police: this kernel lacks CONFIG_NET" in done.stderr
    needs_option("CONFIG_NET_ACT_POLICE", works=works)


@pytest.mark.timed
@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
@pytest.mark.usefixtures("policer")
def test_a_policer_limits_all_that_comes_by_a_device(ipv6):
    """A neighbour shares the limit, and the notes say so."""
    with lab(ipv6=ipv6, fastest=FAST) as own, unchanged(own):
        with in_force(own, POLICE) as running:
            assert get(POLICE.backend).priority.name == "FALLBACK"
            neighbour = own.inside("curl", "--globoff", "-sN", "--max-time", "8", own.url)
            events = own.read(neighbour).windows(RATE, 8)
            [listed] = throttles(running.pid)
            [shown] = json.loads(tool("show", listed["id"], "--json").stdout)["throttles"]
            said = ended(running)
        assert sum(events[2:]) / 6 == pytest.approx(1, abs=0.15)
        assert shown["counters"]["download"]["packets_dropped"] > 0
        assert "ALL that comes by wire" in said


@pytest.mark.usefixtures("policer")
def test_after_a_kill_a_policer_is_removed(own):
    """By cleanup, as all else."""
    with in_force(own, POLICE) as running:
        [listed] = throttles(running.pid)
        tool("set", listed["id"], "-d", "2M")
        running.kill()
        running.wait()
    tool("run", "-q", "-u", "1M", "--", "true")
    assert recorded_in(own, POLICE.backend) == []
