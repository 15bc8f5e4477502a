"""Cgroup v2: where it is mounted, whether the target is in it, and what is permitted there."""

from __future__ import annotations

import os

from pybpfthrottle.backends.ebpf import attached, privileges
from pybpfthrottle.backends.ebpf.attach import ATTACH_TYPES
from pybpfthrottle.backends.ebpf.attached import Links
from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.diagnostics.check import Check, Result, Setup, failed, passed, skipped, warned
from pybpfthrottle.errors import CgroupError, Error, NoCgroupError, ProcessError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import own_cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.signals import held_back

_MOST_PROGRAMS = 64
_MODES = {
    AttachMode.SINGLE: "single",
    AttachMode.ALLOW_OVERRIDE: "override",
    AttachMode.ALLOW_MULTIPLE: "multi",
}


def _mounted(setup: Setup) -> Result:
    try:
        mount = cgroups_v2.mount()
        hidden = _hidden(mount)
    except CgroupError as error:
        others = [m.path for m in _mounts() if m.type == "cgroup"]
        evidence = [f"cgroup v1 at {path}" for path in others]
        return failed(str(error), *evidence, cause="v1-only" if others else "no-cgroup2")
    if hidden:
        return failed(hidden, cause="no-cgroup2")
    hybrid = any(m.type == "cgroup" for m in _mounts())
    how = "beside cgroup v1 (hybrid)" if hybrid else "alone (unified)"
    return passed(f"mounted at {mount.path}, {how}", f"its root is {mount.root}")


def _hidden(mount: cgroups_v2.Mount) -> str:
    """Return why a mount cannot be reached, such as another one over it; empty if it can."""
    try:
        device = os.stat(Cgroup(mount.path).reach).st_dev
    except OSError as error:
        return f"cgroup v2 is mounted at {mount.path}, which cannot be reached: {error.strerror}"
    if f"{os.major(device)}:{os.minor(device)}" == mount.device:
        return ""
    return f"cgroup v2 is mounted at {mount.path}, but something else is mounted over it"


def _mounts() -> list[cgroups_v2.Mount]:
    try:
        return cgroups_v2.mounts()
    except CgroupError:
        return []


def _target(setup: Setup) -> Result:
    try:
        setup.target = _find(setup)
    except (ProcessError, NoCgroupError) as error:
        return _without_target(setup, error, "target-gone")
    except CgroupError as error:
        return _without_target(setup, error, "target-wrong")
    facts = _facts(setup.target)
    if setup.named:
        return passed(setup.target.path, *facts)
    return passed(f"{setup.target.path}, of this process; use --pid for another", *facts)


def _without_target(setup: Setup, error: Error, cause: str) -> Result:
    """Return a failure only if a target was named: this process's own cgroup may be invisible."""
    if setup.named:
        return failed(str(error), cause=cause)
    return skipped(f"no target was given, and this process's own cgroup cannot be used: {error}")


def _find(setup: Setup) -> Cgroup:
    if setup.cgroup is not None:
        return cgroups_v2.from_path(setup.cgroup)
    if setup.unit is not None:
        return cgroups_v2.from_unit(setup.unit)
    return cgroups_v2.from_pid(os.getpid() if setup.pid is None else setup.pid)


def _facts(cgroup: Cgroup) -> list[str]:
    found = [f"owner: user {os.stat(cgroup.reach).st_uid}"]
    for name in ("cgroup.type", "cgroup.controllers"):
        try:
            with open(os.path.join(cgroup.reach, name)) as file:
                found.append(f"{name}: {file.read().strip()}")
        except OSError:
            continue  # the root has no type
    return found


def _user(setup: Setup) -> Result:
    uid = int(os.environ.get("SUDO_UID", os.getuid()))
    if uid == 0:
        return skipped("root has no cgroup of its own", cause="root")
    path = os.path.join(
        cgroups_v2.root().reach, "user.slice", f"user-{uid}.slice", f"user@{uid}.service"
    )
    if not os.path.isdir(path):
        return skipped("there is none; systemd creates one where it manages users", path)
    owner = os.stat(path).st_uid
    told = "delegated to the user" if owner == uid else f"not delegated: it belongs to user {owner}"
    return passed(told, path)


def _scratch(setup: Setup) -> Result:
    reasons = []
    own = None if setup.failed("cgroup.target") else setup.target
    for parent in dict.fromkeys(filter(None, (cgroups_v2.root(), own))):
        try:
            with held_back():
                scratch = own_cgroups.create_empty(parent)
                setup.stack.callback(scratch.remove)
        except OSError as error:
            reasons.append(f"{parent.path}: {error.strerror}")
            continue
        setup.scratch = scratch.cgroup
        return passed(f"one can be made below {parent.path}")
    cause = "no-scratch" if setup.named else "no-own-cgroup"
    return failed("no cgroup can be made", *reasons, cause=cause)


