"""In namespaces of its own the tool finds the same cgroups, and guards the same ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from contextlib import contextmanager
from typing import Iterator, Sequence

import pytest
from lab import ENVIRONMENT, TOOL, attached
from own_mounts import __file__ as own_mounts

from pybpfthrottle import throttle
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate

LIMITS = ("--upload-limit", "1M", "-q", "--duration", "0.3")
TOP = cgroups.root().path
# A cgroup namespace as unshare(1) makes it, where the mount begins above the namespace's root;
# one with mounts of its own; and one with a new mount, over the old one and in place of it.
OLD_MOUNT = ["unshare", "--cgroup"]
OWN_MOUNTS = ["unshare", "--cgroup", sys.executable, own_mounts, "--"]
OVER = [
    *OWN_MOUNTS,
    "sh",
    "-ec",
    f'mount -t tmpfs x {TOP}; mount -t cgroup2 x {TOP}; exec "$@"',
    "sh",
]
NEW_MOUNT = [
    *OWN_MOUNTS,
    "sh",
    "-ec",
    f'umount {TOP}; mount -t cgroup2 none {TOP}; exec "$@"',
    "sh",
]
ALL = pytest.mark.parametrize(
    "namespace", [OLD_MOUNT, OWN_MOUNTS, OVER, NEW_MOUNT], ids=["old", "own", "over", "new"]
)


@pytest.fixture
def inner(scratch: Cgroup) -> Iterator[Cgroup]:
    """A cgroup below the test's own."""
    below = scratch.create_child("inner")
    yield below
    below.remove(patience_s=5)


