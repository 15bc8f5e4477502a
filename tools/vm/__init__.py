"""Virtual machines without KVM and disks: Debian's kernels, an initramfs, qemu's emulation."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]


class VmError(Exception):
    """What keeps us from booting a machine, in one line."""


def run(*command: str, cwd: Optional[Path] = None) -> str:
    """Return the standard output of a command that has to succeed."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except FileNotFoundError:
        raise VmError(f"{command[0]} is not installed") from None
    if done.returncode:
        raise VmError(f"{shlex.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
