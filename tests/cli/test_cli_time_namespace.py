"""Instances in several time namespaces: their clocks differ, their throttles are known to all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pybpfthrottle.linux.cgroup import Cgroup

# Such a start of the tool, in any test, removes leftovers: these tests must be alone.
pytestmark = pytest.mark.alone

# Executes a command in a new time namespace (CLONE_NEWTIME is 0x80). unshare(1) takes whole seconds
# only; container runtimes give nanoseconds too.
INSIDE = """
import ctypes, os, sys
offset = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x80):
    sys.exit(os.strerror(ctypes.get_errno()))
with open("/proc/self/timens_offsets", "w") as file:
    for clock in ("monotonic", "boottime"):
        file.write(f"{clock} {offset // 10**9} {offset % 10**9}\\n")
pid = os.fork() if "fork" in sys.argv[2] else 0
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os.execvp(sys.argv[3], sys.argv[3:])
"""
AHEAD, BEHIND = 100_000_123_456_789, -7_500_000_000
LIMIT = ("--download-limit", "1M", "--upload-limit", "1M")
SEEN = """
import socket, sys
from pybpfthrottle import throttle
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate, Traffic
cgroup = Cgroup(sys.argv[1])
cgroup.move_in(0)
with throttle.apply([cgroup], {Direction.UPLOAD: Rate(1 << 20)}, traffic=Traffic(loopback=True)) as it:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(50):
        try:
            s.sendto(b"x" * 8192, ("127.0.0.1", 9))
        except OSError:
            pass
    print(it._parts[Direction.UPLOAD]._bucket.seen().owed_ns)
"""  # noqa: E501


def inside(offset_ns, how="exec"):
    """The prefix that puts a command into a time namespace whose clocks are ahead by so much."""
    return (sys.executable, "-c", INSIDE, str(offset_ns), how)


def start(tool, cgroup, **options):
    """The tool, limiting a cgroup by the legacy call, and its throttle's id."""
    process = tool.start(
        *("--cgroup", cgroup.path, "--bpf-attach-method", "legacy", "--json", *LIMIT),
        stdout=subprocess.PIPE,
        **options,
    )
    return process, json.loads(process.stdout.readline())["id"]


@pytest.mark.parametrize("offset_ns", [AHEAD, BEHIND])
@pytest.mark.parametrize("maker_is_inside", [True, False])
def test_a_limit_of_another_time_namespace_is_no_debris(
    tool, scratch, attached, offset_ns, maker_is_inside
):
    """Seen from the other side it is listed with its age, changed, and survives every start."""
    there, here = {"prefix": inside(offset_ns)}, {}
    maker, other = (there, here) if maker_is_inside else (here, there)
    cgroup = scratch.cgroup()
    process, throttle_id = start(tool, cgroup, **maker)
    programs = attached(cgroup)

    answer = json.loads(tool.run("list", "--json", **other).text)
    [found] = [one for one in answer["throttles"] if one["id"] == throttle_id]
    assert 0 <= found["since_s"] < 60
    assert json.loads(tool.run("cleanup", "--dry-run", "--json", **other).text)["programs"] == []
    assert json.loads(tool.run("cleanup", "--json", **other).text)["programs"] == []
    assert tool.run("run", "-q", *LIMIT, "--", "true", **other).status == 0
    assert attached(cgroup) == programs
    assert "already limited" in tool.run("--cgroup", cgroup.path, *LIMIT, **other).complaint
    assert "2.0 MB/s" in tool.run("set", throttle_id, "--upload-limit", "2M", **other).text
    assert "by link" in tool.run("switch", str(process.pid), "link", **other).text

    assert tool.run("remove", throttle_id, **other).status == 0
    assert tool.finish(process).status == 0
    assert attached(cgroup) == ()


@pytest.mark.parametrize("maker_is_inside", [True, False])
def test_a_cgroup_of_another_time_namespace_is_not_abandoned(tool, scratch, maker_is_inside):
    """Its name tells its owner by the same clock: nobody moves its processes back."""
    there, here = {"prefix": inside(AHEAD)}, {}
    maker, other = (there, here) if maker_is_inside else (here, there)
    target = scratch.process(scratch.cgroup())
    process = tool.start("--pid", str(target.pid), "--move-cgroup", "--json", *LIMIT, **maker)
    [moved] = json.loads(process.stdout.readline())["cgroups"]
    assert "pybpfthrottle-moved-" in moved
    assert json.loads(tool.run("cleanup", "--dry-run", "--json", **other).text)["cgroups"] == []
    tool.run("cleanup", **other)
    assert Cgroup(moved).pids() == [target.pid]
    process.terminate()
    assert tool.finish(process).status == 0


@pytest.mark.parametrize("offset_ns", [AHEAD, BEHIND])
def test_what_is_owed_is_measured_by_the_kernel_s_clock(tool, scratch, offset_ns):
    """Programs know the first time namespace's clock only."""
    cgroup = scratch.cgroup()
    owed = subprocess.run(
        [*inside(offset_ns, "fork"), sys.executable, "-c", SEEN, cgroup.path],
        env=tool.environment(),
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    ).stdout
    assert abs(int(owed)) < 2_000_000_000


@pytest.mark.parametrize("offset_ns", [AHEAD, BEHIND])
def test_who_has_unshared_and_not_forked_is_still_where_it_was(tool, offset_ns):
    """/proc/PID/timens_offsets tells of the children's namespace, not of the process's own."""
    script = (
        "import ctypes, time\n"
        "from pybpfthrottle.linux import clock, process\n"
        "before = process.Process(1).identity\n"
        "clock.offsets.cache_clear()\n"
        "assert ctypes.CDLL(None).unshare(0x80) == 0\n"
        "open('/proc/self/timens_offsets', 'w').write(f'boottime {OFFSET // 10**9} 0')\n"
        "assert process.same(process.Process(1).identity, before)\n"
        "print(clock.offsets().boottime_ns)\n"
    ).replace("OFFSET", str(offset_ns))
    told = subprocess.run(
        [sys.executable, "-c", script], env=tool.environment(), stdout=subprocess.PIPE, check=True
    ).stdout
    assert int(told) == 0
