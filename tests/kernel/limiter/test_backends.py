"""Each backend by way of the tool: what it limits, what it leaves alone, and what it leaves."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import Iterator

import pytest
from by_backend import (
    FAST,
    RATE,
    Case,
    answer,
    limiting,
    running_with,
    started,
    throttles,
    tool,
    unchanged,
)
from lab import ENVIRONMENT, TOOL, Lab, lab
from refusing import __file__ as refusing
from since import is_emulated, needs_command, since
from targets import eventually

from pybpfthrottle.backends import files
from pybpfthrottle.backends.nft import Nft
from pybpfthrottle.backends.nftables.table import Table
from pybpfthrottle.backends.protocol import Match, Order, Record
from pybpfthrottle.errors import BackendError, NoNamespaceError
from pybpfthrottle.linux import cgroup, netns, process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.netns import Place
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.model import Direction, Target, ThrottleSpec

SECONDS = 8
# A bucket may hold a second's worth, which passes at once.
SETTLED = 2
# The directions that a backend can limit, and the first kernel that has what it needs.
BACKENDS = {
    "ebpf": (tuple(Direction), "4.15"),
    "nftables": (tuple(Direction), "5.13"),
    "tc_htb": ((Direction.UPLOAD,), "5.13"),
    "ifb_tc": ((Direction.DOWNLOAD,), "5.8"),
}
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(backend, direction), marks=since(release), id=f"{backend}-{direction}")
        for backend, (directions, release) in BACKENDS.items()
        for direction in directions
    ],
)


@pytest.fixture(autouse=True)
def _nft() -> None:
    """The command that shows what is in force."""
    needs_command("nft")


@pytest.fixture
def own() -> Iterator[Lab]:
    """Two namespaces, with a server in one of them, and a configuration to be left alone."""
    with lab(fastest=FAST) as made, unchanged(made):
        yield made


@pytest.mark.timed
@pytest.mark.parametrize("ipv6", [False, True], ids=["IPv4", "IPv6"])
@each_case
def test_a_transfer_is_held_to_its_limit_and_others_are_not(case, ipv6):
    """By curl, in either direction, over IPv4 and IPv6; a neighbour has all that is left."""
    with lab(ipv6=ipv6, fastest=FAST) as own, unchanged(own):
        neighbour = f"sleep 4; curl --globoff -sN --max-time 2 {own.url} | wc -c"
        with started(own.inside("sh", "-c", neighbour)) as other:
            transfer = own.download if case.direction is Direction.DOWNLOAD else own.upload
            windows = transfer(case.options, SECONDS).windows(RATE, SECONDS)
            assert sum(windows[SETTLED:]) / (SECONDS - SETTLED) == pytest.approx(1, abs=0.1)
            enough = 8 * RATE.bytes_per_s if is_emulated() else FAST.bytes_per_s
            assert int(other.communicate()[0]) > enough


@pytest.mark.timed
@each_case
def test_a_throttle_is_listed_changed_and_removed_from_anywhere(own, case):
    """The owner says what others have changed, and goes on without the limit."""
    with started(running_with(own, case)) as running:
        [listed] = limiting(running)
        direction = str(case.direction)
        assert listed["backends"] == {direction: case.backend}
        option = f"--{direction}-limit"
        tool("set", listed["id"], option, "2M")
        assert throttles(running.pid)[0]["limits"][direction] == 2 << 20
        [shown] = json.loads(tool("show", listed["id"], "--json").stdout)["throttles"]
        assert shown["how"][direction]["backend"] == case.backend
        time.sleep(3)
        assert tool("remove", listed["id"]).stdout.startswith("Removed ")
        assert throttles(running.pid) == []
        time.sleep(3)
        assert running.poll() is None
        running.terminate()
        said = running.communicate()[1]
    assert f"The {direction} limit was changed to 2.0 MB/s." in said
    assert "The limit was removed; the command continues without it." in said


@since("5.13")
def test_a_throttle_by_two_backends_is_one(own):
    """It is listed, changed and removed as one, and its owner notices all of it."""
    upload = ("--upload-limit", "1M", "--upload-backend", "ebpf")
    command = [*TOOL, "run", *NFT_DOWNLOAD.options, *upload, "--", "sleep", "60"]
    with started(own.inside(*command)) as running:
        [listed] = limiting(running)
        assert tables(own)
        assert listed["backends"] == {"upload": "ebpf", "download": "nftables"}
        changed = tool("set", listed["id"], "-d", "2M", "-u", "3M")
        assert changed.stdout == (f"Changed {listed['id']}: download 2.0 MB/s, upload 3.0 MB/s.\n")
        assert throttles(running.pid)[0]["limits"] == {"download": 2 << 20, "upload": 3 << 20}
        [shown] = json.loads(tool("show", listed["id"], "--json").stdout)["throttles"]
        assert {way: how["backend"] for way, how in shown["how"].items()} == listed["backends"]
        assert tool("remove", listed["id"]).stdout.count("Removed") == 1
        eventually(lambda: not throttles(running.pid))
        assert tables(own) == []


@each_case
def test_after_a_kill_cleanup_leaves_nothing(own, case):
    """Neither rules nor files nor cgroups; it says what it has removed."""
    with started(running_with(own, case)) as running:
        [listed] = limiting(running)
        made = [Cgroup(path) for path in listed["target"]["cgroups"]]
        running.kill()
        running.wait()
        for pid in [pid for one in made for pid in one.pids()]:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(one.populated() for one in made))
        done = tool("cleanup")
        assert done.returncode == 0, done.stderr
        assert not any(one.exists() for one in made)
        assert throttles(running.pid) == []


@each_case
def test_the_next_start_tidies_up_too(own, case):
    """As cleanup does."""
    with started(running_with(own, case)) as running:
        [listed] = limiting(running)
        running.kill()
        running.wait()
    tool("run", "-q", "-u", "1M", "--", "true")
    assert listed["id"] not in tool("list", "--json").stdout


NFT_DOWNLOAD = Case("nftables", Direction.DOWNLOAD)


def tables(own: Lab) -> list[str]:
    """The tables of throttles."""
    return [line for line in answer(own, "nft", "list", "tables").splitlines() if "pybpf" in line]


@pytest.mark.timed
@since("5.13")
def test_a_flushed_table_is_put_back_once(own):
    """Somebody's flush ruleset is noticed, said and undone; the second one ends the limit."""
    with started(running_with(own, NFT_DOWNLOAD)) as running:
        for _ in range(2):
            # Of our own table only: the other one has to be the same afterwards.
            [table] = eventually(lambda: tables(own))
            answer(own, *f"nft delete {table}".split())
            assert tables(own) == []
        time.sleep(3)
        assert tables(own) == []
        assert running.poll() is None
        running.terminate()
        said = running.communicate()[1]
    assert said.count("it was restored, and will not be a second time") == 1
    assert said.count("was removed again, not by pybpfthrottle: the limit ends") == 1
    assert "The limit was removed; the command continues without it." in said


