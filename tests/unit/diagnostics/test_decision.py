"""The decision tree: each cause leads to its conclusion, and every conclusion can be reached."""

from __future__ import annotations

import pytest

from pybpfthrottle.diagnostics import decision
from pybpfthrottle.diagnostics.check import Outcome, Result
from pybpfthrottle.diagnostics.examine import CHECKS

PASS, WARN, FAIL, SKIP = Outcome.PASS, Outcome.WARN, Outcome.FAIL, Outcome.SKIP
ALONE = ("trial.target", WARN, "alone")
COMMANDS = ("rights.commands", FAIL, "some")

# What the checks gave that did not pass without a word, and the conclusion.
TABLE = [
    ([], "works"),
    ([("kernel.config", SKIP, "")], "works"),
    ([("kernel.config", FAIL, "config")], "works"),
    ([("rights.seccomp", WARN, "seccomp")], "works"),
    ([("rights.user_namespace", WARN, "user-namespace")], "works"),
    ([("trial.target", WARN, "legacy")], "works-by-legacy"),
    (
        [("trial.link", WARN, "no-links"), ("trial.legacy", WARN, "alone"), ALONE],
        "works-in-own-cgroups",
    ),
    (
        [
            ("trial.link", WARN, "no-links"),
            ("cgroup.target", SKIP, ""),
            ("trial.legacy", WARN, "alone"),
        ],
        "works-in-own-cgroups",
    ),
    (
        [("cgroup.scratch", FAIL, "no-scratch"), ("trial.upload", SKIP, "needs"), ALONE],
        "one-program-alone",
    ),
    ([("trial.legacy", FAIL, "EPERM"), ("trial.upload", WARN, ""), ALONE], "one-program-alone"),
    ([("cgroup.scratch", FAIL, "no-scratch"), ("trial.upload", SKIP, "needs")], "works-unproved"),
    ([("trial.download", SKIP, "no-lo")], "works-unproved"),
    ([("cgroup.target", SKIP, ""), ("trial.target", SKIP, "needs")], "works"),
    (
        [("cgroup.target", SKIP, ""), ("trial.link", WARN, "no-links")],
        "works-by-legacy",
    ),
    (
        [("cgroup.scratch", FAIL, "no-own-cgroup"), ("trial.upload", SKIP, "needs")],
        "no-own-cgroup",
    ),
    ([("kernel.proc", FAIL, "no-proc")], "no-proc"),
    ([("python", FAIL, "no-syscall")], "python-without-ctypes"),
    ([("python", FAIL, "no-pyelftools")], "pyelftools-missing"),
    ([("settings", FAIL, "")], "settings"),
    ([("kernel.bpf", FAIL, "enosys"), ("kernel.config", FAIL, "config")], "kernel-without-bpf"),
    ([("kernel.bpf", FAIL, "enosys"), ("kernel.config", SKIP, "")], "kernel-without-bpf"),
    ([("kernel.bpf", FAIL, "enosys")], "bpf-refused"),
    (
        [
            ("kernel.bpf", FAIL, "enosys"),
            ("kernel.config", SKIP, ""),
            ("rights.seccomp", WARN, "seccomp"),
        ],
        "bpf-refused",
    ),
    ([("rights.capabilities", FAIL, "capabilities")], "not-privileged"),
    ([("rights.capabilities", WARN, "net-admin")], "works"),
    (
        [("rights.capabilities", WARN, "net-admin"), ("trial.target", FAIL, "EPERM")],
        "not-privileged",
    ),
    ([("rights.commands", FAIL, "all")], "bpf-refused"),
    ([COMMANDS], "commands-refused"),
    ([COMMANDS, ("rights.user_namespace", WARN, "user-namespace")], "user-namespace"),
    ([COMMANDS, ("kernel.lockdown", WARN, "lockdown")], "lockdown"),
    ([("cgroup.v2", FAIL, "v1-only")], "cgroup-v1-only"),
    ([("cgroup.v2", FAIL, "no-cgroup2")], "no-cgroup2"),
    ([("cgroup.target", FAIL, "target-gone")], "target-gone"),
    ([("cgroup.target", FAIL, "target-wrong")], "target-wrong"),
    ([("trial.target", FAIL, "target-gone")], "target-gone"),
    ([("trial.load", FAIL, "memlock")], "memlock"),
    (
        [("trial.load", FAIL, "EINVAL"), ("kernel.config", FAIL, "config")],
        "kernel-without-cgroup-bpf",
    ),
    ([("trial.load", FAIL, "EINVAL")], "kernel-refuses-program"),
    (
        [("trial.target", FAIL, "EPERM"), ("attached.programs", FAIL, "exclusive")],
        "exclusive-program",
    ),
    ([("trial.target", FAIL, "overridable")], "overridable-program"),
    (
        [("trial.target", FAIL, "E2BIG"), ("attached.programs", FAIL, "too-many")],
        "too-many-programs",
    ),
    ([("trial.target", FAIL, "links-refused")], "links-refused"),
    ([("trial.target", FAIL, "EINVAL")], "user-cgroup"),
    (
        [
            ("trial.target", FAIL, "EINVAL"),
            ("trial.link", FAIL, "EINVAL"),
            ("trial.legacy", FAIL, "EINVAL"),
            ("trial.root", SKIP, "not-asked"),
        ],
        "kernel-refuses-attachment",
    ),
    ([("objects", FAIL, "missing")], "objects-missing"),
    ([("objects", FAIL, "truncated")], "objects-damaged"),
    ([("objects", FAIL, "sections")], "objects-old-sections"),
    ([("objects", FAIL, "stale")], "objects-stale"),
    ([("trial.objects", FAIL, "verifier")], "objects-rejected"),
    ([("trial.objects", FAIL, "loader")], "loader"),
    ([("trial.upload", FAIL, "never-ran")], "packets-not-seen"),
    ([("trial.download", FAIL, "not-dropped")], "limit-without-effect"),
]


