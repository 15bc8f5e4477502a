"""After a crash: what links leave (nothing), what the legacy call leaves, and who removes it."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import Iterator

import pytest
from lab import ENVIRONMENT, TOOL, attached
from since import since

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import leftovers
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.bpf import links, maps, programs
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.asm import return_imm
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.settings import AttachPolicy

# Each start of the tool, in any test, removes leftovers: these tests must be alone.
pytestmark = pytest.mark.alone

LEGACY = Options(attach=dict.fromkeys(Direction, AttachPolicy("legacy")))

HOLDER = """
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print("ready", flush=True)
time.sleep(60)
"""


@contextmanager
def running(cgroup: Cgroup, method: str) -> Iterator[subprocess.Popen[bytes]]:
    """The tool, limiting both directions of a cgroup."""
    command = [*TOOL, "--cgroup", cgroup.path, "--upload-limit", "1M", "--download-limit", "1M"]
    with subprocess.Popen(
        [*command, "--bpf-attach-method", method], stdout=subprocess.DEVNULL, env=ENVIRONMENT
    ) as process:
        try:
            deadline = time.monotonic() + 30
            while len(attached(cgroup)) < 2:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def crash(cgroup: Cgroup, method: str) -> None:
    """Start the tool, and kill it in the middle."""
    with running(cgroup, method) as process:
        process.send_signal(signal.SIGKILL)


def cleanup(*options: str) -> dict:
    """What pybpfthrottle cleanup tells."""
    done = subprocess.run(
        [*TOOL, "cleanup", "--json", *options],
        stdout=subprocess.PIPE,
        check=True,
        env=ENVIRONMENT,
    )
    return json.loads(done.stdout)


@since("5.7")
def test_links_leave_nothing(scratch: Cgroup) -> None:
    """After kill -9 of a tool that attached by link nothing is attached."""
    crash(scratch, "link")
    deadline = time.monotonic() + 5
    while attached(scratch) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert attached(scratch) == []


def test_cleanup_removes_what_the_legacy_call_has_left(scratch: Cgroup) -> None:
    """--dry-run names it, cleanup takes it away, and then there is nothing more."""
    crash(scratch, "legacy")
    left = attached(scratch, HOOKS)
    assert len(left) >= 2
    named = cleanup("--dry-run")
    assert {program["id"] for program in named["programs"]} == set(left)
    assert {program["cgroup"] for program in named["programs"]} == {scratch.path}
    assert attached(scratch, HOOKS) == left
    assert {program["id"] for program in cleanup()["programs"]} == set(left)
    assert attached(scratch, HOOKS) == []
    assert cleanup() == {"dry_run": False, "programs": [], "cgroups": []}


def test_the_next_start_removes_it_as_well(scratch: Cgroup) -> None:
    """A run of anything tidies up after an earlier crash."""
    crash(scratch, "legacy")
    command = [*TOOL, "run", "-q", "--download-limit", "1M", "--", "true"]
    subprocess.run(command, check=True, env=ENVIRONMENT)
    assert attached(scratch) == []


def test_who_lives_and_who_is_not_ours_is_left_alone(scratch: Cgroup) -> None:
    """A throttle that is in force stays, and so does a program of ours in name alone."""
    fd = scratch.open()
    theirs = programs.load(
        return_imm(1), type=ProgType.CGROUP_SKB, license="MIT", name="pybpft_ingress"
    )
    attachment = links.attach_legacy(theirs, fd, AttachType.CGROUP_INET_INGRESS)
    try:
        with throttle.apply([scratch], {Direction.UPLOAD: Rate.parse("1M")}, options=LEGACY):
            before = attached(scratch)
            assert cleanup()["programs"] == []
            assert attached(scratch) == before
            assert len(before) == 2
    finally:
        attachment.detach()
        theirs.close()
        os.close(fd)


def test_an_orphan_on_a_removed_cgroup_is_disarmed(scratch: Cgroup) -> None:
    """A socket keeps the program of its removed cgroup running: it is made to pass everything."""
    below = scratch.create_child("below")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdout=subprocess.PIPE,
        preexec_fn=lambda: below.move_in(0),
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        crash(below, "legacy")
        left = set(attached(below))
        scratch.move_in(holder.pid)
        below.remove(patience_s=5)
        orphans = [found for found in leftovers.find() if found.program_id in left]
        assert {found.cgroup for found in orphans} <= {None}
        cleanup()
        assert not [found for found in leftovers.find() if found.program_id in left]
    finally:
        holder.kill()
        holder.communicate()


@since("5.7")
def test_a_forked_child_that_keeps_the_link_is_disarmed(scratch: Cgroup) -> None:
    """Where the owner is gone and a child has inherited its link, the limit is lifted."""
    owner = os.fork()
    if owner == 0:
        try:
            live = throttle.apply([scratch], {Direction.UPLOAD: Rate.parse("1M")})
            if os.fork() == 0:
                time.sleep(3)
            del live
        finally:  # whatever happens: this is a copy of the process that runs the tests
            os._exit(0)
    os.waitpid(owner, 0)
    assert len(attached(scratch)) == 1
    found = [found for found in leftovers.find() if found.owner_pid == owner]
    assert {one.cgroup for one in found} == {scratch}
    cleanup()
    assert not [one for one in leftovers.find() if one.owner_pid == owner]
    deadline = time.monotonic() + 10
    while attached(scratch) and time.monotonic() < deadline:
        time.sleep(0.1)


OWNER = """
import os, sys, time
from pybpfthrottle.backends.ebpf.bucket import config_for
from pybpfthrottle.bpf import links, maps, programs
from pybpfthrottle.bpf.abi import AttachType, MapType, ProgType
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.bpf.obj.specs import MapSpec
from pybpfthrottle.model import MIN_RATE

