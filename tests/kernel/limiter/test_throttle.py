"""Throttle: put in force, shared, changed, read and removed, on real cgroups."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from typing import Iterator

import pytest
from lab import attached
from since import since

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.bpf import links, programs
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.bpf.obj.asm import return_imm
from pybpfthrottle.errors import AttachError, CgroupError, ThrottleError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Counters, Direction, Rate, Traffic
from pybpfthrottle.settings import AttachPolicy

pytestmark = pytest.mark.timed

# A second's traffic may have one burst more, or less where a busy machine held the flood up.
ONE_BURST = 0.27

LOOPBACK = Traffic(loopback=True)

# Sends datagrams of 1,000 bytes to the loopback device as fast as it can.
FLOOD = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try:
        s.sendto(bytes(972), ("127.0.0.1", 9))
    except (ConnectionRefusedError, PermissionError):  # the latter before Linux 5.3
        pass
"""


@contextmanager
def flood(*cgroups: Cgroup) -> Iterator[None]:
    """A flood from each of the cgroups."""
    # A socket belongs to the cgroup that it is created in: each child moves before it begins.
    children = [
        subprocess.Popen([sys.executable, "-c", FLOOD], preexec_fn=lambda c=cgroup: c.move_in(0))
        for cgroup in cgroups
    ]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def passed(live: throttle.Throttle, seconds: float) -> float:
    """The rate that got through in so many seconds."""
    first, begin = live.counters()[Direction.UPLOAD], time.monotonic()
    time.sleep(seconds)
    last, end = live.counters()[Direction.UPLOAD], time.monotonic()
    return (last.bytes_passed - first.bytes_passed) / (end - begin)


def test_one_throttle_attaches_what_was_asked_for_and_takes_it_away(scratch: Cgroup) -> None:
    """A limit for a direction is one program at that hook, until it is removed."""
    with throttle.apply([scratch], {Direction.UPLOAD: Rate.parse("1M")}) as live:
        assert len(attached(scratch)) == 1
        assert live.counters() == {Direction.UPLOAD: Counters()}
    assert attached(scratch) == []
    assert live.chores() == []
    live.remove()


def test_a_limit_changes_while_it_is_in_force(scratch: Cgroup) -> None:
    """A new rate holds at once, up, down, and up from one that left a long debt."""
    with throttle.apply([scratch], {Direction.UPLOAD: Rate.parse("2K")}, traffic=LOOPBACK) as live:
        with flood(scratch):
            time.sleep(1)
            for text in ("4M", "1M"):
                rate = Rate.parse(text)
                live.set_limit(Direction.UPLOAD, rate)
                time.sleep(0.3)
                assert passed(live, 3) == pytest.approx(rate.bytes_per_s, rel=ONE_BURST)
            live.set_limit(Direction.UPLOAD, None)
            assert passed(live, 0.5) > Rate.parse("8M").bytes_per_s
            assert live.limits == {Direction.UPLOAD: None}


def test_several_cgroups_share_one_limit(scratch: Cgroup) -> None:
    """Two cgroups under one throttle get its rate together."""
    one, two = scratch.create_child("one"), scratch.create_child("two")
    rate = Rate.parse("2M")
    try:
        with throttle.apply([one, two], {Direction.UPLOAD: rate}, traffic=LOOPBACK) as live:
            with flood(one, two):
                time.sleep(1)
                assert passed(live, 3) == pytest.approx(rate.bytes_per_s, rel=ONE_BURST)
    finally:
        one.remove(patience_s=5)
        two.remove(patience_s=5)


def test_a_direction_without_a_limit_cannot_be_given_one_later(scratch: Cgroup) -> None:
    """Changing a direction that the throttle does not have is an error that says so."""
    with throttle.apply([scratch], {Direction.DOWNLOAD: Rate.parse("1M")}) as live:
        with pytest.raises(ThrottleError, match="upload"):
            live.set_limit(Direction.UPLOAD, Rate.parse("1M"))


