"""Locks on directories, also of a process that has ended before its child."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pybpfthrottle.linux import locks


def test_a_lock_that_outlives_its_holder_is_waited_for(tmp_path: Path) -> None:
    """A child of it has the descriptor still, and clears up."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        locks.lock(str(tmp_path))
        if os.fork() == 0:
            os.write(writing, b"x")
            time.sleep(0.4)
        os._exit(0)
    os.waitpid(holder, 0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    with pytest.raises(BlockingIOError):
        locks.lock(str(tmp_path))
    locks.settle(str(tmp_path))
    os.close(locks.lock(str(tmp_path)))


def test_a_lock_whose_holder_lives_is_not_waited_for(tmp_path: Path) -> None:
    """That is what a lock is for."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        locks.lock(str(tmp_path))
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    begin = time.monotonic()
    locks.settle(str(tmp_path))
    assert time.monotonic() - begin < 0.5
    assert locks.holders(str(tmp_path))[locks.key(str(tmp_path))] == holder
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
