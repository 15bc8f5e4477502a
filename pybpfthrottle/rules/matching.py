"""Which rule a process is for: of those that match it, the most specific one."""

from __future__ import annotations

import fnmatch
import os
import re
from contextlib import suppress
from functools import cached_property
from itertools import takewhile
from typing import Callable, Collection, Iterable, Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle import targets
from pybpfthrottle.errors import CgroupError, ProcessError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import containers, process
from pybpfthrottle.linux.cgroup import Cgroup, Mount
from pybpfthrottle.linux.executable import Executable
from pybpfthrottle.rules.model import Criteria, Rule, is_pattern

# They carry logins. A rule that matches one by accident would slow down the administrator.
_FIRST = 1
_LOGIN_SERVERS = frozenset({"sshd", "sshd-session", "sshd-auth", "dropbear", "mosh-server"})


class Facts:
    """What is known of a process; each fact is read once, when it is asked for."""

    def __init__(self, pid: int, mounted: Optional[Mount] = None) -> None:
        self.pid = pid
        self._mounted = mounted

    @cached_property
    def name(self) -> str:
        """Its name, at most 15 bytes long."""
        return process.name_of(self.pid)

    @cached_property
    def executable(self) -> str:
        """The path of the file that it executes; empty if that may not be known."""
        with suppress(OSError):
            return os.readlink(f"/proc/{self.pid}/exe")
        return ""

    @cached_property
    def command(self) -> str:
        """Its command line, its arguments separated by blanks."""
        with suppress(OSError), open(f"/proc/{self.pid}/cmdline", "rb") as file:
            return os.fsdecode(file.read().rstrip(b"\0").replace(b"\0", b" "))
        return ""

    @cached_property
    def user(self) -> int:
        """Its effective user; -1 if it has ended."""
        return targets.effective_user(self.pid)

    @cached_property
    def cgroup(self) -> Optional[Cgroup]:
        """Its cgroup; None if it has none that is visible."""
        with suppress(ProcessError, CgroupError, OSError):
            return cgroups.from_pid(self.pid, self._mounted)
        return None

    @cached_property
    def path(self) -> str:
        """The path of its cgroup below the mount, such as ``/system.slice/cron.service``."""
        if self.cgroup is None:
            return ""
        return below_mount(self.cgroup, self._mounted)

    @cached_property
    def units(self) -> tuple[str, ...]:
        """The units that it is in: ``user@1000.service/app-x.scope``, and each of these."""
        unit = cgroups.unit_of(self.path)
        return tuple(dict.fromkeys((unit, *unit.split("/")))) if unit else ()

    @cached_property
    def container(self) -> Optional[containers.Container]:
        """The container that it is in."""
        return containers.of_path(self.path)


def below_mount(cgroup: Cgroup, mounted: Optional[Mount] = None) -> str:
    """Return the path of a cgroup below the mount of cgroup v2; ``/`` for the root."""
    top = (mounted or cgroups.mount()).path
    return cgroup.path[len(top.rstrip("/")) :] or "/"


def places(path: str) -> Iterator[str]:
    """Yield a cgroup's path and those above it, the longest first, without the root."""
    while path not in ("", "/"):
        yield path
        path = os.path.dirname(path)


class Matcher:
    """Tells whether processes meet criteria. Raises ProcessError for what cannot be sought."""

    def __init__(self, criteria: Criteria) -> None:
        checks = {
            "name": _names,
            "user": _users,
            "cgroup": _cgroups,
            "slice": _slices,
            "unit": _units,
            "container": _containers,
            "label": _labels,
            "exe": _executables,
            "command": _commands,
            "command_regex": _expressions,
        }
        given = criteria.given()
        # The cheap ones first.
        self._checks = [check(given[kind]) for kind, check in checks.items() if kind in given]

    def matches(self, facts: Facts) -> bool:
        """Whether a process meets all criteria."""
        return all(check(facts) for check in self._checks)


_Check = Callable[[Facts], bool]