def tool(
    *arguments: str, namespace: Sequence[str] = (), inside: Cgroup
) -> subprocess.CompletedProcess[str]:
    """Run the command from within a cgroup, in namespaces of its own."""
    return subprocess.run(
        [*namespace, *TOOL, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: inside.move_in(0),
    )


@contextmanager
def sleeper(cgroup: Cgroup) -> Iterator[int]:
    """A process in a cgroup."""
    with subprocess.Popen(["sleep", "60"], preexec_fn=lambda: cgroup.move_in(0)) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def seen(cgroup: Cgroup, top: Cgroup, namespace: Sequence[str]) -> str:
    """The path of a cgroup in a namespace that was made in ``top``."""
    if namespace in (OVER, NEW_MOUNT):
        return os.path.normpath(f"{TOP}/{os.path.relpath(cgroup.path, top.path)}")
    return cgroup.path


@ALL
@pytest.mark.parametrize("target", ["own", "above", "root"])
def test_the_own_session_is_guarded(
    scratch: Cgroup, inner: Cgroup, namespace: Sequence[str], target: str
) -> None:
    """The cgroup that this session is in, those above and the root are not limited by accident."""
    if target != "own" and namespace in (OVER, NEW_MOUNT):
        path = TOP
    else:
        path = {"own": seen(inner, inner, namespace), "above": scratch.path, "root": TOP}[target]
    done = tool("--cgroup", path, *LIMITS, namespace=namespace, inside=inner)
    assert done.returncode == 1
    assert "holds this session too" in done.stderr


@ALL
@pytest.mark.parametrize("option", ["--whole-cgroup", "--move-cgroup"])
def test_the_cgroup_of_a_process_is_found(
    scratch: Cgroup, inner: Cgroup, namespace: Sequence[str], option: str
) -> None:
    """What needs the cgroup of a process works as it does outside."""
    other = inner.create_child("other")
    try:
        with sleeper(other) as pid:
            done = tool("--pid", str(pid), option, *LIMITS, namespace=namespace, inside=inner)
            assert (done.returncode, done.stderr) == (0, "")
    finally:
        other.remove(patience_s=5)


def test_a_sibling_of_the_namespaces_root_is_found(scratch: Cgroup, inner: Cgroup) -> None:
    """A process whose path begins with /.. is visible by the old mount."""
    other = scratch.create_child("other")
    try:
        with sleeper(other) as pid:
            arguments = ("--pid", str(pid), "--whole-cgroup", *LIMITS)
            done = tool(*arguments, namespace=OLD_MOUNT, inside=inner)
            assert (done.returncode, done.stderr) == (0, "")
            done = tool(*arguments, namespace=NEW_MOUNT, inside=inner)
            assert "another cgroup namespace" in done.stderr
    finally:
        other.remove(patience_s=5)


@ALL
def test_limits_of_outside_are_found(
    scratch: Cgroup, inner: Cgroup, namespace: Sequence[str]
) -> None:
    """A cgroup that is limited already is known by its id, under whatever path."""
    other = inner.create_child("other")
    path = seen(other, inner, namespace)
    try:
        with throttle.apply([other], {Direction.UPLOAD: Rate.parse("1M")}) as live:
            done = tool("--cgroup", path, *LIMITS, namespace=namespace, inside=inner)
            assert f"{path} is already limited" in done.stderr
            done = tool("show", "--cgroup", path, "--json", namespace=namespace, inside=inner)
            assert [one["id"] for one in json.loads(done.stdout)["throttles"]] == [live.id]
    finally:
        other.remove(patience_s=5)


def test_a_path_that_means_another_cgroup_elsewhere_is_no_conflict(
    scratch: Cgroup, inner: Cgroup
) -> None:
    """What is limited outside, on a path that a cgroup inside has as well, is another one."""
    name = f"twin-{uuid.uuid4().hex[:8]}"
    outside, twin = cgroups.root().create_child(name), inner.create_child(name)
    try:
        with throttle.apply([outside], {Direction.UPLOAD: Rate.parse("1M")}):
            done = tool("--cgroup", f"{TOP}/{name}", *LIMITS, namespace=NEW_MOUNT, inside=inner)
            assert (done.returncode, done.stderr) == (0, "")
    finally:
        outside.remove(patience_s=5)
        twin.remove(patience_s=5)


@pytest.mark.parametrize("namespace", [OLD_MOUNT, NEW_MOUNT], ids=["old", "new"])
def test_run_works_in_a_domain_threaded_root(
    scratch: Cgroup, inner: Cgroup, namespace: Sequence[str]
) -> None:
    """A cgroup with threaded ones below takes processes only in cgroups that are threaded too."""
    threaded = inner.create_child("threaded")
    try:
        with open(f"{threaded.path}/cgroup.type", "w") as file:
            file.write("threaded")
        with open(f"{inner.path}/cgroup.type") as file:
            assert file.read() == "domain threaded\n"
        done = tool(
            "run", "--upload-limit", "1M", "-q", "--", "true", namespace=namespace, inside=inner
        )
        assert (done.returncode, done.stderr) == (0, "")
        with sleeper(inner) as pid:
            done = tool("--pid", str(pid), "--move-cgroup", *LIMITS, inside=scratch)
            assert (done.returncode, done.stderr) == (0, "")
    finally:
        threaded.remove(patience_s=5)


@pytest.fixture
def netns() -> Iterator[list[str]]:
    """``ip netns exec`` of a network namespace."""
    name = f"pybpft-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_run_works_below_ip_netns_exec(scratch: Cgroup, netns: list[str]) -> None:
    """It mounts a new /sys; the command is limited all the same, and inherits nothing of that."""
    shown = (
        "grep ^0:: /proc/self/cgroup; grep -c cgroup2 /proc/self/mountinfo;ls /proc/self/fd | wc -l"
    )
    plain = subprocess.run(
        [*netns, "sh", "-c", shown], capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout.split("\n")
    done = tool(
        *("run", "--upload-limit", "1M", "-q", "--", "sh", "-c", shown),
        namespace=netns,
        inside=scratch,
    )
    assert (done.returncode, done.stderr) == (0, "")
    own, mounted, count, _ = done.stdout.split("\n")
    assert "/pybpfthrottle-" in own
    assert [mounted, count] == plain[1:3]


@pytest.mark.parametrize("target", ["--pid", "--cgroup", "--move-cgroup", "--unit"])
def test_targets_are_found_below_ip_netns_exec(
    scratch: Cgroup, inner: Cgroup, netns: list[str], target: str
) -> None:
    """Processes, the usual paths of cgroups, and units."""
    unit = inner.create_child(f"t{uuid.uuid4().hex[:8]}.service")
    name = os.path.basename(unit.path)
    try:
        with sleeper(unit) as pid:
            arguments = {
                "--pid": ["--pid", str(pid)],
                "--move-cgroup": ["--pid", str(pid), "--move-cgroup"],
                "--cgroup": ["--cgroup", unit.path],
                "--unit": ["--unit", name],
            }[target]
            done = tool(*arguments, *LIMITS, namespace=netns, inside=scratch)
            assert (done.returncode, done.stderr) == (0, "")
            assert attached(unit) == []
    finally:
        unit.remove(patience_s=5)


def test_other_commands_work_below_ip_netns_exec(scratch: Cgroup, netns: list[str]) -> None:
    """What looks at cgroups finds them, by the paths that they have outside."""
    done = tool("verify-setup", "--json", namespace=netns, inside=scratch)
    assert json.loads(done.stdout)["works"], done.stdout
    with throttle.apply([scratch], {Direction.UPLOAD: Rate.parse("1M")}) as live:
        done = tool("cgroup", "show", scratch.path, "--json", namespace=netns, inside=scratch)
        assert len(json.loads(done.stdout)) >= 1
        done = tool("list", "--json", namespace=netns, inside=scratch)
        [own] = [each for each in json.loads(done.stdout)["throttles"] if each["id"] == live.id]
        assert own["target"]["cgroups"] == [scratch.path]
        done = tool("cgroup", "tree", namespace=netns, inside=scratch)
        assert scratch.path in done.stdout.splitlines()


def test_a_limit_of_ip_netns_exec_is_shown_by_its_usual_path(
    scratch: Cgroup, inner: Cgroup, netns: list[str]
) -> None:
    """Others see the path that they know, and may remove the limit."""
    with subprocess.Popen(
        [*netns, *TOOL, "--cgroup", inner.path, "--upload-limit", "1M"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout
        process.stdout.readline()
        done = tool("list", "--json", inside=scratch)
        found = [each["target"]["cgroups"] for each in json.loads(done.stdout)["throttles"]]
        assert [inner.path] in found
        assert tool("remove", "--cgroup", inner.path, inside=scratch).returncode == 0
        process.communicate(timeout=20)
    assert attached(inner) == []


def test_where_it_cannot_be_reached_the_other_way_is_named(
    scratch: Cgroup, netns: list[str]
) -> None:
    """Without CAP_SYS_ADMIN nothing can be mounted: the command that works is named, and works."""
    unprivileged = [*netns, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    done = tool(*("run", *LIMITS[:3], "--", "true"), namespace=unprivileged, inside=scratch)
    assert done.returncode == 125
    assert "nsenter --net=/run/netns/NAME pybpfthrottle" in done.stderr
    enter = ["nsenter", f"--net=/run/netns/{netns[-1]}"]
    done = tool(*("run", *LIMITS[:3], "--", "true"), namespace=enter, inside=scratch)
    assert (done.returncode, done.stderr) == (0, "")