path, mode, size = sys.argv[1], AttachMode[sys.argv[2]], int(sys.argv[3])
configs = maps.create(MapSpec("CGROUP_CONFIGS", MapType.ARRAY, 4, size, 2)).typed(U32, RAW)
for direction in (0, 1):
    configs[direction] = bytes(config_for(MIN_RATE, loopback=True)).ljust(size, b"T")[:size]
program = programs.load(
    asm.load_map(1, configs.fd) + asm.return_imm(1),
    type=ProgType.CGROUP_SKB, license="MIT", name="pybpft_egress",
)
fd = os.open(path, os.O_RDONLY)
links.attach_legacy(program, fd, AttachType.CGROUP_INET_EGRESS, mode)
info = program.info()
print(info.id, info.map_ids[0], flush=True)
time.sleep(60)
"""


@contextmanager
def crashed_owner(
    cgroup: Cgroup, *, mode: str = "ALLOW_MULTIPLE", record_bytes: int = 80
) -> Iterator[tuple[int, Map[int, bytes]]]:
    """Another version's program, left attached by a process that was killed.

    Its id, and the map of its records.
    """
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, cgroup.path, mode, str(record_bytes)],
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as owner:
        assert owner.stdout
        program_id, map_id = map(int, owner.stdout.readline().split())
        with maps.open_by_id(map_id) as found:
            owner.kill()
            owner.wait()
            yield program_id, found.typed(U32, RAW)


@pytest.mark.parametrize("mode", ["ALLOW_OVERRIDE", "SINGLE", "ALLOW_MULTIPLE"])
def test_each_mode_of_the_legacy_call_is_cleaned_up(scratch: Cgroup, mode: str) -> None:
    """Also what was attached in the modes that kernels before 4.15 alone have."""
    with crashed_owner(scratch, mode=mode) as (program_id, _):
        assert [one["id"] for one in cleanup()["programs"]] == [program_id]
        assert attached(scratch) == []


# Version 1 has 72 bytes.
@pytest.mark.parametrize("record_bytes", [32, 64, 72, 200])
def test_a_record_of_another_version_is_known(scratch: Cgroup, record_bytes: int) -> None:
    """Shorter or longer, it tells its owner; disarming it leaves what is behind that alone."""
    below = scratch.create_child("below")
    try:
        with crashed_owner(below, record_bytes=record_bytes) as (program_id, configs):
            before = configs[Direction.UPLOAD]
            [found] = [one for one in leftovers.find() if one.program_id == program_id]
            leftovers.remove(found._replace(cgroup=None))
            after = configs[Direction.UPLOAD]
            assert struct.unpack_from("=Q", before, 24)[0] > 0
            assert after == before[:24] + bytes(8) + before[32:]
            assert [one for one in leftovers.find() if one.program_id == program_id] == []
    finally:
        below.remove(patience_s=5)


KILLED = """
import os, signal, sys
from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import connections
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.settings import AttachPolicy

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

legacy = Options(attach=dict.fromkeys(Direction, AttachPolicy("legacy")))
limits = dict.fromkeys(Direction, Rate.parse("1M"))
live = throttle.apply([Cgroup(sys.argv[1])], limits, options=legacy)
connections.restore = die
if sys.argv[2] == "pause":
    live.pause()
    die()
live.remove()
"""


@pytest.mark.parametrize("how", ["pause", "remove"])
def test_what_had_no_rate_when_it_was_killed_is_removed(scratch: Cgroup, how: str) -> None:
    """It was paused, or had lifted its limits to detach its programs next."""
    done = subprocess.run([sys.executable, "-c", KILLED, scratch.path, how], env=ENVIRONMENT)
    assert done.returncode == -signal.SIGKILL
    left = attached(scratch, HOOKS)
    assert left
    assert {one["id"] for one in cleanup()["programs"]} == set(left)
    assert attached(scratch, HOOKS) == []


def test_what_another_start_has_removed_meanwhile_is_no_error() -> None:
    """Two that start at once find the same leftovers, and one of them comes second."""
    gone = leftovers.Leftover(0x7FFFFFFF, "pybpft_ingress", AttachType.CGROUP_INET_INGRESS, 1, None)
    leftovers.remove(gone)
