"""Whatever fails while a limit ends, the rest of it is undone all the same."""

from __future__ import annotations

import os
import subprocess
import sys

import own_mounts
import pytest
from lab import ENVIRONMENT, attached
from since import since

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf import connections, keeping, programs
from pybpfthrottle.bpf import links
from pybpfthrottle.bpf.programs import open_by_id
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate

BOTH = dict.fromkeys(Direction, Rate.parse("1M"))


def descriptors() -> int:
    """How many are open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("method", [pytest.param("link", marks=since("5.7")), "legacy"])
def test_restoring_that_fails_leaves_nothing_attached(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The error is told once all is detached and closed."""

    def fail(*_: object) -> None:
        raise OSError("processes cannot be seen")

    before = descriptors()
    live = throttle.apply([scratch], BOTH)
    count = len(attached(scratch))
    live.switch(method)
    assert len(attached(scratch)) == count
    monkeypatch.setattr(connections, "restore", fail)
    with pytest.raises(OSError, match="cannot be seen"):
        live.remove()
    assert attached(scratch) == []
    assert descriptors() == before
    live.remove()


def test_one_detachment_that_fails_keeps_no_other(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are detached, and the error is told."""
    live = throttle.apply([scratch], BOTH)
    live.switch("legacy")
    detach, failed = links.detach, []

    def fail_once(*arguments: object) -> None:
        if not failed:
            failed.append(arguments)
            raise OSError(5, "Input/output error")
        detach(*arguments)

    monkeypatch.setattr(links, "detach", fail_once)
    with pytest.raises(OSError, match="Input/output"):
        live.remove()
    monkeypatch.undo()
    [program_id] = attached(scratch, programs.HOOKS)
    with open_by_id(program_id) as program:
        fd = scratch.open()
        detach(program.fd, fd, failed[0][2])
        os.close(fd)


def test_a_gate_that_is_not_served_is_closed_and_the_limit_holds(
    scratch: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused its map, and downloads are policed."""

    def fail(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    before = descriptors()
    monkeypatch.setattr(keeping, "Kept", fail)
    live = throttle.apply([scratch], BOTH)
    try:
        assert live.how()[Direction.DOWNLOAD]["shape"] != "gate"
        assert "Cannot allocate memory" in live.how()[Direction.DOWNLOAD]["shape_reason"]
    finally:
        live.remove()
    assert descriptors() == before


SCRIPT = """
import ctypes, os, sys
from pybpfthrottle import throttle
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux import cgroup
from pybpfthrottle.model import Direction, Rate

where = cgroup.mount().path
live = throttle.apply([Cgroup(sys.argv[1])], {Direction.UPLOAD: Rate.parse("1M")})
live.switch("legacy")
for path in [mount.path for mount in cgroup.mounts() if mount.type == "cgroup2"]:
    assert ctypes.CDLL(None).umount2(path.encode(), 2) == 0
try:
    live.remove()
except Exception as error:
    print(type(error).__name__)
"""


def test_an_unmounted_cgroup_file_system_leaves_nothing_attached(scratch: Cgroup) -> None:
    """In a mount namespace where cgroup2 goes away in between."""
    done = subprocess.run(
        [
            sys.executable,
            str(own_mounts.__file__),
            "--",
            sys.executable,
            "-c",
            SCRIPT,
            scratch.path,
        ],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    assert attached(scratch) == []
