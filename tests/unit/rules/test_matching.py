"""Which rule is for a process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.rules.matching import Facts, Matcher, Rulebook
from pybpfthrottle.rules.model import KINDS, Criteria, Rule

LIMITS = {Direction.UPLOAD: Rate(500_000)}


def rule(called: str = "r", /, **criteria: Any) -> Rule:
    """A rule with some criteria."""
    insist = criteria.pop("insist", False)
    listed = {kind: (one,) if isinstance(one, str) else one for kind, one in criteria.items()}
    return Rule(called, Criteria(**listed), LIMITS, insist=insist)


class Made(Facts):
    """A process that is made up."""

    def __init__(self, **known: Any) -> None:
        super().__init__(known.pop("pid", -1))
        self.__dict__.update(
            {"name": "x", "command": "", "user": 0, "path": "/", "executable": ""} | known
        )


def matches(facts: Facts, **criteria: Any) -> bool:
    """Whether a process meets criteria."""
    return Matcher(rule(**criteria).criteria).matches(facts)


CRON = "/system.slice/cron.service"
DOCKER = "/system.slice/docker-" + "ab" * 32 + ".scope"
APP = "/user.slice/user-1000.slice/user@1000.service/app.slice/app-x.scope"


@pytest.mark.parametrize(
    ("path", "kind", "value", "expected"),
    [
        (CRON, "unit", "cron.service", True),
        (CRON, "unit", "cron", True),
        (CRON, "unit", "cro*", True),
        (CRON, "unit", "ron", False),
        (f"{CRON}/below", "unit", "cron", True),
        (APP, "unit", "app-x.scope", True),
        (APP, "unit", "user@1000.service", True),
        (CRON, "slice", "system.slice", True),
        (CRON, "slice", "system", True),
        (APP, "slice", "user-1000.slice", True),
        (CRON, "slice", "user.slice", False),
        (CRON, "cgroup", CRON, True),
        (CRON, "cgroup", "/system.slice", True),
        (CRON, "cgroup", "system.slice/*", True),
        (CRON, "cgroup", "/system", False),
        ("/", "cgroup", "/*", False),
        (DOCKER, "container", "ab" * 32, True),
        (DOCKER, "container", "abababababab", True),
        (DOCKER, "container", "docker/abab*", True),
        (CRON, "container", "*", False),
        (CRON, "label", "a=b", False),
    ],
)
def test_places(path: str, kind: str, value: str, expected: bool) -> None:
    """Units, slices, cgroups and containers are recognised by the path of the cgroup."""
    assert matches(Made(path=path), **{kind: value}) is expected


@pytest.mark.parametrize(
    ("known", "kind", "value", "expected"),
    [
        ({"command": "rsync -a /x host:/y"}, "command", "rsync * host:*", True),
        ({"command": "rsync -a /x host:/y"}, "command", "rsync", False),
        ({"command": "borg create x"}, "command_regex", "^borg (create|prune)\\b", True),
        ({"command": "borg list"}, "command_regex", "^borg (create|prune)\\b", False),
        ({"name": "python3"}, "name", "python*", True),
        ({"executable": "/opt/a/bin/x"}, "exe", "/opt/*/bin/x", True),
        ({"executable": "/opt/a/bin/x"}, "exe", "/opt/b/bin/x", False),
        ({"user": 0}, "user", "root", True),
        ({"user": 7}, "user", ("root", "7"), True),
        ({"user": 7}, "user", "no-such-user", False),
    ],
)
def test_what_a_process_is(known: dict[str, Any], kind: str, value: Any, expected: bool) -> None:
    """Names, executables and command lines are compared as a whole, or by a pattern."""
    assert matches(Made(**known), **{kind: value}) is expected


def test_all_kinds_have_to_match() -> None:
    """Of each kind one value suffices."""
    facts = Made(user=0, path=CRON)
    assert matches(facts, user=("root", "bin"), unit=("x", "cron"))
    assert not matches(facts, user="bin", unit="cron")


def test_a_process_of_this_machine_has_its_facts() -> None:
    """Name, executable, command line and user are read from /proc."""
    code = "import time; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, "ü\udcff"], stdout=subprocess.PIPE) as own:
        try:
            assert own.stdout
            own.stdout.readline()
            facts = Facts(own.pid)
            assert facts.executable == os.path.realpath(sys.executable)
            assert facts.command.endswith("ü\udcff")
            assert facts.user == os.geteuid()
            assert matches(facts, exe=os.path.realpath(sys.executable), command="* -c *")
        finally:
            own.kill()


def test_what_has_ended_matches_nothing_and_raises_nothing() -> None:
    """A process may end while it is looked at."""
    facts = Facts(1 << 22)
    for kind in KINDS:
        value = {"exe": "/bin/true", "label": "a=b", "command": "x"}.get(kind, "root")
        assert not matches(facts, **{kind: value})


# The more specific one comes first.
ORDER = [
    {"container": "web", "user": "root"},
    {"container": "web"},
    {"unit": "cron", "name": "x"},
    {"unit": "cron"},
    {"cgroup": "/a"},
    {"command": "x y"},
    {"command_regex": "x"},
    {"exe": "/bin/x", "user": "root"},
    {"exe": "/bin/x"},
    {"name": "x"},
    {"command": "x *"},
    {"name": "x*"},
    {"container": "w*"},
    {"unit": "c*"},
    {"cgroup": "/a/*"},
    {"slice": "a"},
    {"user": "root"},
]


def test_the_most_specific_rule_comes_first() -> None:
    """One place, then what a process is, then patterns, then where many are."""
    rules = [rule(str(number), **criteria) for number, criteria in enumerate(ORDER)]
    found = [one.name for one in Rulebook(reversed(rules)).rules]
    assert found == [one.name for one in rules]


def test_of_two_alike_the_first_decides() -> None:
    """As they are written."""
    book = Rulebook([rule("a", name="x*"), rule("b", name="*y")])
    assert book.decide(os.getpid()).rule is None
    facts = Made(name="xy")
    assert book.first(facts) is book.rules[0]
    assert book.rules[0].name == "a"


@given(st.permutations(ORDER))
def test_the_order_of_files_does_not_decide_between_unlike_rules(order: Any) -> None:
    """Only how specific they are."""
    found = Rulebook(rule(str(one), **one) for one in order).rules
    assert [one.criteria.specificity() for one in found] == sorted(
        (rule(**one).criteria.specificity() for one in ORDER), reverse=True
    )


@pytest.mark.parametrize(
    ("criteria", "names"),
    [
        ({"name": ("curl", "wget")}, {"curl", "wget"}),
        ({"exe": "/usr/bin/rsync"}, {"rsync"}),
        ({"name": "curl", "exe": "/opt/any"}, {"curl"}),
        ({"name": ("curl", "w*")}, set()),
        ({"exe": "/usr/bin/*"}, set()),
        ({"name": "curl", "user": "backup"}, set()),
        ({"cgroup": "/system.slice"}, set()),
    ],
)
def test_names_stand_for_a_rule_only_where_all_its_processes_have_one(
    criteria: Any, names: set[str]
) -> None:
    """A process of such a name may be limited before anybody looks at it."""
    assert rule(**criteria).criteria.process_names == names


def test_logins_are_spared() -> None:
    """A rule that does not name the server of logins does not limit it, unless it insists."""
    sshd = Made(name="sshd", user=0, pid=12345678)
    assert Rulebook([rule(user="root")]).first(sshd) is None
    assert Rulebook([rule(user="root", insist=True)]).first(sshd) is not None


def test_who_starts_the_limits_is_spared() -> None:
    """Neither this process, nor the first one, nor those of this session are limited."""
    book = Rulebook([rule(user=str(os.geteuid()))], spared=[12345678])
    assert book.first(Facts(os.getpid())) is None
    assert book.first(Made(pid=1, user=os.geteuid())) is None
    assert book.first(Made(pid=12345678, user=os.geteuid())) is None
    assert "no rule limits" in book.decide(os.getpid()).spared


def test_whole_cgroups_are_limited_where_no_other_rule_is_for_a_part() -> None:
    """Otherwise the processes in them are, one by one."""
    cron, other = rule("cron", unit="cron"), rule("other", unit="at")
    assert Rulebook([cron, other]).limits_whole_cgroups(cron)
    assert Rulebook([cron, rule("x", name="y")]).limits_whole_cgroups(cron)
    assert not Rulebook([cron, rule("x", unit="cron", name="y")]).limits_whole_cgroups(cron)
    assert not Rulebook([cron, rule("x", container="y")]).limits_whole_cgroups(cron)
    pattern = rule("all", unit="c*")
    assert Rulebook([pattern]).limits_whole_cgroups(pattern)
    assert not Rulebook([pattern, cron]).limits_whole_cgroups(pattern)
    named = rule("named", name="x")
    assert not Rulebook([named]).limits_whole_cgroups(named)


def test_a_slice_is_never_limited_as_a_whole() -> None:
    """A login may begin in it."""
    users = rule("users", slice="user.slice")
    assert not Rulebook([users]).limits_whole_cgroups(users)


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("/a/b", "/a/c", True),
        ("/a/b", ["/a/bc", "x"], True),
        ("/a/b", "a/b/", False),
        ("/a", "/a/b", False),
        (["/x", "/a/b/c"], "/a", False),
        ("/", "/a", False),
        ("/a/b", "/c*", False),
    ],
)
def test_rules_for_other_cgroups_leave_them_whole(one, other, apart):
    """Unless one is within the other, or where a pattern does not say where it ends."""
    rules = [rule("one", cgroup=one), rule("other", cgroup=other)]
    last = Rulebook(rules).rules[1]
    assert Rulebook(rules).limits_whole_cgroups(last) is apart
    assert rules[0].criteria.apart_from(rules[1].criteria) is apart
    assert rules[1].criteria.apart_from(rules[0].criteria) is apart
