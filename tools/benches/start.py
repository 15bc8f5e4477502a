"""Time from process start to both directions attached, or to the end, and peak memory.

Also the CPU time of the whole command, which says the same on a busy machine. ``times`` and
``cpu_times`` are how many times the bare interpreter that is, up to the same point.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from benches.process import Sample, ended, medians, timed
from benches.table import configure, show
from pybpfthrottle.linux import cgroup

__all__ = ["configure", "main"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("click", "elftools", "rich", "markdown_it", "mdurl", "pygments")
BARE, RUN = "bare interpreter", "pybpfthrottle run"
BARE_TO_ITS_END = "bare interpreter, to its end"
# Measured until they end.
ENDING = (BARE_TO_ITS_END, "pybpfthrottle --help", "pybpfthrottle list")


def measure(rounds: int) -> dict[str, Any]:
    """Each way ends in a command that tells when it got there, or simply ends."""
    with tempfile.TemporaryDirectory() as directory:
        # Other packages' modules are compiled once, in the first round; ours are by then.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        scratch = cgroup.root().create_child(f"bench-{os.getpid()}")
        try:
            ways = _ways(directory, _installed(directory), scratch.path)
            samples: dict[str, list[Sample]] = {name: [] for name in ways}
            cpu_ms: dict[str, list[float]] = {name: [] for name in ways}
            imports: list[Sample] = []
            for _ in range(rounds):
                for name, command in ways.items():
                    take = ended if name in ENDING else timed
                    before_ms = _childrens_cpu_ms()
                    samples[name].append(take(command, environment))
                    cpu_ms[name].append(_childrens_cpu_ms() - before_ms)
                imports.append((_importing_ms(ways[RUN], environment), 0))
        finally:
            scratch.remove()
    rows = medians({**samples, f"{RUN}: its imports, traced": imports})
    for name, used_ms in cpu_ms.items():
        rows[name]["cpu_ms"] = round(statistics.median(used_ms), 1)
    for name, row in rows.items():
        bare = rows[BARE_TO_ITS_END if name in ENDING else BARE]
        row["times"] = round(row["ms"] / bare["ms"], 1)
        if "cpu_ms" in row:
            row["cpu_times"] = round(row["cpu_ms"] / bare["cpu_ms"], 1)
    return rows


def _installed(directory: str) -> str:
    """Return the interpreter of an environment that has just the packages that are needed.

    This one's may have files that import modules at each start, as an editable installation has:
    that would be charged to the bare interpreter.
    """
    environment = Path(directory, "environment")
    venv.create(environment)
    (packages,) = environment.glob("lib/python*/site-packages")
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            (packages / name).symlink_to(next(iter(spec.submodule_search_locations)))
    return str(environment / "bin/python3")


def _childrens_cpu_ms() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (used.ru_utime + used.ru_stime) * 1000


def _ways(directory: str, python: str, path: str) -> dict[str, list[str]]:
    """The commands by their names; ``path`` is that of a cgroup to be limited."""
    arrived = ["sh", "-c", "date +%s%N; grep VmHWM /proc/$PPID/status"]
    limits = ["--download-limit", "1G", "--upload-limit", "1G"]
    tool = [python, "-m", "pybpfthrottle"]
    ways = {
        BARE: [python, "-c", f"import os; os.spawnvp(os.P_WAIT, 'sh', {arrived!r})"],
        BARE_TO_ITS_END: [python, "-c", "pass"],
        RUN: [*tool, "run", "--quiet", *limits, "--", *arrived],
        "pybpfthrottle.limit(cgroup=)": [python, "-c", _CORE.format(path, arrived)],
        "pybpfthrottle --help": [*tool, "--help"],
        "pybpfthrottle list": [*tool, "list"],
    }
    if shutil.which("bpftool"):
        script = Path(directory, "bpftool.sh")
        script.write_text(_BPFTOOL)
        target = "bpfel" if sys.byteorder == "little" else "bpfeb"
        built = str(ROOT / "prebuilt" / f"throttle.{target}.o")
        ways["bpftool, 3 calls"] = ["unshare", "--mount", "sh", str(script), directory, built, path]
    return ways


def _importing_ms(command: list[str], environment: dict[str, str]) -> float:
    """How long all imports of a command take, as Python tells; to tell it takes time as well."""
    traced = {**environment, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, env=traced, capture_output=True, text=True, check=True)
    lines = (line.partition("import time:")[2] for line in done.stderr.splitlines())
    own_us = (line.split("|")[0].strip() for line in lines)
    return sum(int(microseconds) for microseconds in own_us if microseconds.isdigit()) / 1000


_CORE = """
import os, pybpfthrottle
limit = pybpfthrottle.limit(cgroup={!r}, download="1G", upload="1G", supervise=False)
os.spawnvp(os.P_WAIT, "sh", {!r})
limit.remove()
"""
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
