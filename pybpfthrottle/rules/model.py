"""A rule: which processes it is for, and what they may use. Pure."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Mapping, Optional, Protocol

from pybpfthrottle.model import Limits, Rate
from pybpfthrottle.periods import Span
from pybpfthrottle.quota import Decision, Quota
from pybpfthrottle.rules.schedule import Schedule
from pybpfthrottle.rules.when import Condition, Machine
from pybpfthrottle.shares import Member

if TYPE_CHECKING:
    from pybpfthrottle.conditions.network import Asked

GLOB_CHARACTERS = frozenset("*?[")

# The kinds of criteria, the most specific first: one place, then what a process is.
_EXACT = ("container", "label", "unit", "cgroup", "command", "command_regex", "exe", "name")
# Of those by a pattern, what a process is comes first. Many processes are in a slice.
_BY_PATTERN = ("command", "exe", "name", "container", "label", "unit", "cgroup")
_BROAD = ("slice", "user")
KINDS = (*_EXACT, *_BROAD)
# Those that choose whole cgroups.
PLACES = frozenset({"container", "label", "unit", "cgroup", "slice"})


@dataclass(frozen=True)
class Criteria:
    """What a process has to be: of each kind given it must match one value.

    Values are compared as a whole, or are patterns with ``*``, ``?`` and ``[...]``; those of
    ``command_regex`` are regular expressions that are searched for in the command line. ``label``
    has the labels of containers as NAME=VALUE. ``cgroup`` is a path below the mount of cgroup v2.
    """

    container: tuple[str, ...] = ()
    label: tuple[str, ...] = ()
    unit: tuple[str, ...] = ()
    cgroup: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    command_regex: tuple[str, ...] = ()
    exe: tuple[str, ...] = ()
    name: tuple[str, ...] = ()
    slice: tuple[str, ...] = ()
    user: tuple[str, ...] = ()

    def given(self) -> Mapping[str, tuple[str, ...]]:
        """Return the values of each kind that is given."""
        return self._given

    # Each rule is compared with each: with many this is asked for very often.
    @cached_property
    def _given(self) -> Mapping[str, tuple[str, ...]]:
        return {one.name: values for one in fields(self) if (values := getattr(self, one.name))}

    @cached_property
    def _cgroups(self) -> Optional[tuple[frozenset[str], frozenset[str]]]:
        """The cgroups, and with those that they are in; None if they are not given exactly."""
        if not self.cgroup or is_pattern(*self.cgroup):
            return None
        paths = tuple(one.strip("/") for one in self.cgroup)
        return frozenset(paths), _with_ancestors(paths)

    @cached_property
    def _names(self) -> Mapping[str, frozenset[str]]:
        """Of each kind of which a process has one value: those that are given exactly."""
        return {
            kind: frozenset(values)
            for kind, values in self._given.items()
            # A process may be in several slices, one in another.
            if kind in ("container", "unit", "name") and not is_pattern(*values)
        }

    @property
    def process_names(self) -> frozenset[str]:
        """Names of which each process has one that matches; empty if others may match too.

        A process of an executable has its file's name, unless it is started by another one.
        """
        if not {"name", "exe"}.issuperset(self.given()):
            return frozenset()
        names = self.name or tuple(map(os.path.basename, self.exe))
        return frozenset() if is_pattern(*names) else frozenset(names)

    @property
    def only_places(self) -> bool:
        """Whether it chooses cgroups as a whole, whatever runs there."""
        return PLACES.issuperset(self.given())

    def specificity(self) -> tuple[int, ...]:
        """Return what orders criteria: the greater is the more specific."""
        return tuple(sorted((_rank(*one) for one in self.given().items()), reverse=True))

    def apart_from(self, other: Criteria) -> bool:
        """Whether no process can match both, as two names of units cannot."""
        mine, others = self._cgroups, other._cgroups
        if mine and others and mine[0].isdisjoint(others[1]) and mine[1].isdisjoint(others[0]):
            return True
        names = self._names
        return any(
            kind in names and names[kind].isdisjoint(values)
            for kind, values in other._names.items()
        )

    def __str__(self) -> str:
        return ", ".join(f"{kind} {' or '.join(values)}" for kind, values in self.given().items())


def _with_ancestors(paths: tuple[str, ...]) -> frozenset[str]:
    parts = (one.split("/") for one in paths)
    return frozenset("/".join(names[:count]) for names in parts for count in range(len(names) + 1))


def is_pattern(*values: str) -> bool:
    """Whether one of some values is a pattern."""
    return any(GLOB_CHARACTERS.intersection(value) for value in values)


def _rank(kind: str, values: tuple[str, ...]) -> int:
    """Return how specific the values of one kind are: the greater the more."""
    if kind in _BROAD:
        return len(_BROAD) - _BROAD.index(kind)
    if kind != "command_regex" and is_pattern(*values):
        return len(_BROAD) + len(_BY_PATTERN) - _BY_PATTERN.index(kind)
    return len(_BROAD) + len(_BY_PATTERN) + len(_EXACT) - _EXACT.index(kind)


class Charged(Protocol):
    """Knows what rules have used."""

    def used(self, rule: str, span: Span) -> int:
        """Return how many bytes a rule has passed on some days."""


@dataclass(frozen=True)
class Rule:
    """What is limited by itself. ``where`` tells the file and line, for people.

    ``limits`` has a rate for each direction that is limited. ``each`` gives each process, or
    cgroup, a limit of its own. ``kind``, ``to`` and ``but`` are as in networks.traffic. ``insist``
    allows a limit on a login. With ``schedule`` or ``when`` the rule is not always in force. With a
    ``quota`` other limits apply when it is used up, and both directions are counted. A ``member``
    of a group shares its total; ``limits`` are then the most that it gets. With a ``network``
    that is bad, what is not limited is let through.
    """

    name: str
    criteria: Criteria
    limits: Limits
    each: bool = False
    children: bool = True
    kind: str = "all"
    to: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    loopback: bool = False
    insist: bool = False
    schedule: Optional[Schedule] = None
    when: Optional[Condition] = None
    quota: Optional[Quota] = None
    member: Optional[Member] = None
    network: Optional[Asked] = None
    where: str = field(default="", compare=False)

    @property
    def changes_by_itself(self) -> bool:
        """Whether time or circumstances change it."""
        return not (self.schedule is None and self.when is None and self.quota is None)

    def at(self, now: datetime, machine: Machine) -> Optional[Rule]:
        """Return the rule with the limits of a moment; None if it is not in force then."""
        if self.when is not None and not self.when.holds(machine):
            return None
        if self.schedule is None and self.quota is None:
            return self
        limits = self.limits
        if self.schedule is not None:
            scheduled = self.schedule.at(now)
            if scheduled is None:
                return None
            limits = {**limits, **scheduled}
        decision = self.decision(now.timestamp(), machine)
        if decision is not None:
            return replace(self, limits=decision.limits(limits))
        if self.network is not None:
            return replace(self, limits=limits)
        limited = {one: rate for one, rate in limits.items() if rate is not None}
        return replace(self, limits=limited) if limited else None

    def decision(self, now_s: float, machine: Charged) -> Optional[Decision]:
        """Return how its quota stands; None if it has none."""
        if self.quota is None:
            return None
        return self.quota.decide(lambda span: machine.used(self.name, span), now_s)

    @property
    def waits(self) -> bool:
        """Whether its throttle can wait for processes: the kernel tells them by their names."""
        return bool(self.criteria.process_names) and not self.each and self.network is None

    @property
    def means(self) -> tuple[Any, ...]:
        """What needs another throttle if it changes; a limit alone does not."""
        directions = tuple(sorted(self.limits))
        return (
            *(self.each, self.children, self.kind, self.to, self.but, self.loopback),
            directions,
            # What is only impaired is not shaped.
            self.network and [rate is None for rate in self.limits.values()],
        )

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; limits are in bytes per second."""
        return {
            "name": self.name,
            "match": {kind: list(values) for kind, values in self.criteria.given().items()},
            "limits": limits_to_json(self.limits),
            "each": self.each,
            "children": self.children,
            "traffic": self.kind,
            "to": list(self.to),
            "except": list(self.but),
            "loopback": self.loopback,
            "insist": self.insist,
            "quota": None if self.quota is None else self.quota.to_json(),
            "network": None if self.network is None else str(self.network),
            "share": None if self.member is None else self.member.to_json(),
            "where": self.where,
        }


def limits_to_json(limits: Mapping[Any, Optional[Rate]]) -> dict[str, Optional[int]]:
    """Return limits for JSON, in bytes per second."""
    return {str(one): rate.bytes_per_s if rate else None for one, rate in limits.items()}
