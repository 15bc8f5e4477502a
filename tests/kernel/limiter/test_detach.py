"""Limits that stay after the command that made them has ended, and what keeps them meanwhile."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import Any, Iterator

import pytest
from by_backend import tool
from lab import ENVIRONMENT, TOOL, Lab
from refusing import __file__ as refusing
from shells import RATE, Shell
from since import since
from targets import eventually

from pybpfthrottle.bpf.abi import Cmd
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup

LIMIT = ("--download-limit", str(RATE.bytes_per_s))
# Any command that limits has another process keep what is kept by the kernel alone.
kills = pytest.mark.alone
PINNED = "/sys/fs/bpf/pybpfthrottle"


def listed(throttle_id: str) -> dict[str, Any]:
    """What the list says of a throttle; nothing if it is not in force."""
    found = json.loads(tool("list", "--json").stdout)["throttles"]
    return next((one for one in found if one["id"] == throttle_id), {})


def detach(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """What the command says, and how it ends."""
    command = [*prefix, *TOOL, *arguments, "--detach"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


@contextmanager
def detached(*arguments: str, prefix: tuple[str, ...] = ()) -> Iterator[str]:
    """A throttle that stays; removed at the end, with whoever keeps it by then."""
    made = detach(*arguments, "--json", prefix=prefix)
    assert made.returncode == 0, made.stderr
    throttle_id = json.loads(made.stdout.splitlines()[0])["id"]
    try:
        yield throttle_id
    finally:
        owner = listed(throttle_id).get("owner_pid", 0)
        removed = tool("remove", throttle_id).returncode == 0
        # Of one that is over, its process removes the pins a moment after the list has it no more.
        assert not removed or not has_pins(throttle_id)
        eventually(lambda: not has_pins(throttle_id))
        eventually(lambda: not owner or process.has_ended(owner))
        assert not listed(throttle_id)


def pinned() -> list[str]:
    """The directories of pins."""
    return os.listdir(PINNED) if os.path.isdir(PINNED) else []


def has_pins(throttle_id: str) -> bool:
    """Whether anything is pinned for a throttle."""
    return any(name.startswith(throttle_id) for name in pinned())


def killed(throttle_id: str) -> int:
    """Kill the process that keeps a throttle; return which it was."""
    owner: int = listed(throttle_id)["owner_pid"]
    os.kill(owner, signal.SIGKILL)
    eventually(lambda: process.has_ended(owner))
    return owner


def test_the_command_ends_and_the_limit_stays(shell: Shell) -> None:
    """Until it is removed, with its pins and the process that keeps it."""
    assert not shell.is_limited()
    with detached("--pid", str(shell.pid), *LIMIT) as throttle_id:
        one = listed(throttle_id)
        assert one["kept"]
        assert one["supervised"]
        assert one["owner_pid"] != os.getpid()
        assert has_pins(throttle_id)
        assert shell.is_limited()
    assert not shell.is_limited()


@kills
@pytest.mark.parametrize("how", ["--pid", "--cgroup", "--bpf-attach-method"])
def test_the_kernel_goes_on_if_its_process_is_killed(how: str, shell: Shell, scratch: Cgroup):
    """For children too that begin later. The next start has another process keep it."""
    where = ("--cgroup", scratch.path) if how == "--cgroup" else ("--pid", str(shell.pid))
    legacy = (how, "legacy") if how == "--bpf-attach-method" else ()
    with detached(*where, *LIMIT, *legacy) as throttle_id:
        tool("set", throttle_id, *LIMIT)
        killed(throttle_id)
        assert not listed(throttle_id)["supervised"]
        assert throttle_id in tool("list").stdout
        assert "the kernel alone" in tool("list").stdout
        assert shell.is_limited()
        said = tool("run", *LIMIT, "--", "true").stderr
        assert f"the process that kept {throttle_id} has ended; another one goes on" in said
        eventually(lambda: listed(throttle_id).get("supervised"))
        assert shell.is_limited()
        assert listed(throttle_id)["limits"]["download"] == RATE.bytes_per_s


@kills
def test_the_kernel_ends_it_in_time(shell: Shell) -> None:
    """Although nobody is left to do so; the next start removes what is left of it."""
    with detached("--pid", str(shell.pid), *LIMIT, "--expires", "10s") as throttle_id:
        one = listed(throttle_id)
        assert 0 < one["expires_in_s"] <= 10
        os.kill(one["owner_pid"], signal.SIGKILL)
        assert shell.is_limited()
        eventually(lambda: not listed(throttle_id))
        assert not shell.is_limited()
        assert pinned()
        tool("run", *LIMIT, "--", "true")
        assert not pinned()


def test_its_process_ends_it_in_time(shell: Shell) -> None:
    """And takes everything away."""
    with detached("--pid", str(shell.pid), *LIMIT, "--expires", "1s") as throttle_id:
        owner = listed(throttle_id).get("owner_pid")  # it may be over already
        eventually(lambda: owner is None or process.has_ended(owner))


@kills
def test_it_ends_with_what_it_limits(scratch: Cgroup) -> None:
    """Even if nobody sees that: the next start does."""
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        try:
            with detached("--pid", str(sleeping.pid), *LIMIT) as throttle_id:
                killed(throttle_id)
                sleeping.kill()
                sleeping.wait()
                tool("run", *LIMIT, "--", "true")
                eventually(lambda: not listed(throttle_id))
        finally:
            sleeping.kill()


@kills
def test_a_pause_lifts_it_for_now(shell: Shell) -> None:
    """The list tells to what it will be put back."""
    with detached("--pid", str(shell.pid), *LIMIT, "--label", "mine") as throttle_id:
        said = tool("pause", "mine").stdout
        assert said == (
            f"Paused {throttle_id}; pybpfthrottle resume {throttle_id} puts its limits back.\n"
        )
        assert listed(throttle_id)["paused"] == {"download": RATE.bytes_per_s}
        assert "300.0 KB/s (paused)" in tool("list").stdout
        assert not shell.is_limited()
        assert "is paused already" in tool("pause", "mine").stderr
        killed(throttle_id)
        assert tool("resume", "mine").stdout == f"Resumed {throttle_id}: download 300.0 KB/s.\n"
        assert "is not paused" in tool("resume", "mine").stderr
        assert shell.is_limited()


@kills
@since("5.13")
def test_rules_of_nftables_stay_too(shells_lab: Lab, shell: Shell, scratch: Cgroup) -> None:
    """Their process is replaced like any other."""
    backend = ("--download-backend", "nftables")
    prefix = tuple(shells_lab.inside())
    with detached("--cgroup", scratch.path, *LIMIT, *backend, prefix=prefix) as throttle_id:
        killed(throttle_id)
        tool("cleanup")
        assert shell.is_limited()
        supervise = [*TOOL, "supervise", throttle_id]
        with subprocess.Popen(supervise, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as one:
            assert one.stdout
            assert one.stdout.readline() == f"Keeping {throttle_id}: {scratch.path}.\n"
            assert listed(throttle_id)["owner_pid"] == one.pid
            assert shell.is_limited()
            tool("remove", throttle_id)
        assert one.returncode == 0


def test_what_cannot_be_pinned_ends_with_its_process() -> None:
    """That is said, with the reason."""
    refused = (sys.executable, refusing, f"{int(Cmd.OBJ_PIN)}={errno.EPERM}", "--")
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        try:
            made = detach("--pid", str(sleeping.pid), *LIMIT, prefix=refused)
            assert made.returncode == 0
            [owner] = re.findall(
                r"the limit ends with process (\d+), which keeps it, since the kernel refused to"
                r" pin it: .*Operation not permitted",
                made.stderr,
            )
            os.kill(int(owner), signal.SIGTERM)
            eventually(lambda: process.has_ended(int(owner)))
        finally:
            sleeping.kill()


def test_mistakes_are_told_by_the_command() -> None:
    """And nothing goes on."""
    nobody = detach("--pid", "4000000", *LIMIT)
    assert nobody.returncode == 1
    assert nobody.stderr == "pybpfthrottle: error: there is no process 4000000\n"
    for option in ("--each", "--move-cgroup"):
        refused = detach("--pid", str(os.getpid()), *LIMIT, option)
        assert refused.returncode == 2
        assert f"{option} cannot be combined with --detach" in refused.stderr
    assert tool("supervise", "nobody").returncode == 1


@kills
def test_pins_that_nobody_knows_of_are_removed(scratch: Cgroup) -> None:
    """As of an instance that was killed while it removed its limit."""
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        try:
            with detached("--pid", str(sleeping.pid), *LIMIT) as throttle_id:
                [name] = [name for name in pinned() if name.startswith(throttle_id)]
                os.mkdir(f"{PINNED}/zzzzzz-1")
                os.rename(f"{PINNED}/{name}/0", f"{PINNED}/zzzzzz-1/0")
                tool("run", *LIMIT, "--", "true")
                assert pinned() == [name]
        finally:
            sleeping.kill()
    assert not os.path.ismount("/sys/fs/bpf")