@pytest.mark.timed
@since("5.13")
def test_a_restored_table_counts_on(own):
    """From what was known."""
    command = f"curl --globoff -sN --max-time 5 {own.url} >/dev/null; sleep 30"
    with started(running_with(own, NFT_DOWNLOAD, "sh", "-c", command)) as running:
        [listed] = limiting(running, "sh")
        time.sleep(3)
        [table] = tables(own)
        answer(own, *f"nft flush {table}".split())
        eventually(lambda: "counter name" in answer(own, *f"nft list {table}".split()))
        [shown] = json.loads(tool("show", listed["id"], "--json").stdout)["throttles"]
        assert shown["counters"]["download"]["bytes_total"] > 2 * RATE.bytes_per_s


@since("5.13")
def test_a_table_of_a_throttles_name_that_is_not_ours_is_left_alone(own, scratch):
    """It is neither used nor removed."""
    foreign = "table inet pybpfthrottle-zzzzzz { chain download { }; }"
    subprocess.run(own.inside("nft", "-f", "-"), input=foreign, text=True, check=True)
    before = answer(own, "nft", "list", "ruleset")
    number = netns.number(own.wire.client.process.pid)
    limits = {Direction.UPLOAD: RATE}
    with Nft(Place(number)) as nft:
        table = Table("zzzzzz", nft)
        with pytest.raises(BackendError, match="that pybpfthrottle has not made"):
            table.create(limits, Order(ThrottleSpec(Target(), limits), limits, [scratch]))
        assert not table.delete()
    gone = Identity(1 << 22, process.identity().pid_namespace, 1)
    spec = ThrottleSpec(Target(), {Direction.UPLOAD: RATE})
    handles = {"network_namespace": number}
    files.write(Record("zzzzzz", spec, gone, "nftables", Match.CGROUP, handles=handles))
    assert tool("cleanup").returncode == 0
    assert answer(own, "nft", "list", "ruleset") == before
    assert files.read("nftables", "zzzzzz") is None
    answer(own, "nft", "delete", "table", "inet", "pybpfthrottle-zzzzzz")


