"""Processes that outlive the command of ``run``, and --wait."""

from __future__ import annotations

import os
import signal

import pytest

LIMIT = ("run", "-q", "--download-limit", "1M")
SURVIVOR = "setsid sleep 60 </dev/null >/dev/null 2>&1 & echo $!; exit 5"


@pytest.fixture
def survivors(tool):
    """Pids to be ended after the test."""
    tool.cgroups_may_stay = True
    pids = []
    yield pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def start_waiting(tool, survivors, eventually):
    """A tool with --wait whose command has ended, and one process of it has not."""
    process = tool.start(*LIMIT, "--wait", "--", "sh", "-c", "echo $$;" + SURVIVOR)
    command, survivor = int(process.stdout.readline()), int(process.stdout.readline())
    survivors.append(survivor)
    cgroup = tool.cgroup_of(process)
    eventually(lambda: not alive(command))
    return process, cgroup, survivor


def test_survivors_go_on_without_a_limit_and_are_named(
    tool, survivors, attached, cgroups_of, eventually
):
    """They are named in one line, live on unlimited; the next start after them tidies up."""
    result = tool.run(*LIMIT, "--", "sh", "-c", SURVIVOR)
    survivors.append(int(result.out))
    (cgroup,) = cgroups_of(result.pid)
    assert result.status == 5
    assert f"{survivors[0]} (" in result.complaint
    assert "without a limit" in result.complaint
    assert "--wait" in result.complaint
    assert cgroup.path in result.complaint
    assert cgroup.pids() == survivors
    assert attached(cgroup) == ()
    assert tool.run(*LIMIT, "--", "true").status == 0
    assert cgroup.pids() == survivors
    os.kill(survivors[0], signal.SIGKILL)
    eventually(lambda: not cgroup.exists() or not cgroup.populated())
    assert tool.run(*LIMIT, "--", "true").status == 0
    assert not cgroup.exists()


def test_the_bare_command_tidies_up_too(tool, survivors, cgroups_of, running, eventually):
    """A cgroup that was left is removed at the next start of the bare command as well."""
    result = tool.run(*LIMIT, "--", "sh", "-c", SURVIVOR)
    survivors.append(int(result.out))
    (cgroup,) = cgroups_of(result.pid)
    os.kill(survivors[0], signal.SIGKILL)
    eventually(lambda: not cgroup.exists() or not cgroup.populated())
    process, _ = running("-q")
    eventually(lambda: not cgroup.exists())
    process.terminate()
    assert tool.finish(process).status == 0


def test_wait_keeps_the_limit_until_they_end(tool, survivors, attached, eventually):
    """With --wait the limit stays, and the command's status comes when the last one ends."""
    process, cgroup, survivor = start_waiting(tool, survivors, eventually)
    assert process.poll() is None
    assert attached(cgroup)
    os.kill(survivor, signal.SIGKILL)
    result = tool.finish(process)
    assert (result.status, result.err) == (5, "")
    assert not cgroup.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_waiting(tool, survivors, attached, eventually, number):
    """A signal ends the waiting: the limit is lifted, the survivor lives and is named."""
    process, cgroup, survivor = start_waiting(tool, survivors, eventually)
    with pytest.raises(AssertionError, match="not within"):
        eventually(lambda: process.poll() is not None, within_s=0.3)
    process.send_signal(number)
    result = tool.finish(process)
    assert result.status == 5
    assert f"{survivor} (" in result.complaint
    assert attached(cgroup) == ()
    assert alive(survivor)


def test_wait_without_survivors_ends_at_once(tool):
    """With --wait a command that leaves nothing behind is not waited for."""
    assert tool.run(*LIMIT, "--wait", "--", "sh", "-c", "exit 5").status == 5


def test_wait_ends_with_the_duration(tool, survivors, attached, cgroups_of):
    """There is nothing to wait for when the limit has been lifted by --duration."""
    process = tool.start(*LIMIT, "--wait", "--duration", "1", "--", "sh", "-c", SURVIVOR)
    survivors.append(int(process.stdout.readline()))
    assert tool.finish(process).status == 5
    (cgroup,) = cgroups_of(process.pid)
    assert attached(cgroup) == ()
    assert alive(survivors[0])


def test_a_child_that_ends_a_moment_later_is_no_survivor(tool, cgroups_of):
    """A child that ends right after its parent does not leave the cgroup behind."""
    result = tool.run(*LIMIT, "--", "sh", "-c", "sleep 0.1 & exit 0")
    assert (result.status, result.err) == (0, "")
    assert cgroups_of(result.pid) == []
