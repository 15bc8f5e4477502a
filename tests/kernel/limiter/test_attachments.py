"""cgroup show and tree tell what bpftool tells of the same cgroups."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from typing import Any, Iterator

import pytest
from lab import ENVIRONMENT, TOOL
from since import needs_release

from pybpfthrottle.bpf import links, programs
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.bpf.obj.asm import return_imm
from pybpfthrottle.linux.cgroup import Cgroup

HOOKS = [
    (ProgType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS, "link"),
    (ProgType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS, "ALLOW_MULTIPLE"),
    (ProgType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS, "link"),
    (ProgType.CGROUP_SOCK, AttachType.CGROUP_INET_SOCK_CREATE, "ALLOW_OVERRIDE"),
    (ProgType.CGROUP_SOCK, AttachType.CGROUP_INET4_POST_BIND, "link"),
    (ProgType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS, "SINGLE"),
    (ProgType.CGROUP_DEVICE, AttachType.CGROUP_DEVICE, "link"),
    (ProgType.CGROUP_SOCK_ADDR, AttachType.CGROUP_INET6_CONNECT, "ALLOW_MULTIPLE"),
    (ProgType.CGROUP_SYSCTL, AttachType.CGROUP_SYSCTL, "link"),
    (ProgType.CGROUP_SOCKOPT, AttachType.CGROUP_GETSOCKOPT, "link"),
]


@pytest.fixture
def busy(scratch: Cgroup) -> Iterator[Cgroup]:
    """A cgroup below one with a program of its own, and with programs at many hooks."""
    needs_release("5.7", "links to cgroups")
    child = scratch.create_child("busy")
    with ExitStack() as stack:
        stack.callback(child.remove, patience_s=5)
        place(stack, scratch, ProgType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS, "link")
        for kind, hook, how in HOOKS:
            place(stack, child, kind, hook, how)
        yield child


def place(stack: ExitStack, cgroup: Cgroup, kind: ProgType, hook: AttachType, how: str) -> None:
    """Attach a program that lets all pass."""
    program = stack.enter_context(
        programs.load(
            return_imm(1), type=kind, license="GPL", name="pass", expected_attach_type=hook
        )
    )
    fd = cgroup.open()
    try:
        if how == "link":
            stack.callback(links.create_link(program, fd, hook).detach)
        else:
            stack.callback(links.attach_legacy(program, fd, hook, AttachMode[how]).detach)
    finally:
        os.close(fd)


# How bpftool called attach types before Linux 5.19, as far as they occur here.
BEFORE_5_19 = {
    "ingress": "cgroup_inet_ingress",
    "egress": "cgroup_inet_egress",
    "sock_create": "cgroup_inet_sock_create",
    "sock_ops": "cgroup_sock_ops",
    "device": "cgroup_device",
    "sysctl": "cgroup_sysctl",
    "connect6": "cgroup_inet6_connect",
    "post_bind4": "cgroup_inet4_post_bind",
    "getsockopt": "cgroup_getsockopt",
    "setsockopt": "cgroup_setsockopt",
}


def ours(*arguments: str) -> Any:
    """What our command prints as JSON."""
    done = subprocess.run(
        [*TOOL, "cgroup", *arguments, "--json"],
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        check=True,
    )
    return json.loads(done.stdout)


def theirs(*arguments: str) -> Any:
    """What bpftool prints as JSON."""
    done = subprocess.run(["bpftool", "cgroup", *arguments, "-j"], stdout=subprocess.PIPE)
    shown = json.loads(done.stdout or "null")
    # It fails on the first attach type that an older kernel does not know.
    if done.returncode or not shown or shown[0].get("programs") == []:
        needs_release("6.7", "the newest hooks that any bpftool asks for")
        pytest.fail(f"bpftool shows nothing: {done.stdout!r}")
    return shown


def comparable(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fields that both have."""
    fields = ("id", "attach_type", "attach_flags", "name")
    rows = [{field: row.get(field, "") for field in fields} for row in found]
    for row in rows:
        row["attach_type"] = BEFORE_5_19.get(row["attach_type"], row["attach_type"])
    return sorted(rows, key=lambda row: (row["attach_type"], row["id"]))


def test_show_tells_what_is_attached(busy: Cgroup) -> None:
    """Each hook with its flags, and each link with its holder."""
    found = ours("show", busy.path)
    told = sorted((row["attach_type"], row["attach_flags"], len(row["links"])) for row in found)
    flags = {"link": "multi", "ALLOW_MULTIPLE": "multi", "ALLOW_OVERRIDE": "override", "SINGLE": ""}
    assert told == sorted((hook.name.lower(), flags[how], how == "link") for _, hook, how in HOOKS)
    assert {pid for row in found for link in row["links"] for pid in link["pids"]} == {os.getpid()}


def test_show_tells_what_bpftool_tells(busy: Cgroup) -> None:
    """Programs, hooks, flags and names are the same, for each hook of cgroups."""
    found = ours("show", busy.path)
    assert comparable(found) == comparable(theirs("show", busy.path))


@pytest.mark.alone  # other tests attach to the ancestors
def test_effective_tells_what_bpftool_tells(busy: Cgroup) -> None:
    """So it is for what is effective, the ancestors' programs included."""
    found = ours("show", "--effective", busy.path)
    # Old releases tell flags here, too, where they mean nothing.
    expected = [{**row, "attach_flags": ""} for row in theirs("show", busy.path, "effective")]
    assert comparable(found) == comparable(expected)
    assert len(found) > len(HOOKS)


def test_tree_tells_what_bpftool_tells(busy: Cgroup) -> None:
    """And for all cgroups below one."""
    top = os.path.dirname(busy.path)
    found, expected = ours("tree", top), theirs("tree", top)
    assert {entry["cgroup"] for entry in found} == {top, busy.path}
    assert {entry["cgroup"]: comparable(entry["programs"]) for entry in found} == {
        entry["cgroup"]: comparable(entry["programs"]) for entry in expected
    }