def _any_of(values: Iterable[str]) -> Callable[[str], bool]:
    """Return what compares a text with some values, of which some may be patterns."""
    exact, patterns = set(), []
    for one in values:
        if is_pattern(one):
            patterns.append(re.compile(fnmatch.translate(one)))
        else:
            exact.add(one)
    return lambda text: text in exact or any(one.match(text) for one in patterns)


def _names(values: Sequence[str]) -> _Check:
    exact = frozenset(one for one in values if not is_pattern(one))
    pattern = _any_of([one for one in values if is_pattern(one)])
    return lambda facts: targets.has_name(facts.pid, exact, facts.name) or pattern(facts.name)


def _users(values: Sequence[str]) -> _Check:
    def ids() -> Iterator[int]:
        for one in values:
            with suppress(ProcessError):  # there may be such a user on other machines
                yield targets.user_id(one)

    wanted = frozenset(ids())
    return lambda facts: facts.user in wanted


def _cgroups(values: Sequence[str]) -> _Check:
    wanted = _any_of(map(_below_root, values))
    return lambda facts: any(map(wanted, places(facts.path)))


def _below_root(path: str) -> str:
    return "/" + path.strip("/")


def _slices(values: Sequence[str]) -> _Check:
    wanted = _any_of([one if one.endswith(".slice") else f"{one}.slice" for one in values])
    return lambda facts: any(
        wanted(part) for part in facts.path.split("/") if part.endswith(".slice")
    )


def _units(values: Sequence[str]) -> _Check:
    wanted = _any_of([cgroups.unit_name(one) for one in values])
    return lambda facts: any(map(wanted, facts.units))


def _containers(values: Sequence[str]) -> _Check:
    wanted = _any_of(values)

    def check(facts: Facts) -> bool:
        found = facts.container
        if found is None:
            return False
        name = containers.name_of(found, facts.user)
        return any(map(wanted, (name, found.id, found.short_id, f"{found.engine}/{name}")))

    return check


def _labels(values: Sequence[str]) -> _Check:
    wanted = _any_of(values)

    def check(facts: Facts) -> bool:
        found = facts.container
        labels = {} if found is None else containers.labels_of(found, facts.user)
        return any(wanted(f"{name}={value}") for name, value in labels.items())

    return check


def _executables(values: Sequence[str]) -> _Check:
    pattern = _any_of(values)
    files = []
    for one in values:
        with suppress(ProcessError):  # it may be installed later
            files += [] if is_pattern(one) else [Executable(one)]
    return lambda facts: any(one.runs_in(facts.pid) for one in files) or pattern(facts.executable)


def _commands(values: Sequence[str]) -> _Check:
    wanted = _any_of(values)
    return lambda facts: wanted(facts.command)


def _expressions(values: Sequence[str]) -> _Check:
    expressions = [re.compile(one) for one in values]
    return lambda facts: any(one.search(facts.command) for one in expressions)


class Decision(NamedTuple):
    """The rule for a process, and those that match it as well, but are less specific.

    ``spared`` says why the rule does not apply all the same, or is empty.
    """

    rule: Optional[Rule] = None
    others: tuple[Rule, ...] = ()
    spared: str = ""


