"""Pods are limited by their annotations: a fake API, and cgroups as the kubelet names them."""

from __future__ import annotations

import subprocess
import sys
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Iterator

import pytest
from fake_kubernetes import TOKEN, FakeKubernetes
from lab import ENVIRONMENT
from redis_server import until

from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.rules import instance
from pybpfthrottle.rules.keeper import by_rules

# One daemon keeps the rules of a machine.
pytestmark = pytest.mark.alone


class Kubelet:
    """Makes the cgroups of pods, as with systemd; its tree is not that of a real one here."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._stem = f"test{uuid.uuid4().hex[:8]}-kubepods"
        self._top = self._made(cgroups.root(), f"{self._stem}.slice")
        self._effort = self._made(self._top, f"{self._stem}-besteffort.slice")

    def _made(self, above: Cgroup, name: str) -> Cgroup:
        found = above.create_child(name)
        self._stack.callback(found.remove, patience_s=5)
        return found

    def start(self, uid: str) -> Cgroup:
        """Start a pod with one container, in which a process runs; return the pod's cgroup."""
        name = f"{self._stem}-besteffort-pod{uid.replace('-', '_')}.slice"
        found = self._made(self._effort, name)
        container = self._made(found, f"cri-containerd-{uuid.uuid4().hex * 2}.scope")
        process = subprocess.Popen(["sleep", "100"], preexec_fn=lambda: container.move_in(0))
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return found


@pytest.fixture
def account(tmp_path: Path) -> Path:
    """The files of a service account, for an API without TLS."""
    (tmp_path / "token").write_text(TOKEN)
    return tmp_path


def limits(uid: str) -> dict[str, Any]:
    """What a pod's limits are, by direction, and the cgroups that they are on."""
    specs = [part.spec for one in by_rules() for part in one.parts]
    mine = [spec for spec in specs if spec.target.rule.endswith(f" {uid}")]
    rates = {str(way): rate.bytes_per_s for one in mine for way, rate in one.limits.items() if rate}
    return {**rates, "on": list(mine[0].target.cgroups)} if mine else {}


@pytest.fixture
def api() -> Iterator[FakeKubernetes]:
    """The API of a node."""
    with FakeKubernetes("node-1") as server:
        yield server


def test_pods_are_limited_by_their_annotations(api: FakeKubernetes, account: Path) -> None:
    """From their start, also those that come later; with other annotations, and no longer."""
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    with ExitStack() as stack:
        kubelet = Kubelet(stack)
        api.put(first, "web-0", upload="5M")
        on = [kubelet.start(first).path]
        command = [sys.executable, "-m", "pybpfthrottle.pods", "--node", "node-1"]
        command += ["--api", api.url, "--account", str(account)]
        command += ["--directory", str(account / "rules")]
        with subprocess.Popen(
            command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        ) as running:
            try:

                def begun() -> bool:
                    assert running.poll() is None, running.communicate()[1]
                    return limits(first) == {"upload": 5 << 20, "on": on}

                until(begun)
                # Its annotations are known before its cgroup is there.
                api.put(second, "db-0", download="8mbit", upload="1M")
                other = kubelet.start(second).path
                known = {"upload": 1 << 20, "download": 1_000_000, "on": [other]}
                until(lambda: limits(second) == known)
                api.put(first, "web-0", upload="6M")
                until(lambda: limits(first) == {"upload": 6 << 20, "on": on})
                api.put(first, "web-0", upload="6mbps")
                until(lambda: limits(first) == {})
                assert running.stderr
                assert "pod default/web-0 is not limited: " in running.stderr.readline()
                # An API that is gone leaves the limits in force.
                api.refuse = 500
                api.tell("ERROR", {"code": 410})
                assert "HTTP 500; the limits stay as they are" in running.stderr.readline()
                assert limits(second) == known
                api.refuse = 0
                api.delete(second)
                until(lambda: limits(second) == {})
            finally:
                running.terminate()
        assert running.returncode == 0
        assert instance.current() is None
