"""What it takes to make the machine match rules: computed, and not done."""

from __future__ import annotations

from typing import Any, Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle.inforce import InForce
from pybpfthrottle.linux import process
from pybpfthrottle.model import Direction, Limits, Rate
from pybpfthrottle.rules.keeper import Survey, Wanted, by_rules, in_force_now
from pybpfthrottle.rules.matching import Decision, Facts, Rulebook
from pybpfthrottle.rules.model import Rule, limits_to_json
from pybpfthrottle.rules.quotas import used
from pybpfthrottle.rules.when import ThisMachine

_SIGNS = {"new": "+", "changed": "~", "removed": "-", "same": "="}


class Change(NamedTuple):
    """What becomes of one throttle: ``kind`` is new, changed, removed or same."""

    kind: str
    rule: str
    what: str
    before: Optional[Limits] = None
    after: Optional[Limits] = None

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; limits are in bytes per second."""
        limits = {"before": self.before, "after": self.after}
        told = {
            name: None if found is None else limits_to_json(found) for name, found in limits.items()
        }
        return {"change": self.kind, "rule": self.rule, "what": self.what, **told}

    def __str__(self) -> str:
        limits = _words(self.after if self.before is None else self.before)
        if self.kind == "changed" and self.after is not None:
            limits += f" -> {_words(self.after)}"
        return f"{_SIGNS[self.kind]} {self.rule}: {self.what}: {limits}"


class Precedence(NamedTuple):
    """Two rules that match the same processes, and which one is for them."""

    rule: str
    other: str
    pids: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.rule} goes before {self.other}, which is less specific, for"
            f" {process.listed(self.pids, most=3)}"
        )


class Changes(NamedTuple):
    """All that it takes, and which rule was chosen where several match."""

    changes: tuple[Change, ...]
    precedences: tuple[Precedence, ...]
    spared: tuple[str, ...]

    @property
    def pending(self) -> list[Change]:
        """What is not the same."""
        return [one for one in self.changes if one.kind != "same"]


def find(rules: Sequence[Rule], spared: Sequence[int]) -> Changes:
    """Return what it takes to put rules in force now. Raises OSError."""
    rules = in_force_now(rules, ThisMachine(used=used))
    book = Rulebook(rules, spared)
    survey = _Telling(book)
    families = process.families()
    survey.look(process.running())
    survey.inherit(families)
    wanted = list(survey.wanted(families))
    left = by_rules()
    changes = []
    for one in wanted:
        found = next((known for known in left if _is_for(one, known)), None)
        if found is not None:
            left.remove(found)
        changes.append(_change(one, found))
    for each in left:
        changes += _without_processes(each, rules)
    precedences, spared_ones = survey.told()
    return Changes(tuple(changes), precedences, (*spared_ones, *survey.notes))


class _Telling(Survey):
    """What the rules want, and how that was decided."""

    def __init__(self, book: Rulebook) -> None:
        super().__init__(book)
        self._reasons: dict[int, tuple[Rule, Decision]] = {}

    def rule_for(self, facts: Facts) -> Optional[Rule]:
        """Return the rule for a process."""
        decision = self.book.decision(facts)
        if decision.rule is not None:
            self._reasons[facts.pid] = (decision.rule, decision)
        return None if decision.spared else decision.rule

    def told(self) -> tuple[tuple[Precedence, ...], tuple[str, ...]]:
        """Return which rules go before which, and which processes are spared."""
        pairs: dict[tuple[str, str], list[int]] = {}
        spared: dict[str, None] = {}
        for pid, (rule, decision) in self._reasons.items():
            for other in decision.others:
                pairs.setdefault((rule.name, other.name), []).append(pid)
            if decision.spared and pid not in self.book.spared:
                spared[
                    f"{process.listed([pid])} is not limited by {rule.name}: {decision.spared}"
                ] = None
        found = tuple(Precedence(*names, tuple(those)) for names, those in pairs.items())
        return found, tuple(spared)


def _is_for(wanted: Wanted, found: InForce) -> bool:
    target = found.record.spec.target
    return (
        target.rule == wanted.rule.name
        and bool(target.cgroups) == bool(wanted.cgroups)
        and (not wanted.rule.each or target.pids == wanted.target.pids)
        and (not wanted.rule.each or target.cgroups == wanted.target.cgroups)
    )


def _without_processes(found: InForce, rules: Sequence[Rule]) -> list[Change]:
    """Return what becomes of a throttle that limits nothing which its rule matches now."""
    target = found.record.spec.target
    rule = next((one for one in rules if one.name == target.rule and not one.each), None)
    before = _limits(found)
    if rule is not None and target.by_rule:
        if before == dict(rule.limits):
            return []  # it waits
        if rule.waits:
            return [Change("changed", rule.name, "no process yet", before, rule.limits)]
    return [Change("removed", target.rule, found.target, before=found.limits)]


def _change(wanted: Wanted, found: Optional[InForce]) -> Change:
    rule = wanted.rule
    what = ", ".join(one.path for one in wanted.cgroups) or process.listed(wanted.pids)
    if found is None:
        return Change("new", rule.name, what, after=rule.limits)
    before = _limits(found)
    kind = "same" if before == dict(rule.limits) else "changed"
    return Change(kind, rule.name, what, before, rule.limits)


def _limits(found: InForce) -> dict[Direction, Optional[Rate]]:
    """Return the limits of a throttle, those that are paused included."""
    return {**found.limits, **found.paused}


def _words(limits: Optional[Limits]) -> str:
    return ", ".join(f"{one} {rate or 'unlimited'}" for one, rate in sorted((limits or {}).items()))


def lines(changes: Changes) -> Iterator[str]:
    """Yield it for people."""
    yield from map(str, changes.pending)
    same = len(changes.changes) - len(changes.pending)
    if same:
        yield f"= {same} of the throttles are as they are to be"
    yield from (f"  {one}" for one in changes.precedences)
    yield from (f"  {one}" for one in changes.spared)