def conclude(overrides: list[tuple[str, Outcome, str]]) -> decision.Conclusion:
    """Where the tree ends if all other checks passed."""
    results = {check.id: Result(PASS, "") for check in CHECKS}
    for check_id, outcome, cause in overrides:
        assert check_id in results
        results[check_id] = Result(outcome, "", cause=cause)
    return decision.walk(results, decision.TREE)[1]


@pytest.mark.parametrize(("overrides", "expected"), TABLE)
def test_each_cause_has_its_conclusion(overrides, expected: str) -> None:
    """The table of causes and conclusions."""
    assert conclude(overrides).id == expected


def test_the_table_has_every_conclusion() -> None:
    """None is out of reach, and none is untested."""
    known = {conclusion.id for conclusion in decision.conclusions(decision.TREE)}
    assert known == {expected for _, expected in TABLE}


def test_ids_are_unique() -> None:
    """Neither two checks nor two conclusions have the same id."""
    ids = [check.id for check in CHECKS]
    assert len(ids) == len(set(ids))
    found = set(decision.conclusions(decision.TREE))
    assert len({conclusion.id for conclusion in found}) == len(found)


def test_what_a_check_needs_stands_before_it() -> None:
    """The order of the checks is one that they can be run in."""
    seen: set[str] = set()
    for check in CHECKS:
        assert set(check.needs) <= seen
        seen.add(check.id)


def test_reasons_are_checks() -> None:
    """What a conclusion refers to exists."""
    ids = {check.id for check in CHECKS}
    for conclusion in decision.conclusions(decision.TREE):
        assert set(conclusion.because) <= ids


def test_who_does_not_work_has_a_remedy() -> None:
    """A conclusion that something is wrong says what to do; each has symptoms."""
    for conclusion in decision.conclusions(decision.TREE):
        assert conclusion.symptoms
        assert conclusion.works or (conclusion.cause and conclusion.remedy)