class Rulebook:
    """Rules in the order in which they decide."""

    def __init__(self, rules: Iterable[Rule], spared: Collection[int] = ()) -> None:
        """Of two that are as specific as each other the first decides.

        ``spared`` are processes that no rule limits: those of this session.
        """
        self.spared = frozenset({_FIRST, os.getpid(), *spared})
        self.rules = sorted(rules, key=lambda one: one.criteria.specificity(), reverse=True)
        self._matchers = [(one, Matcher(one.criteria)) for one in self.rules]
        # What limits_whole_cgroups has found: it is asked for each process.
        self._whole: dict[str, bool] = {}
        # Most rules are for a name or one place: these need not be tried for other processes.
        self._by_name: dict[str, list[int]] = {}
        self._by_unit: dict[str, list[int]] = {}
        self._by_cgroup: dict[str, list[int]] = {}
        self._others = []
        for number, rule in enumerate(self.rules):
            names, units, paths = rule.criteria.name, rule.criteria.unit, rule.criteria.cgroup
            if names and not is_pattern(*names):
                for name in names:
                    self._by_name.setdefault(targets.as_kept(name), []).append(number)
            elif units and not is_pattern(*units):
                for unit in units:
                    self._by_unit.setdefault(cgroups.unit_name(unit), []).append(number)
            elif paths and not is_pattern(*paths):
                for path in paths:
                    self._by_cgroup.setdefault(_below_root(path), []).append(number)
            else:
                self._others.append(number)

    def matching(self, facts: Facts) -> Iterator[Rule]:
        """Yield the rules that match a process, the most specific first."""
        tried = {*self._others, *self._by_name.get(facts.name, ())}
        if self._by_unit:
            tried.update(number for unit in facts.units for number in self._by_unit.get(unit, ()))
        if self._by_cgroup:
            above = places(facts.path)
            tried.update(number for path in above for number in self._by_cgroup.get(path, ()))
        for number in sorted(tried):
            rule, matcher = self._matchers[number]
            if matcher.matches(facts):
                yield rule

    def first(self, facts: Facts) -> Optional[Rule]:
        """Return the rule for a process."""
        rule = next(self.matching(facts), None)
        return None if rule is None or self._spares(rule, facts) else rule

    def decide(self, pid: int, mounted: Optional[Mount] = None) -> Decision:
        """Return the rule for a process, and what else there is to tell."""
        return self.decision(Facts(pid, mounted))

    def decision(self, facts: Facts) -> Decision:
        """Return the rule for a process that facts are known of, and what else there is to tell."""
        found = list(self.matching(facts))
        if not found:
            return Decision()
        return Decision(found[0], tuple(found[1:]), self._spares(found[0], facts))

    def limits_whole_cgroups(self, rule: Rule) -> bool:
        """Whether a rule limits cgroups rather than the processes in them.

        It does where no process in them can be for a more specific rule.
        """
        if rule.name not in self._whole:
            above = takewhile(lambda one: one != rule, self.rules)
            # A login may come into a slice.
            self._whole[rule.name] = (
                rule.criteria.only_places
                and not rule.criteria.slice
                and all(one.criteria.apart_from(rule.criteria) for one in above)
            )
        return self._whole[rule.name]

    def cgroup_of(self, rule: Rule, facts: Facts) -> Optional[Cgroup]:
        """Return the topmost cgroup around a process that a rule for whole cgroups is for."""
        matcher = next(matcher for one, matcher in self._matchers if one is rule)
        found = None
        for path in places(facts.path):
            if not matcher.matches(_Inside(facts, path)):
                break
            found = path
        return None if found is None else Cgroup(cgroups.mount().path + found)

    def _spares(self, rule: Rule, facts: Facts) -> str:
        """Return why a process is not limited by a rule that matches; empty if it is."""
        if facts.pid in self.spared:
            return "no rule limits the first process, pybpfthrottle itself, or who starts it"
        if not rule.insist and facts.name in _LOGIN_SERVERS and not _names_a_server(rule):
            return (
                "it carries logins, which the limit would slow down; insist = true limits it"
                " all the same"
            )
        return ""


class _Inside(Facts):
    """A process as if it were in a cgroup further up."""

    def __init__(self, facts: Facts, path: str) -> None:
        super().__init__(facts.pid)
        self.__dict__.update(path=path, user=facts.user)


def carries_login(cgroup: Cgroup) -> bool:
    """Whether a limit on a whole cgroup would slow down logins."""
    return any(process.name_of(pid) in _LOGIN_SERVERS for pid in cgroup.pids_below())


def _names_a_server(rule: Rule) -> bool:
    return bool(_LOGIN_SERVERS.intersection(rule.criteria.name))
