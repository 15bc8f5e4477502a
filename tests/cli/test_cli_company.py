"""Two instances on one cgroup, and a change of the way that a limit is attached."""

from __future__ import annotations

import json
import signal
from subprocess import PIPE

import pytest

LIMIT = ["--upload-limit", "1M"]


@pytest.fixture
def limiting(tool, scratch, limits_on, eventually):
    """Start the tool on a cgroup and wait until it is in force."""

    def start(cgroup, *options):
        before = limits_on(cgroup)
        process = tool.start("--cgroup", cgroup.path, *LIMIT, *options)
        eventually(lambda: limits_on(cgroup) - before)
        return process

    return start


def test_a_second_instance_is_refused_and_names_the_first(tool, scratch, limiting, attached):
    """Two limits on one cgroup would charge each packet twice: the second says who was first."""
    cgroup = scratch.cgroup()
    first = limiting(cgroup)
    result = tool.run("--cgroup", cgroup.path, *LIMIT)
    assert result.status == 1
    assert f"by process {first.pid}" in result.complaint
    assert "--stack" in result.complaint
    assert len(attached(cgroup)) == 1
    first.terminate()
    assert tool.finish(first).status == 0


@pytest.mark.parametrize("above", [True, False])
def test_a_limit_above_or_below_is_refused_too(tool, scratch, limiting, above):
    """Packets pass both cgroups, and would be charged to both limits."""
    outer = scratch.cgroup()
    inner = scratch.cgroup(parent=outer)
    taken, wanted = (outer, inner) if above else (inner, outer)
    first = limiting(taken)
    result = tool.run("--cgroup", wanted.path, *LIMIT)
    assert result.status == 1
    assert f"{taken.path} is already limited by process {first.pid}" in result.complaint
    first.terminate()
    assert tool.finish(first).status == 0


def test_with_stack_both_limits_are_in_force(tool, scratch, limiting, attached):
    """Who says --stack gets a second limit on the same cgroup."""
    cgroup = scratch.cgroup()
    first = limiting(cgroup)
    second = limiting(cgroup, "--stack")
    assert len(attached(cgroup)) == 2
    for process in (second, first):
        process.terminate()
        assert tool.finish(process).status == 0


def test_the_cgroup_of_a_run_is_taken(tool, attached):
    """The cgroup that run has made is limited already."""
    process = tool.start("run", *LIMIT, "--", "sh", "-c", "echo ready; exec sleep 30")
    assert process.stdout.readline() == b"ready\n"
    result = tool.run("--cgroup", tool.cgroup_of(process).path, *LIMIT)
    assert f"by process {process.pid}" in result.complaint
    process.send_signal(signal.SIGTERM)
    assert tool.finish(process).status == 128 + signal.SIGTERM


@pytest.mark.parametrize("method", ["link", "legacy"])
def test_a_running_limit_is_switched(tool, scratch, limiting, attached, eventually, method):
    """The other way to attach holds from then on, and it is never without a limit."""
    cgroup = scratch.cgroup()
    other = {"link": "legacy", "legacy": "link"}[method]
    process = limiting(cgroup, "--bpf-attach-method", method)
    assert attached_by(tool, cgroup) == method
    for wanted in (other, other, method):
        assert tool.run("switch", str(process.pid), wanted).status == 0
        eventually(lambda: attached_by(tool, cgroup) == wanted)  # noqa: B023 - called at once
        assert len(attached(cgroup)) == 1
    process.terminate()
    assert tool.finish(process).status == 0
    assert attached(cgroup) == ()


def attached_by(tool, cgroup):
    """How each hook's one program is attached; None while one is attached twice, or otherwise."""
    found = json.loads(tool.run("cgroup", "show", "--json", cgroup.path).text)
    hooks = {program["attach_type"] for program in found}
    ways = {"link" if program["links"] else "legacy" for program in found}
    return ways.pop() if len(ways) == 1 and len(found) == len(hooks) else None


def test_a_command_goes_on_limited_while_it_is_switched(tool, attached, eventually):
    """Run switches as well, and the signal does not reach the command."""
    process = tool.start(
        "run", *LIMIT, "--", "sh", "-c", "echo ready; read line; exit 6", stdin=PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    cgroup = tool.cgroup_of(process)
    assert tool.run("switch", str(process.pid), "legacy").status == 0
    eventually(lambda: attached_by(tool, cgroup) == "legacy")
    assert tool.finish(process, input=b"\n").status == 6


def test_another_program_is_not_sent_the_signal(tool, scratch):
    """A process that is no pybpfthrottle is refused; it would end by the signal."""
    child = scratch.process(scratch.cgroup(), "sleep", "60")
    result = tool.run("switch", str(child.pid), "legacy")
    assert result.status == 1
    assert "is not a pybpfthrottle" in result.complaint
    assert child.poll() is None


def test_a_switch_that_does_not_happen_is_an_error(tool, scratch, limiting):
    """Who is stopped does not switch; the command says so, and does not claim success."""
    first = limiting(scratch.cgroup())
    first.send_signal(signal.SIGSTOP)
    try:
        result = tool.run("switch", str(first.pid), "legacy")
    finally:
        first.send_signal(signal.SIGCONT)
    assert result.status == 1
    assert "did not switch" in result.complaint
    first.terminate()
    assert tool.finish(first).status == 0
