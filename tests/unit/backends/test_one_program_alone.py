"""Linux 4.14, which runs one program alone for a cgroup, and names nothing that it has loaded."""

from __future__ import annotations

import ctypes
import json
import os
from contextlib import ExitStack

import pytest

from pybpfthrottle import targets, throttle
from pybpfthrottle.backends.ebpf import leftovers, registry
from pybpfthrottle.backends.ebpf.found import FoundThrottle
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.ebpf.records import ThrottleConfig, ThrottleRecord
from pybpfthrottle.bpf.codecs import U32
from pybpfthrottle.cli import attachments, cleanup
from pybpfthrottle.coverage import Coverage
from pybpfthrottle.diagnostics import trials
from pybpfthrottle.diagnostics.check import Outcome, Result, Setup
from pybpfthrottle.errors import AttachError, CgroupError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import own_cgroups, process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Direction, Rate, Target, ThrottleSpec
from pybpfthrottle.settings import AttachPolicy

LIMITS = {Direction.DOWNLOAD: Rate(100_000), Direction.UPLOAD: Rate(50_000)}
OURS = ["throttle/pybpft_ingress", "throttle/pybpft_egress"]


@pytest.fixture
def kernel(boot):
    """The kernel."""
    return boot("4.14")


@pytest.fixture
def made(monkeypatch):
    """Makes directories in place of cgroups of ours; at the end they are given up."""
    monkeypatch.setattr(own_cgroups, "_held", set())

    def make(parent: Cgroup) -> Cgroup:
        with open(f"{parent.path}/cgroup.type", "w") as file:
            file.write("domain")
        return own_cgroups.create_empty(parent).cgroup

    return make


@pytest.fixture
def own(made, tmp_path):
    """A directory in place of a cgroup that this process made."""
    return made(Cgroup(str(tmp_path)))


def apply(cgroup: Cgroup, *, exclusive: bool = False) -> throttle.Throttle:
    """Limit a cgroup."""
    policy = AttachPolicy(exclusive=exclusive)
    return throttle.apply([cgroup], LIMITS, options=Options(attach=dict.fromkeys(LIMITS, policy)))


def standing(mode: str) -> list[tuple[int, str, str]]:
    """What is attached where one limit is in force."""
    return [(hook, mode, program) for hook, program in enumerate(OURS)]


def kill_the_owner(monkeypatch) -> None:
    """From now on who has attached anything is gone, and has cleared up nothing."""
    monkeypatch.setattr(process, "is_gone", lambda owner: True)


def rates(kernel) -> list[int]:
    """The rates that the programs read."""
    contents = kernel.map_of(ctypes.sizeof(ThrottleConfig)).contents
    return [
        ThrottleConfig.from_buffer_copy(contents[U32.encode(d)]).rate_bytes_per_s for d in LIMITS
    ]


def test_in_a_cgroup_of_our_own_nothing_has_to_be_allowed(kernel, own) -> None:
    """Nobody else uses it, so that --exclusive is not asked for; and nobody can attach below it."""
    with apply(own) as limits:
        assert kernel.standing() == standing("SINGLE")
        assert limits.how()[Direction.UPLOAD]["attached_by"] == "legacy (single)"
    assert kernel.standing() == []


def test_a_limit_whose_last_step_fails_is_not_in_force(kernel, own, monkeypatch) -> None:
    """Its caller has nothing yet by which it could remove it."""

    def fail(self: throttle.Throttle) -> None:
        assert kernel.standing() == standing("SINGLE")
        raise OSError("no inotify watches are left")

    monkeypatch.setattr(targets, "given_cgroups", lambda target, insist: [own])
    monkeypatch.setattr(throttle.Throttle, "follow_units", fail)
    with pytest.raises(OSError, match="no inotify"):
        throttle.start(ThrottleSpec(Target(cgroups=(own.path,)), LIMITS))
    assert kernel.standing() == []


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_limit_within_a_limit_is_refused(kernel, own, made, exclusive: bool) -> None:
    """As by run inside run: the outer one stays in force, whatever is allowed to the inner one."""
    inner = made(own)
    with apply(own):
        with pytest.raises(AttachError, match=r"before Linux 4\.15"):
            apply(inner, exclusive=exclusive)
        assert kernel.standing() == standing("SINGLE")


def test_another_tools_program_above_is_not_switched_off(kernel, own, tmp_path) -> None:
    """It may be overridden, but nobody has asked for that; --exclusive does."""
    kernel.attach_foreign(str(tmp_path), 0, "OVERRIDE")
    with pytest.raises(AttachError, match="another program is attached there or above"):
        apply(own)
    assert kernel.standing() == [(0, "OVERRIDE", "foreign")]
    with apply(own, exclusive=True):
        assert (0, "OVERRIDE", OURS[0]) in kernel.standing()
    assert kernel.standing() == [(0, "OVERRIDE", "foreign")]


@pytest.mark.parametrize("where", ["there", "below", "above"])
def test_no_limit_replaces_another_one(kernel, target, tmp_path, where: str) -> None:
    """Not even where --exclusive allows to replace programs."""
    below = Cgroup(f"{target.path}/below")
    (tmp_path / "limited" / "below").mkdir()
    first, second = {
        "there": (target, target),
        "below": (target, below),
        "above": (below, target),
    }[where]
    with apply(first, exclusive=True):
        with pytest.raises(AttachError, match=f"{first.path} is already limited by process"):
            apply(second, exclusive=True)
        assert kernel.standing() == standing("OVERRIDE")


def test_limits_are_listed_without_names(kernel, own) -> None:
    """The record is known by its size and what it begins with."""
    with apply(own) as limits:
        (record,) = registry.in_force()
        assert (record.id, record.cgroups) == (limits.id, (own.path,))
        assert dict(record.spec.limits) == LIMITS


