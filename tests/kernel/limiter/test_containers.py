"""What errors advise in a container works in that container: each advice is followed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest
from lab import ENVIRONMENT, TOOL
from own_mounts import __file__ as own_mounts

from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux.cgroup import Cgroup

TOP = cgroups.root().path
BRIEF = ("--upload-limit", "1M", "--duration", "0.3", "-q")
ADVICE = re.compile(r"--cgroup \S+ --whole-cgroup|--pid PID|--pid without --move-cgroup")
NAME = "pybpft-sleeper"
KINDS = ("read-only", "own ids", "both")


class Container:
    """A cgroup as the root of all that is visible, read-only or with process ids of its own."""

    def __init__(self, cgroup: Cgroup, kind: str, sleep: str) -> None:
        self._cgroup = cgroup
        script = f"umount {TOP}; mount -t cgroup2 x {TOP}; "
        own_ids = ()
        if kind != "own ids":
            script += f"mount -o remount,bind,ro {TOP}; "
        if kind != "read-only":
            own_ids = ("--pid", "--fork", "--kill-child")
            script += "mount -t proc x /proc; "
        # There is somebody else in it, as usual. The process that is limited is $PID.
        script += (
            'sleep 60 >&- 2>&- & other=$!; "$1" 60 >&- 2>&- & PID=$!;'
            ' eval "$2"; status=$?; kill $other $PID; exit $status'
        )
        self._prefix = [
            *("unshare", "--cgroup", *own_ids, sys.executable, own_mounts, "--"),
            *("sh", "-c", script, "sh", sleep),
        ]

    def run(self, arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the tool in it."""
        return subprocess.run(
            [*self._prefix, f"{' '.join(TOOL)} {arguments}"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=lambda: self._cgroup.move_in(0),
        )

    def limit(self, arguments: str) -> subprocess.CompletedProcess[str]:
        """Limit something in it for a moment."""
        return self.run(" ".join([arguments, *BRIEF]))

    def follow(self, complaint: str) -> None:
        """Do what an error advises."""
        advice = ADVICE.search(complaint)
        assert advice, complaint
        arguments = "--pid PID" if "--pid" in advice[0] else advice[0]
        done = self.limit(arguments.replace("PID", "$PID"))
        assert done.returncode == 0, (complaint, done.stderr)


@pytest.fixture(params=KINDS)
def container(
    scratch: Cgroup, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Container]:
    """A container of each kind, with a process named pybpft-sleeper in it."""
    inner = scratch.create_child("container")
    sleep = tmp_path / NAME
    sleep.symlink_to("/bin/sleep")
    yield Container(inner, request.param, str(sleep))
    inner.remove(patience_s=10)


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of the container."""
    found: str = request.node.callspec.params["container"]
    return found


@pytest.mark.parametrize(
    ("target", "works_in"),
    [
        ("--pid $PID", ["read-only", "own ids"]),
        ("--pid $PID --move-cgroup", ["own ids"]),
        ("--pid $PID --whole-cgroup", []),
        ("--pid $PID --each", ["read-only"]),
        (f"--name {NAME}", ["read-only"]),
        (f"--name {NAME} --each", ["read-only"]),
        (f"--user root --name {NAME}", ["read-only"]),
        (f"--cgroup {TOP}", []),
    ],
)
def test_what_is_limited_works_or_the_way_out_does(
    container: Container, kind: str, target: str, works_in: list[str]
) -> None:
    """What is not possible ends with an error whose advice works."""
    done = container.limit(target)
    assert (done.returncode == 0) is (kind in works_in), done.stderr
    if kind in works_in:
        assert "error" not in done.stderr
    elif target.startswith("--cgroup"):
        assert "add --whole-cgroup" in done.stderr
        assert container.limit(f"{target} --whole-cgroup").returncode == 0
    else:
        container.follow(done.stderr)


def test_run_works_or_the_way_out_does(container: Container, kind: str) -> None:
    """Where no cgroup can be made run says so, and what to do instead."""
    done = container.run("run --upload-limit 1M -q -- true")
    if kind == "own ids":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 125
        assert "Read-only file system" in done.stderr
        container.follow(done.stderr)


def test_verify_setup_tells(container: Container, kind: str) -> None:
    """Whether cgroups can be made, and processes be limited, with what works instead."""
    found = json.loads(container.run("verify-setup --json").stdout)
    results = {each["id"]: each for each in found["checks"]}
    assert (results["cgroup.root"]["outcome"] == "warn") is (kind != "own ids")
    assert (results["trial.marks"]["outcome"] == "warn") is (kind != "read-only")
    if kind == "both":
        container.follow(results["cgroup.root"]["text"])