def _root(setup: Setup) -> Result:
    top = cgroups_v2.root()
    os.close(top.open())
    if os.statvfs(top.reach).f_flag & os.ST_RDONLY:
        remedy = own_cgroups.without_one("--pid works without one")
        return warned(
            f"{top.path} is mounted read-only: no cgroup can be made for a command; {remedy}"
        )
    if not os.access(top.reach, os.W_OK):
        return warned(f"this process may not write to {top.path}, so it cannot make a cgroup there")
    return passed(f"{top.path} can be opened and written")


def _bpf_file_system(setup: Setup) -> Result:
    found = [m.path for m in _mounts() if m.type == "bpf"]
    if found:
        return passed(f"mounted at {found[0]}")
    return passed("not mounted; only pinning needs it, limits do not")


def _programs(setup: Setup) -> Result:
    target = setup.target
    if target is None:
        return skipped("there is no target", cause="needs")
    known = Links()
    try:
        there = [
            one for where in target.with_ancestors() for one in attached.at(where, known=known)
        ]
    except OSError as error:
        return skipped(privileges.why_refused(error, str(error.filename)), cause="not-told")
    evidence = [
        f"{one.cgroup.path}: {one.attach_type.name.lower()} {_MODES.get(one.mode, '?')}: {one}"
        for one in there
        if one.mode is not None
    ]
    for hook in ATTACH_TYPES.values():
        stand = attached.blocking(target, hook)
        if stand:
            where = "the target" if stand[0].cgroup == target else f"{stand[0].cgroup.path}, above"
            text = f"{stand[0]} is attached to {where} in a mode that allows no others"
            return failed(text, *evidence, cause="exclusive")
        below = attached.overridden(target, hook)
        if below:
            text = (
                f"{below[0]} is attached above, to {below[0].cgroup.path}, and may be overridden:"
                " any program attached to the target would switch it off there"
            )
            return failed(text, *evidence, cause="overridable")
        same = [one for one in there if one.cgroup == target and one.attach_type == hook]
        if len(same) >= _MOST_PROGRAMS:
            text = f"{len(same)} programs are attached at one hook, the most that the kernel allows"
            return failed(text, *evidence, cause="too-many")
    optional = [one for hook in HOOKS for one in attached.overridden(target, hook)]
    if optional:
        hook_name = optional[0].attach_type.name.lower()
        text = f"{optional[0]} may be overridden: a limit leaves {hook_name} alone"
        return warned(text, *evidence, cause="left-out")
    if not there:
        return passed("nothing is attached to the target or above it")
    return passed("the attached programs allow others", *evidence)


CHECKS = (
    Check(
        "cgroup.v2",
        "Cgroups",
        "cgroup v2",
        "limits are attached to cgroups of version 2",
        "mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2",
        _mounted,
    ),
    Check(
        "cgroup.target",
        "Cgroups",
        "the target",
        "the cgroup that a limit would be attached to",
        "name a process, cgroup or unit that exists and is in cgroup v2",
        _target,
        ("cgroup.v2",),
    ),
    Check(
        "cgroup.user",
        "Cgroups",
        "the user's cgroup",
        "where systemd keeps a user's programs",
        "nothing to do: root can attach to it too",
        _user,
        ("cgroup.v2",),
    ),
    Check(
        "cgroup.root",
        "Cgroups",
        "access to the root cgroup",
        "cgroups for commands (run) are made below it",
        "mount cgroup v2 writable, and run it as root",
        _root,
        ("cgroup.v2",),
    ),
    Check(
        "cgroup.scratch",
        "Cgroups",
        "a cgroup for trials",
        "tests run in a cgroup that nothing else uses",
        "make cgroup v2 writable; this needs root",
        _scratch,
        ("cgroup.v2", "rights.capabilities"),
    ),
    Check(
        "cgroup.bpffs",
        "Cgroups",
        "BPF file system",
        "objects can be pinned there",
        "mount -t bpf none /sys/fs/bpf",
        _bpf_file_system,
    ),
    Check(
        "attached.programs",
        "What is there already",
        "programs on the target and above it",
        "a program without BPF_F_ALLOW_MULTI blocks others, or is switched off by them",
        "ask its owner to attach it with BPF_F_ALLOW_MULTI",
        _programs,
        ("cgroup.target", "rights.commands"),
    ),
)
