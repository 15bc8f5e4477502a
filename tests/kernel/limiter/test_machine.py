"""The machine as the full screen sees it: limits that are made, changed and removed from there."""

from __future__ import annotations

import subprocess
import time
from typing import Iterator

import pytest
from lab import ENVIRONMENT, TOOL

from pybpfthrottle import registry, traffic
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.inforce import InForce, in_force
from pybpfthrottle.model import Direction, Rate, Target
from pybpfthrottle.plan import Wish
from pybpfthrottle.tui.machine import Machine

DOWN, UP = Direction.DOWNLOAD, Direction.UPLOAD
K, M = Rate(1 << 10), Rate(1 << 20)
PATIENCE_S = 60.0


@pytest.fixture
def target() -> Iterator[Target]:
    """A process."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield Target(pids=(process.pid,))
        process.kill()


@pytest.fixture
def machine() -> Iterator[Machine]:
    """The machine; it limits nothing afterwards."""
    made = Machine(Wish(), traffic.watch())
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def other(target: Target) -> Iterator[subprocess.Popen[bytes]]:
    """Another pybpfthrottle, which limits the process."""
    pid = str(target.pids[0])
    with subprocess.Popen([*TOOL, "--pid", pid, "-d", "1M", "-q"], env=ENVIRONMENT) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not throttles_of(target):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        yield process
        process.terminate()


def throttles_of(target: Target) -> list[InForce]:
    """What limits a process, whoever made it."""
    return [one for one in in_force(registry.records()) if one.record.spec.target == target]


def limits_of(target: Target) -> dict[Direction, object]:
    """All limits of a process."""
    return {
        direction: rate for one in throttles_of(target) for direction, rate in one.limits.items()
    }


def test_limits_end_with_it(machine: Machine, target: Target) -> None:
    """They are told as its own, are in each look, and gone after close."""
    assert machine.foresee(target, {DOWN: M})[0].startswith("By ebpf: ")
    assert throttles_of(target) == []
    machine.limit(target, {DOWN: M})
    (own,) = machine.own()
    assert f"process {target.pids[0]} (sleep)" in own
    look = machine.look()
    (throttle,) = look.interval.cover.of(target.pids[0], "")
    assert throttle.limits == {DOWN: M}
    assert look.forces[throttle.id][DOWN].reading.limit == M
    machine.close()
    assert throttles_of(target) == []


def test_a_change_adds_the_direction_that_is_missing(machine: Machine, target: Target) -> None:
    """By a throttle of its own; both are removed together."""
    machine.limit(target, {DOWN: M})
    machine.change(throttles_of(target), target, {DOWN: K, UP: M})
    assert limits_of(target) == {DOWN: K, UP: M}
    machine.change(throttles_of(target), target, {DOWN: None, UP: M})
    assert limits_of(target) == {DOWN: None, UP: M}
    machine.remove(throttles_of(target))
    assert throttles_of(target) == []
    assert machine.own() == []


def test_a_pause_is_ended_by_the_next_one(machine: Machine, target: Target) -> None:
    """Or by the dialog, which confirms what was there."""
    machine.limit(target, {DOWN: M})
    for _ in range(2):
        machine.pause(throttles_of(target))
        (throttle,) = throttles_of(target)
        assert (throttle.limits, throttle.paused) == ({DOWN: None}, {DOWN: M})
        machine.pause([throttle])
        assert limits_of(target) == {DOWN: M}
    machine.pause(throttles_of(target))
    machine.change(throttles_of(target), target, {DOWN: M})
    (throttle,) = throttles_of(target)
    assert (throttle.limits, throttle.paused) == ({DOWN: M}, {})


def test_limits_of_others_are_changed_and_removed(
    machine: Machine, target: Target, other: subprocess.Popen[bytes]
) -> None:
    """A second limit is refused; the other process ends once its limit is removed."""
    with pytest.raises(ProcessError, match="already limited"):
        machine.foresee(target, {UP: M})
    with pytest.raises(ProcessError, match="already limited"):
        machine.limit(target, {UP: M})
    machine.change(throttles_of(target), target, {DOWN: K})
    assert limits_of(target) == {DOWN: K}
    look = machine.look()
    (throttle,) = look.interval.cover.of(target.pids[0], "")
    assert throttle.record.owner.pid == other.pid
    machine.remove([throttle])
    assert other.wait(PATIENCE_S) == 0
    assert machine.own() == []


def test_a_limit_whose_process_has_ended_is_no_more(machine: Machine) -> None:
    """And that is told once."""
    with subprocess.Popen(["sleep", "300"]) as process:
        target = Target(pids=(process.pid,))
        machine.limit(target, {DOWN: M})
        machine.look()
        process.kill()
    deadline = time.monotonic() + PATIENCE_S
    while not (notes := machine.look().notes):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ["no limited process is left" in note for note in notes] == [True]
    assert machine.own() == []
    assert throttles_of(target) == []
    assert machine.look().notes == []
