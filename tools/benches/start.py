"""Time from process start to both directions attached, and peak memory."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from benches.process import Sample, medians, timed
from benches.table import configure, show
from pybpfthrottle.linux import cgroup

__all__ = ["configure", "main"]

ROOT = Path(__file__).resolve().parents[2]


def measure(rounds: int) -> dict[str, Any]:
    """Each way ends in a command that tells when it got there, and what its parent needed."""
    arrived = ["sh", "-c", "date +%s%N; grep VmHWM /proc/$PPID/status"]
    limits = ["--download-limit", "1G", "--upload-limit", "1G"]
    bare = f"import os; os.spawnvp(os.P_WAIT, 'sh', {arrived!r})"
    tool = [sys.executable, "-m", "pybpfthrottle"]
    ways = {
        "bare interpreter": [sys.executable, "-c", bare],
        "pybpfthrottle run": [*tool, "run", "--quiet", *limits, "--", *arrived],
    }
    with tempfile.TemporaryDirectory() as directory:
        # Modules are compiled once, in the first round, as in an installed package.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": directory}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        scratch = cgroup.root().create_child(f"bench-{os.getpid()}")
        try:
            if shutil.which("bpftool"):
                script = Path(directory, "bpftool.sh")
                script.write_text(_BPFTOOL)
                target = "bpfel" if sys.byteorder == "little" else "bpfeb"
                built = str(ROOT / "prebuilt" / f"throttle.{target}.o")
                arguments = [str(script), directory, built, scratch.path]
                ways["bpftool, 3 calls"] = ["unshare", "--mount", "sh", *arguments]
            samples: dict[str, list[Sample]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, command in ways.items():
                    samples[name].append(timed(command, environment))
        finally:
            scratch.remove()
    return medians(samples)


# The time of mounting is not bpftool's: it ends before the first call begins.
_BPFTOOL = """
mount -t bpf none "$1" || exit 1
begin=$(date +%s%N)
bpftool prog loadall "$2" "$1/programs"
bpftool cgroup attach "$3" ingress pinned "$1/programs/pybpft_ingress" multi
bpftool cgroup attach "$3" egress pinned "$1/programs/pybpft_egress" multi
echo "$begin $(date +%s%N)"
bpftool cgroup detach "$3" ingress pinned "$1/programs/pybpft_ingress"
bpftool cgroup detach "$3" egress pinned "$1/programs/pybpft_egress"
"""


def main(arguments: argparse.Namespace) -> int:
    return show(measure(arguments.rounds), as_json=arguments.json)