@since("5.14")
def test_a_namespace_that_has_got_the_number_of_another_is_left_alone(own, scratch):
    """The kernel gives it to the next one at once; what is there is not a dead throttle's."""
    number = netns.number(own.wire.client.process.pid)
    limits = {Direction.UPLOAD: RATE}
    with Nft(Place(number)) as nft:
        order = Order(ThrottleSpec(Target(), limits), limits, [scratch])
        Table("zzzzzz", nft).create(limits, order)
    gone = Identity(1 << 22, process.identity().pid_namespace, 1)
    spec = ThrottleSpec(Target(), {Direction.UPLOAD: RATE})
    cookie = netns.cookie(number)
    Nft(Place(number, cookie)).close()
    with pytest.raises(NoNamespaceError, match=f"no network namespace {number} any more"):
        Nft(Place(number, cookie + 1))
    for other, is_left in ((cookie + 1, True), (cookie, False)):
        handles = {"network_namespace": number, "network_cookie": other}
        files.write(Record("zzzzzz", spec, gone, "nftables", Match.CGROUP, handles=handles))
        assert tool("cleanup").returncode == 0
        assert files.read("nftables", "zzzzzz") is None
        assert ("zzzzzz" in answer(own, "nft", "list", "ruleset")) is is_left


# Once, or so many times: a backend that follows sockets has to notice this one.
TO_ITSELF = """
import socket, sys, time
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind(("127.0.0.1", 0))
for _ in range(int(sys.argv[1])):
    own.sendto(b"x", own.getsockname())
    own.recv(9)
    time.sleep(0.1)
"""


SOCKETS = """
import socket, sys
before = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
before.connect((sys.argv[1], 9))
print("before", flush=True)
sys.stdin.readline()
after = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
after.connect((sys.argv[1], 9))
print("after", flush=True)
sys.stdin.readline()
"""


