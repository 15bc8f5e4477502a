"""The groups that rules share totals in: as a file describes them, and in force."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Iterable, Sequence

from pybpfthrottle.errors import ShareError
from pybpfthrottle.fleet.group import FleetGroup
from pybpfthrottle.model import Limits
from pybpfthrottle.rules.model import Rule
from pybpfthrottle.shares import GroupSpec, Member, check
from pybpfthrottle.sharing import Group, Now
from pybpfthrottle.supervisor import Chore
from pybpfthrottle.throttle import Throttle


@dataclass(frozen=True)
class GroupRule:
    """A group of a rules file. ``where`` tells the file and line, for people.

    With ``shared``, the address of a Redis, all machines with the same group share its total, and
    ``machines`` are as many as there are at least.
    """

    spec: GroupSpec
    shared: str = ""
    machines: int = 1
    where: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON, without the address, which may have a password."""
        return {**self.spec.to_json(), "shared": bool(self.shared), "where": self.where}


def mistakes(groups: Sequence[GroupRule], rules: Sequence[Rule]) -> list[str]:
    """Return what cannot be, a line each: unknown groups, floors above their total, ..."""
    specs = [one.spec for one in groups]
    members = [(f"rule {rule.name}", rule.member, rule.where) for rule in rules if rule.member]
    tried: list[tuple[str, Sequence[tuple[str, Member]]]] = [(_first_place(groups), ())]
    tried += [(where, [(who, member)]) for who, member, where in members]
    tried.append((_first_place(groups), [(who, member) for who, member, _ in members]))
    for where, seats in tried:
        try:
            check(specs, seats)
        except ShareError as error:
            return [f"{where}: {error}"]
    return []


def _first_place(groups: Sequence[GroupRule]) -> str:
    return groups[0].where if groups else ""


def seated(rule: Rule, groups: Sequence[GroupRule]) -> Rule:
    """Return a rule with the limits that its throttle begins with in its group."""
    if rule.member is None:
        return rule
    (group,) = [one for one in _made(groups) if _has(one, rule.member.group)]
    limits: Limits = {**rule.limits, **group.limits(rule.member)}
    return replace(rule, limits=limits)


def _made(groups: Sequence[GroupRule]) -> list[Group]:
    """Return the groups that are in no other one, each with those within it."""
    specs = [one.spec for one in groups]
    return [
        Group(spec, [one for one in specs if one.within and one.within.group == spec.name])
        for spec in specs
        if spec.within is None
    ]


def _has(group: Group, name: str) -> bool:
    return name in (group.spec.name, *(one.name for one in group.inner))


class Groups:
    """The groups in force. ``close`` ends what they agree on with other machines."""

    def __init__(self, groups: Sequence[GroupRule] = ()) -> None:
        self.rules = tuple(groups)
        self._groups = _made(groups)
        shared = {one.spec.name: one for one in groups if one.shared}
        self._fleets = [
            FleetGroup(
                *(group, shared[name].shared, name, group.spec.totals),
                machines=shared[name].machines,
            )
            for group in self._groups
            for name in [group.spec.name]
            if name in shared
        ]
        self._resources = ExitStack()

    def start(self) -> None:
        """Begin to agree with other machines, where totals are shared."""
        for one in self._fleets:
            self._resources.enter_context(one)

    def join(self, rule: Rule, throttle: Throttle) -> None:
        """Have a rule's throttle share. Raises ShareError or ThrottleError."""
        for group in self._groups:
            if rule.member and _has(group, rule.member.group) and throttle not in group:
                group.add(throttle, rule.member, f"rule {rule.name}")

    def leave(self, throttle: Throttle) -> None:
        """Have a throttle share no longer; its own limit is in force again."""
        for group in self._groups:
            if throttle in group:
                group.discard(throttle)

    def chores(self) -> Iterable[Chore]:
        """Return what has to be done while throttles share."""
        return [*self._groups, *(chore for one in self._fleets for chore in one.chores())]

    def notes(self) -> list[str]:
        """Return why nothing can be agreed on with other machines."""
        return [note for one in self._fleets for note in one.notes()]

    def state(self) -> list[Now]:
        """Return what each member has at the moment."""
        return [now for group in self._groups for now in group.state()]

    def close(self) -> None:
        """Agree with nobody any more."""
        self._resources.close()
