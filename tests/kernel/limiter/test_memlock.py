"""Locked memory, which kernels before 5.11 charge maps and programs to."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import Callable

import pytest
from lab import ENVIRONMENT, TOOL
from locked_memory import PROBE, without_sys_resource
from since import until

RUN = [*TOOL, "run", "-q", "--download-limit", "1M", "--", "sh", "-c", "ulimit -l"]
KIB = 64


def limited(kib: int) -> Callable[[], None]:
    """For a child: so much locked memory, and nothing that could be used to get more."""

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (kib * 1024, kib * 1024))

    return prepare


@pytest.fixture
def charged() -> None:
    """Only for kernels that charge what BPF needs to RLIMIT_MEMLOCK."""
    until("5.11", "BPF maps are charged to RLIMIT_MEMLOCK")
    probe = without_sys_resource(sys.executable, "-c", PROBE)
    assert subprocess.run(probe, env=ENVIRONMENT, stderr=subprocess.DEVNULL).returncode


def test_the_limit_is_raised_for_as_long_as_it_takes() -> None:
    """With 64 KiB a limit is put in force; the command sees the 64 KiB, not what it took."""
    done = subprocess.run(
        RUN, env=ENVIRONMENT, preexec_fn=limited(KIB), stdout=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(KIB))


def test_too_little_is_named(charged: None) -> None:
    """Without the right to raise it, the error names locked memory, its size and the remedy."""
    done = subprocess.run(
        without_sys_resource(*RUN[:4], "--download-backend", "ebpf", *RUN[4:]),
        env=ENVIRONMENT,
        preexec_fn=limited(4),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 125
    assert "limit on locked memory (4 KiB) is used up" in done.stderr
    assert "ulimit -l unlimited" in done.stderr
    assert len(done.stderr.splitlines()) == 1