def test_somebody_else_removes_a_limit(kernel, own) -> None:
    """Links cannot be listed before Linux 5.8; its owner, which notices, detaches the programs."""
    with apply(own) as limits:
        (record,) = registry.in_force()
        FoundThrottle.open(record).remove()
        assert rates(kernel) == [0, 0]
        assert [one.removed for one in registry.in_force()] == [True]
        assert limits.limits == LIMITS
    assert kernel.standing() == []


def test_what_a_crash_leaves_in_our_cgroup_is_detached(kernel, own, monkeypatch) -> None:
    """It is found by its maps; whatever is attached to a cgroup of ours is ours."""
    apply(own)
    kill_the_owner(monkeypatch)
    found = leftovers.find()
    assert [str(one) for one in found] == [
        f"{program.partition('/')[2]} on {own.path}, of process {process.identity().pid}"
        for program in OURS
    ]
    assert leftovers.remove_all() == found
    assert kernel.standing() == []


def test_elsewhere_what_a_crash_leaves_lets_all_pass(kernel, target, monkeypatch) -> None:
    """Whose program is on another cgroup cannot be told: ours is disarmed, and not found again."""
    apply(target, exclusive=True)
    kill_the_owner(monkeypatch)
    assert len(leftovers.remove_all()) == 2
    assert rates(kernel) == [0, 0]
    assert kernel.standing() == standing("OVERRIDE")
    assert leftovers.find() == []


def test_a_crash_before_the_record_was_written_is_found(kernel, own, monkeypatch) -> None:
    """Then the map of the limits is all that tells of it."""
    apply(own)
    record = kernel.map_of(ctypes.sizeof(ThrottleRecord))
    record.contents.update(dict.fromkeys(record.contents, bytes(record.value_bytes)))
    kill_the_owner(monkeypatch)
    assert [one.cgroup for one in leftovers.remove_all()] == [None, None]
    assert rates(kernel) == [0, 0]


def test_what_others_have_attached_is_let_alone(kernel, own, target, monkeypatch) -> None:
    """A map of the same kind without our mark, and programs on other cgroups, are not ours."""
    kernel.attach_foreign(target.path, 0, "SINGLE")
    apply(own)
    configs = kernel.map_of(ctypes.sizeof(ThrottleConfig))
    for key, value in configs.contents.items():
        configs.contents[key] = b"\xff" * 4 + value[4:]
    record = kernel.map_of(ctypes.sizeof(ThrottleRecord))
    record.contents.update({key: bytes(record.value_bytes) for key in record.contents})
    kill_the_owner(monkeypatch)
    assert leftovers.find() == []


def test_cleanup_tells_what_it_found(kernel, own, monkeypatch, capsys) -> None:
    """In place of "Nothing is left": also in JSON, where programs have no id."""
    apply(own)
    kill_the_owner(monkeypatch)
    cleanup.cleanup(dry_run=True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [program["id"] for program in told["programs"]] == [None, None]
    cleanup.cleanup(dry_run=False, as_json=False)
    assert f"removed pybpft_ingress on {own.path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "look",
    [
        lambda path: attachments.show(path, effective=False, as_json=False),
        lambda path: attachments.tree(path, as_json=False),
    ],
    ids=["show", "tree"],
)
def test_what_is_attached_cannot_be_told(kernel, target, look, monkeypatch) -> None:
    """Nothing that is known is not the same as nothing."""
    device = os.stat(target.path).st_dev
    mount = cgroups_v2.mounts()[0]._replace(device=f"{os.major(device)}:{os.minor(device)}")
    monkeypatch.setattr(cgroups_v2, "mounts", lambda: [mount])
    with pytest.raises(CgroupError, match=r"does not support BPF_PROG_QUERY \(Linux 4\.15\)"):
        look(target.path)


def test_sockets_does_not_ask_root_for_root(kernel) -> None:
    """Which throttles cover a socket is not known, for want of the kernel."""
    with Coverage() as coverage:
        assert coverage.unknown == "this kernel does not support BPF_PROG_QUERY (Linux 4.15)"


def tried(own: Cgroup, target: Cgroup) -> dict[str, Result]:
    """What the trials give that attach."""
    found = {}
    with ExitStack() as stack:
        setup = Setup(stack, target=target, scratch=own)
        for check in trials.CHECKS:
            if check.id in ("trial.link", "trial.legacy", "trial.link_flags", "trial.target"):
                found[check.id.partition(".")[2]] = check.attempt(setup)
    return found


def test_verify_setup_tries_it_in_a_cgroup_of_our_own(kernel, own, target) -> None:
    """The target is let alone, and what nobody else uses is tried; no link is said to be made."""
    found = tried(own, target)
    causes = {name: (result.outcome, result.cause) for name, result in found.items()}
    assert causes == {
        "link": (Outcome.WARN, "no-links"),
        "legacy": (Outcome.WARN, "alone"),
        "link_flags": (Outcome.SKIP, "no-links"),
        "target": (Outcome.WARN, "alone"),
    }
    assert kernel.standing() == []
    assert not any("OVERRIDE" in line for line in kernel.told)


def test_verify_setup_sees_a_program_above(kernel, own, target, tmp_path) -> None:
    """Then nothing can be attached in a cgroup of our own either."""
    kernel.attach_foreign(str(tmp_path), 0, "SINGLE")
    legacy = tried(own, target)["legacy"]
    assert (legacy.outcome, legacy.cause) == (Outcome.FAIL, "EPERM")
    assert kernel.standing() == [(0, "SINGLE", "foreign")]