def test_no_limit_at_all_is_refused(scratch: Cgroup) -> None:
    """A throttle needs a limit."""
    with pytest.raises(ThrottleError, match="no limit"):
        throttle.apply([scratch], {})


def test_an_unknown_backend_is_refused(scratch: Cgroup) -> None:
    """A backend that does not exist is named, with those that do."""
    with pytest.raises(ThrottleError, match=r"'tape'.*ebpf"):
        throttle.apply(
            [scratch],
            {Direction.UPLOAD: Rate.parse("1M")},
            backends={Direction.UPLOAD: "tape"},
        )


def test_a_removed_cgroup_is_refused_and_noticed(scratch: Cgroup) -> None:
    """A throttle tells when its cgroup is gone; a new one on it is refused."""
    with throttle.apply([scratch], {Direction.UPLOAD: Rate.parse("1M")}) as live:
        assert not live.vanished()
        scratch.remove()
        assert live.vanished()
        live.counters()
    with pytest.raises(CgroupError, match="No such file"):
        throttle.apply([scratch], {Direction.UPLOAD: Rate.parse("1M")})


def test_beside_an_exclusive_program_nothing_is_changed(scratch: Cgroup) -> None:
    """Where another tool's program allows none beside it, that is said, and it stays."""
    fd = scratch.open()
    other = programs.load(return_imm(1), type=ProgType.CGROUP_SKB, license="MIT", name="other")
    mine = links.attach_legacy(other, fd, AttachType.CGROUP_INET_EGRESS, AttachMode.SINGLE)
    try:
        both = {Direction.DOWNLOAD: Rate.parse("1M"), Direction.UPLOAD: Rate.parse("1M")}
        with pytest.raises(AttachError, match="another program"):
            throttle.apply([scratch], both)
        assert attached(scratch) == [other.info().id]
    finally:
        mine.detach()
        other.close()
        os.close(fd)


@since("5.7")
def test_another_program_beside_ours_is_left_alone(scratch: Cgroup) -> None:
    """A program that shares the hook is there before, beside and after a throttle."""
    fd = scratch.open()
    other = programs.load(return_imm(1), type=ProgType.CGROUP_SKB, license="MIT", name="other")
    mine = links.attach_legacy(other, fd, AttachType.CGROUP_INET_EGRESS)
    try:
        for method in ("link", "legacy"):
            options = Options(attach=dict.fromkeys(Direction, AttachPolicy(method)))
            limit = {Direction.UPLOAD: Rate.parse("1M")}
            with throttle.apply([scratch], limit, options=options) as live:
                assert len(attached(scratch)) == 2
                assert live.how()[Direction.UPLOAD]["attached_by"] == method
            assert attached(scratch) == [other.info().id]
    finally:
        mine.detach()
        other.close()
        os.close(fd)


@since("5.7")
def test_descriptors_are_all_closed(scratch: Cgroup) -> None:
    """Making and removing throttles leaves no descriptor open, by either method."""

    def once() -> int:
        for method in ("link", "legacy"):
            throttle.apply(
                [scratch],
                {Direction.UPLOAD: Rate.parse("1M"), Direction.DOWNLOAD: Rate.parse("1M")},
                options=Options(attach=dict.fromkeys(Direction, AttachPolicy(method))),
            ).remove()
        return len(os.listdir("/proc/self/fd"))

    assert once() == once()


def test_connections_from_before_are_limited_in_a_cgroup_that_is_limited_later(
    scratch: Cgroup,
) -> None:
    """A socket that was created in the cgroup is limited from the moment of the throttle on."""
    child = os.fork()
    if child == 0:
        try:
            scratch.move_in(0)
            own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            while True:
                with suppress(ConnectionRefusedError, PermissionError):
                    own.sendto(bytes(972), ("127.0.0.1", 9))
        finally:
            os._exit(1)
    try:
        time.sleep(0.3)
        rate = Rate.parse("1M")
        with throttle.apply([scratch], {Direction.UPLOAD: rate}, traffic=LOOPBACK) as live:
            time.sleep(0.5)
            assert passed(live, 1) == pytest.approx(rate.bytes_per_s, rel=ONE_BURST)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