@since("5.13")
def test_sockets_tells_what_nftables_limits(own, scratch):
    """What was created in the cgroup is covered, what was created before is not."""
    client = subprocess.Popen(
        own.inside(sys.executable, "-c", SOCKETS, own.wire.server.address),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    command = [*TOOL, "--cgroup", scratch.path, *NFT_DOWNLOAD.options]
    try:
        assert client.stdout.readline() == "before\n"
        scratch.move_in(client.pid)
        with started(command) as running:
            eventually(lambda: throttles(running.pid))
            client.stdin.write("\n")
            client.stdin.flush()
            assert client.stdout.readline() == "after\n"
            answer = json.loads(tool("sockets", "--pid", str(client.pid), "--json").stdout)
            [before, after] = answer["processes"][0]["sockets"]
        assert (before["covered"], before["reason"]["code"]) == (False, "other-cgroup")
        assert after["covered"], after
    finally:
        client.kill()
        client.communicate()


@since("5.13")
def test_a_new_sys_hides_no_cgroup_from_nft(scratch):
    """Below ip netns exec cgroup v2 is not mounted, and cgroups are named by descriptor."""
    name = scratch.path.rpartition("/")[2]
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        talk = f"{shlex.join([sys.executable, '-c', TO_ITSELF, '1'])}; nft list ruleset"
        command = [*TOOL, "run", "-q", *NFT_DOWNLOAD.options, "--loopback", "--", "sh", "-c"]
        exec_up = ["ip", "netns", "exec", name]
        subprocess.run([*exec_up, "ip", "link", "set", "lo", "up"], check=True)
        done = subprocess.run(
            [*exec_up, *command, talk], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "socket cgroupv2 level" in done.stdout
        assert re.search(r"counter download-limited {\s*packets [1-9]", done.stdout), done.stdout
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@since("5.13")
def test_in_a_cgroup_namespace_it_is_refused_with_the_reason(own):
    """Nothing tells there how deep a cgroup is, and a wrong depth matches nothing."""
    command = ["unshare", "--cgroup", *TOOL, "run", *NFT_DOWNLOAD.options, "--", "true"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 125
    assert "this process is in a cgroup namespace" in done.stderr


@pytest.mark.parametrize("choice", [("--each", "--pid"), ("--name",)], ids=" ".join)
def test_what_needs_single_sockets_is_refused(own, choice):
    """A later process may be in any cgroup, so nftables could not know it."""
    which = str(os.getpid()) if choice[-1] == "--pid" else "nobody-has-this-name"
    done = tool(*choice, which, *NFT_DOWNLOAD.options)
    assert done.returncode == 1
    assert "nftables: nftables tells cgroups apart, and not single sockets" in done.stderr


@since("5.13")
@pytest.mark.parametrize("second", ["ebpf", "nftables"])
def test_two_backends_do_not_limit_one_cgroup_unasked(own, scratch, second):
    """Packets would be charged twice; --stack allows it."""
    first = {"ebpf": "nftables", "nftables": "ebpf"}[second]
    command = ["--cgroup", scratch.path, "-d", "1M", "--download-backend"]
    with started([*TOOL, *command, first]) as running:
        eventually(lambda: throttles(running.pid))
        refused = tool(*command, second)
        assert refused.returncode == 1
        assert f"is already limited by process {running.pid}" in refused.stderr
        assert tool(*command, second, "--stack", "--duration", "0.5").returncode == 0


def test_without_nft_an_explicit_choice_is_refused_with_the_package(own, tmp_path):
    """And nothing is started."""
    done = tool("run", *NFT_DOWNLOAD.options, "--", "true", PATH=str(tmp_path))
    assert done.returncode == 125
    assert done.stderr == (
        "pybpfthrottle: error: cannot limit download: nftables: nft is not installed: install the"
        " package nftables\n"
    )


FAILING = """#!/bin/sh
# Fails when it is to create a table, which is not the first call.
case "$*" in
*--check*) exec {nft} "$@" ;;
"-f -") echo "Error: out of luck" >&2; exit 1 ;;
*) exec {nft} "$@" ;;
esac
"""


@pytest.fixture
def failing(tmp_path) -> str:
    """A PATH with an nft that fails half-way."""
    script = tmp_path / "nft"
    script.write_text(FAILING.format(nft=shutil.which("nft")))
    script.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@since("5.13")
def test_an_nft_that_fails_half_way_leaves_nothing(own, failing):
    """The error is nft's own; neither a file nor a cgroup stays."""
    done = tool("run", *NFT_DOWNLOAD.options, "--", "true", PATH=failing)
    assert done.returncode == 125
    assert done.stderr == "pybpfthrottle: error: nft failed: Error: out of luck\n"
    assert [one for one in files.records("nftables") if process.is_gone(one.owner)] == []


def refused(*rules: str) -> list[str]:
    """The tool where bpf(2) refuses some commands."""
    return [sys.executable, refusing, *rules, "--", *TOOL]


@since("5.13")
def test_without_ebpf_the_next_backend_is_used_and_that_is_said(own):
    """Automatically, in one line."""
    command = [*refused(f"all={errno.ENOSYS}"), "run", "-d", "1M", "--", "true"]
    done = subprocess.run(own.inside(*command), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nftables limits downloads, as ebpf cannot: " in done.stderr


@since("5.13")
def test_a_backend_that_fails_while_starting_is_followed_by_the_next(own):
    """What the kernel refused is told in one line."""
    attach = [f"{command}={errno.EPERM}" for command in (8, 28)]
    command = [*refused(*attach), "run", "-d", "1M", "--", "true"]
    done = subprocess.run(own.inside(*command), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum("ebpf has failed: " in line for line in done.stderr.splitlines()) == 1
    assert "nftables: packets over the limit are dropped" in done.stderr


def test_without_any_backend_each_reason_is_told(own, tmp_path):
    """Neither bpf(2) nor nft."""
    command = [*refused(f"all={errno.ENOSYS}"), "run", "-d", "1M", "--", "true"]
    done = subprocess.run(
        command, env={**ENVIRONMENT, "PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 125
    assert "ebpf: " in done.stderr
    assert "nftables: nft is not installed: install the package nftables" in done.stderr


@each_case
def test_a_restarted_unit_is_limited_again(own, scratch, case):
    """In its new cgroup, by the same throttle; the record says where."""
    # No other test may have a unit of this name.
    name = f"{os.path.basename(scratch.path)}.service"
    unit = scratch.create_child(name)
    command = [*TOOL, "--unit", name, *case.options, "--loopback", "--json"]
    with started(own.inside(*command)) as running:
        [listed] = eventually(lambda: throttles(running.pid))
        unit.remove()
        unit = scratch.create_child(name)
        assert running.stdout is not None
        next(line for line in running.stdout if "was restarted: it is limited again" in line)
        client = own.inside(sys.executable, "-c", TO_ITSELF, "15")
        subprocess.run(client, preexec_fn=lambda: unit.move_in(0), check=True)
        [shown] = json.loads(tool("show", listed["id"], "--json").stdout)["throttles"]
        assert shown["counters"][str(case.direction)]["packets_total"] > 0
        assert (
            f"is already limited by process {running.pid}"
            in tool("--cgroup", unit.path, *case.options).stderr
        )
        unit.remove(patience_s=5)


@since("5.13")
@pytest.mark.timed
@pytest.mark.parametrize("rules", [[], [f"all={errno.ENOSYS}"]], ids=["", "without eBPF"])
def test_a_process_is_moved_for_a_backend_that_only_knows_cgroups(own, rules):
    """With --pid: what it opens from then on is limited, what it loses is said."""
    loop = f"while :; do curl --globoff -sN --max-time 1 {own.url} >/dev/null; done"
    with started(own.inside("sh", "-c", loop)) as client:
        command = [*(refused(*rules) if rules else TOOL), "--pid", str(client.pid)]
        done = subprocess.run(
            [*command, *NFT_DOWNLOAD.options, "--duration", "10"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        client.kill()
    assert done.returncode == 0, done.stderr
    assert "Single sockets cannot be limited here: nftables tells cgroups apart" in done.stdout
    assert "moved into a cgroup of their own" in done.stdout
    assert "Connections that are already open are not limited" in done.stdout
    # A slow machine sees of ten seconds too little to tell a burst from a higher rate.
    held = ("✅ THROTTLED", "within the burst") if is_emulated() else ("✅ THROTTLED",)
    assert any(words in done.stdout for words in held), done.stdout


@since("5.13")
@pytest.mark.timed
def test_a_limit_that_sees_nothing_is_told_of_after_the_first_seconds(own):
    """A connection that was open before is not moved with its process: that does not work."""
    with started(own.inside("curl", "--globoff", "-so", "/dev/null", own.url)) as client:
        time.sleep(0.5)
        command = ["--pid", str(client.pid), *NFT_DOWNLOAD.options, "--duration", "5"]
        done = tool(*command)
        client.kill()
    assert done.stderr.count("THROTTLE NOT WORKING: packets pass, and none of them is limited") == 1
    assert "No packets in the counters of nftables" in done.stderr


@since("5.13")
def test_a_root_cgroup_and_a_rate_beyond_nftables_are_refused(own):
    """With what is the most that it can do."""
    done = tool("run", "-d", "20G", "--download-backend", "nftables", "--", "true")
    assert done.returncode == 125
    assert done.stderr == (
        "pybpfthrottle: error: nftables limits to 17.2 GB/s at most, not to 20.0 GB/s\n"
    )
    limits = {Direction.UPLOAD: RATE}
    order = Order(ThrottleSpec(Target(), limits), limits, [cgroup.root()])
    with Nft() as nft, pytest.raises(BackendError, match="cannot match the root cgroup"):
        Table("zzzzzz", nft).create(limits, order)
