"""The demo and the benchmarks run, and tell what they measured. Their times gate nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from lab import ENVIRONMENT, ROOT, TOOL

pytestmark = pytest.mark.timed


@pytest.mark.parametrize("place", [[], ["--loopback"]])
def test_the_demo_shows_that_limits_hold(place: list[str]) -> None:
    """The demo shows four transfers, the two limited ones with their verdict, and leaves with 0."""
    done = subprocess.run(
        [*TOOL, "demo", "--seconds", "3", *place],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("without a limit") == 2
    assert done.stdout.count("✅ THROTTLED") == 2


@pytest.mark.parametrize(
    ("what", "row", "column"),
    [("cost", "throttle: IPv4 TCP", "ns"), ("start", "pybpfthrottle run", "ms")],
)
def test_a_benchmark_measures(what: str, row: str, column: str) -> None:
    """Each benchmark gives its figures as JSON."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench"), what, "--rounds", "1", "--json"],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(done.stdout)[row][column] > 0
