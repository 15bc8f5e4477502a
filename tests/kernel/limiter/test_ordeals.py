"""Whatever call fails or is the last one, nothing is left: part of tools/faults, tools/soak."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from lab import ROOT
from since import needs_command, since

# Points of each scenario; the tool without --sample tries all of them.
_SAMPLE = 2


def ordeal(*arguments: str) -> str:
    """What a tool prints. All must have gone well."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT / "tools", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.alone  # other tests would take over what a killed process has kept
@since("5.10")
def test_no_call_that_fails_and_no_kill_leaves_anything() -> None:
    """At some points, which differ each time."""
    needs_command("nft")
    said = ordeal("faults", "--sample", str(_SAMPLE))
    rows = re.findall(r"^(\w+) +(\d+) +(\d+) +\d+ +0$", said, re.MULTILINE)
    assert len(rows) == 8, said
    for name, calls, points in rows:
        assert int(points) == _SAMPLE, name
        assert int(calls) > _SAMPLE, name


@since("5.10")
def test_all_that_is_done_at_random_is_undone() -> None:
    """For some seconds; the daemon holds no more than before."""
    needs_command("nft")
    said = ordeal("soak", "--minutes", "0.25")
    [(actions, failures)] = re.findall(r"^(\d+) actions, (\d+) failures$", said, re.MULTILINE)
    assert int(actions) > 0
    assert failures == "0"
