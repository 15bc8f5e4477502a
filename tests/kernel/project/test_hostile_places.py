"""What others have put where root starts the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lab import ENVIRONMENT

from pybpfthrottle.linux.cgroup import Cgroup

# Of the standard library, and of the packages: whatever is imported from here leaves a trace.
_TRAPS = ("click", "ctypes", "elftools", "json", "select", "signal", "socket", "struct", "typing")
_INSTALLED = "from pybpfthrottle.__main__ import main; main()"


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory with modules of names that the program imports."""
    place = tmp_path / "trap"
    place.mkdir()
    for name in _TRAPS:
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'fell')!r}, 'w'); raise Trap")
    return place


def test_helpers_import_nothing_from_the_current_directory(
    trap: Path, tmp_path: Path, scratch: Cgroup
) -> None:
    """Neither the gate's keeper nor the guard; the command is started as an installed one is."""
    entry = tmp_path / "bin" / "pybpfthrottle"
    entry.parent.mkdir()
    entry.write_text(f"#!{sys.executable}\n{_INSTALLED}\n")
    entry.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(entry), "run", "-v", "--download-limit", "1M", "--", "true"],
        cwd=trap,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: scratch.move_in(0),
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "fell").exists()
    assert "gate" in done.stderr


def test_nothing_is_made_in_a_directory_of_all(tmp_path: Path, scratch: Cgroup) -> None:
    """Where anybody could have made it first, under any name."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    before = shared.stat().st_mtime_ns
    environment = {**ENVIRONMENT, **dict.fromkeys(("TMPDIR", "TMP", "TEMP"), str(shared))}
    done = subprocess.run(
        [sys.executable, "-m", "pybpfthrottle", "run", "-q", "-d", "1M", "--", "true"],
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: scratch.move_in(0),
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(shared) == []
    assert shared.stat().st_mtime_ns == before
