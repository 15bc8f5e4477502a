"""The bucket under attack from two CPUs, and what others notice of a limit."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import pytest
from lab import ENVIRONMENT, TOOL, Lab, lab

from pybpfthrottle import throttle
from pybpfthrottle.backends.ebpf.bucket import POLICE, SMALL_NS
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate, Traffic

FLOOD = """
import os, socket, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    try:
        s.sendto(bytes(1000), ("127.0.0.1", 9))
    except (ConnectionRefusedError, PermissionError):  # the latter before Linux 5.3
        pass
"""


@pytest.mark.alone
@pytest.mark.parametrize("limit", ["10M", "100M"])
def test_two_racing_cpus_lose_and_win_nothing(scratch: Cgroup, limit: str) -> None:
    """Floods from two CPUs get rate * t, and at most the burst and the small allowance more."""
    rate = Rate.parse(limit)
    with throttle.apply(
        [scratch], {Direction.UPLOAD: rate}, traffic=Traffic(loopback=True)
    ) as live:
        floods = [
            subprocess.Popen(
                [sys.executable, "-c", FLOOD, str(cpu)], preexec_fn=lambda: scratch.move_in(0)
            )
            for cpu in sorted(os.sched_getaffinity(0))[:2]
        ]
        try:
            time.sleep(1)
            first, begin = live.counters()[Direction.UPLOAD], time.monotonic()
            time.sleep(4)
            last, end = live.counters()[Direction.UPLOAD], time.monotonic()
        finally:
            for flood in floods:
                flood.kill()
                flood.wait()
    allowed = rate.bytes_per_s * (end - begin)
    accepted = last.bytes_passed - first.bytes_passed
    assert last.packets_dropped > first.packets_dropped, "the floods did not reach the limit"
    # Less may be owed at the end than at the beginning.
    assert 0.99 * allowed - rate.bytes_per_s * POLICE.debt_ns / 1e9 <= accepted
    assert accepted <= allowed + rate.bytes_per_s * (POLICE.burst_ns + SMALL_NS) / 1e9


@pytest.mark.alone
def test_a_neighbour_keeps_its_speed() -> None:
    """A program outside of the cgroup is as fast beside a limited one as before and after.

    As fast as the CPUs allow: it keeps two of them busy, and has to share them with the limited
    transfer and with what limits it. That is some 3 % of one CPU.
    """
    ratios = []
    with lab(fastest=None) as own:
        before = speed(own)
        for _ in range(9):
            # It tells that it transfers, so that nothing but the limit is measured.
            curl = f"curl -sN --max-time 1.5 {own.url} | {{ head -c 1; cat > /dev/null; }}"
            with subprocess.Popen(
                own.inside(*TOOL, "run", "-q", "--download-limit", "100K", "--", "sh", "-c", curl),
                stdout=subprocess.PIPE,
                env=ENVIRONMENT,
            ) as limited:
                assert limited.stdout
                assert limited.stdout.read(1)
                beside = speed(own)
            after = speed(own)
            ratios.append(beside / ((before + after) / 2))
            before = after
    assert statistics.median(ratios) >= 0.9, ratios


def speed(own: Lab) -> float:
    """Of a short download, in bytes a second."""
    curl = ["curl", "-sN", "-o", "/dev/null", "--max-time", "0.6", "-w", "%{speed_download}"]
    return float(subprocess.run(own.inside(*curl, own.url), stdout=subprocess.PIPE).stdout)
