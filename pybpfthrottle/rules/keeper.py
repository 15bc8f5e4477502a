"""Keeps the machine as rules say: takes in processes as they come, and lets them go."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter, deque
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from typing import (
    TYPE_CHECKING,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Optional,
    Sequence,
)

from pybpfthrottle import networks, registry
from pybpfthrottle.backends.ebpf.options import Options
from pybpfthrottle.backends.protocol import Executions, Record
from pybpfthrottle.backends.protocol import get as get_backend
from pybpfthrottle.errors import Error, ThrottleError
from pybpfthrottle.inforce import InForce, in_force
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup, Mount
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Target, ThrottleSpec, Traffic
from pybpfthrottle.plan import Wish
from pybpfthrottle.quota import Decision
from pybpfthrottle.rules.groups import GroupRule, Groups
from pybpfthrottle.rules.matching import Facts, Rulebook, carries_login
from pybpfthrottle.rules.model import Rule
from pybpfthrottle.rules.quotas import Quotas
from pybpfthrottle.rules.when import Machine, ThisMachine
from pybpfthrottle.sharing import Now
from pybpfthrottle.supervisor import Budget, Chore, Frequent, Look
from pybpfthrottle.targets import as_kept
from pybpfthrottle.throttle import Throttle, start, take_over

if TYPE_CHECKING:
    from pybpfthrottle.conditions.network import Asked, Network

log = Logger(__name__)

_TICK_S = 1.0
# Looking at all throttles takes at most this fraction of one CPU's time.
_MOST_TICKING = 0.001
# And so does looking at all processes: more if new ones are found by nothing else.
_MOST_LOOKING, _MOST_WITHOUT_WORD = 0.002, 0.005
_LEAST_PAUSE_S = 5.0
# Without word of executions, new processes are found by looking.
_PAUSE_WITHOUT_WORD_S = 1.0
# How long a throttle outlives the last process of its rule: the next one may be about to start.
_IDLE_S = 10.0
# A throttle that is there limits the next process of its names from its first packet on.
_IDLE_WITH_NAMES_S = 600.0
# How many throttles wait for the first process of their rules, and how many kinds of traffic these
# have: each has programs of its own at the root, where the kernel attaches 64 at most.
_MOST_WAITING, _MOST_KINDS_WAITING = 200, 8
_OTHERS_LAST_S = 2.0
# How long others have to wait at most while many throttles begin.
_LONGEST_LOCK_S = 0.5

# A process, a cgroup's path, or empty for all of a rule together.
Key = str


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What one throttle of a rule is to limit now: processes, or whole cgroups."""

    rule: Rule
    key: Key
    pids: tuple[int, ...] = ()
    cgroups: tuple[Cgroup, ...] = ()

    @property
    def is_for_later(self) -> bool:
        """Whether nothing is to be limited yet."""
        return not self.pids and not self.cgroups

    @property
    def target(self) -> Target:
        """The target of its throttle."""
        pids = self.pids if self.rule.each and not self.cgroups else ()
        return Target(
            pids=pids,
            cgroups=tuple(one.path for one in self.cgroups),
            children=self.rule.children,
            rule=self.rule.name,
        )


class Survey:
    """What the rules want of the processes that run now."""

    def __init__(
        self, book: Rulebook, spared: Collection[int] = (), mounted: Optional[Mount] = None
    ) -> None:
        """``spared`` are processes that others limit; ``mounted`` tells where cgroup v2 is."""
        self.book = book
        self._spared = spared
        self.mounted = mounted or cgroups.mount()
        # The rule of each process, and of those that are limited one by one.
        self.decided: dict[int, Rule] = {}
        self._single: dict[int, Rule] = {}
        self._cgroups: dict[str, dict[Cgroup, None]] = {}
        # What is not limited, a line each.
        self.notes: dict[str, None] = {}

    def look(self, pids: Iterable[int]) -> None:
        """Find the rule of each of some processes."""
        for pid in pids:
            if pid not in self._spared and not process.is_kernel_thread(pid):
                facts = Facts(pid, self.mounted)
                rule = self.rule_for(facts)
                if rule is not None:
                    self._note(rule, facts)

    def rule_for(self, facts: Facts) -> Optional[Rule]:
        """Return the rule for a process."""
        return self.book.first(facts)

    def inherit(self, families: Mapping[int, Sequence[int]]) -> None:
        """Give processes without a rule that of the one that has started them."""
        pending = [pid for pid, rule in self._single.items() if rule.children]
        while pending:
            pid = pending.pop()
            for child in families.get(pid, ()):
                if child not in self.decided and child not in self._spared:
                    self.decided[child] = self._single[child] = self._single[pid]
                    pending.append(child)

    def wanted(self, families: Mapping[int, Sequence[int]]) -> Iterator[Wanted]:
        """Yield what each throttle is to limit."""
        parents = {child: pid for pid, children in families.items() for child in children}
        pids: dict[tuple[str, Key], list[int]] = {}
        rules = {rule.name: rule for rule in self.book.rules}
        for pid, rule in self._single.items():
            key = str(self._first(pid, rule, parents)) if rule.each else ""
            pids.setdefault((rule.name, key), []).append(pid)
        for (name, key), found in pids.items():
            chosen = [int(key)] if key else sorted(found)
            yield Wanted(rules[name], key, pids=tuple(chosen))
        for name, chosen_cgroups in self._cgroups.items():
            rule = rules[name]
            together = tuple(sorted(chosen_cgroups, key=lambda one: one.path))
            if not rule.each:
                yield Wanted(rule, "", cgroups=together)
                continue
            for one in together:
                yield Wanted(rule, one.path, cgroups=(one,))

    def _note(self, rule: Rule, facts: Facts) -> None:
        self.decided[facts.pid] = rule
        if self.book.limits_whole_cgroups(rule):
            cgroup = self.book.cgroup_of(rule, facts)
            if cgroup is not None and not rule.insist and carries_login(cgroup):
                self.notes[
                    f"{cgroup.path} is not limited by {rule.name}: logins are served there, which"
                    " the limit would slow down; insist = true limits it all the same"
                ] = None
            elif cgroup is not None:
                self._cgroups.setdefault(rule.name, {})[cgroup] = None
        else:
            self._single[facts.pid] = rule

    def _first(self, pid: int, rule: Rule, parents: Mapping[int, int]) -> int:
        """Return the process whose limit this one shares."""
        while rule.children and self._single.get(parents.get(pid, 0)) is rule:
            pid = parents[pid]
        return pid


class Held:
    """A throttle of a rule that is in force."""

    def __init__(self, wanted: Wanted, throttle: Throttle) -> None:
        self.wanted = wanted
        self.throttle = throttle
        self.network = _network(wanted.rule, throttle)
        self.idle_since_s = math.inf
        # Processes that begin to have one of them are limited before a rule decides.
        by_rule = wanted.target.by_rule
        self._expected = wanted.rule.criteria.process_names if by_rule else frozenset()
        self.names = frozenset(map(as_kept, self._expected))

    def refresh(self, wanted: Wanted) -> bool:
        """Have it limit what is wanted now; return False if that takes another throttle."""
        before = self.wanted
        if wanted.rule.means != before.rule.means or bool(wanted.cgroups) != bool(before.cgroups):
            return False
        if wanted.cgroups and not self._add(wanted.cgroups):
            return False
        limited = set(self.throttle.processes()) - self.throttle.by_name(wanted.pids)
        new = set(wanted.pids) - limited if not wanted.target.pids else ()
        if new:
            self.throttle.follow(sorted(new))
        for direction, rate in wanted.rule.limits.items():
            if rate != before.rule.limits[direction]:
                self.throttle.set_limit(direction, rate)
        if self.network is not None and wanted.rule.network is not None:
            asked = _asked(wanted.rule, wanted.rule.network)
            if asked != self.network.asked:
                self.network.change(asked)
        self.wanted = wanted
        return True

    def expect(self) -> bool:
        """Have the kernel limit processes that begin to have its names; return if it does."""
        return bool(self._expected) and self.throttle.expect(sorted(self._expected))

    def chores(self) -> list[Chore]:
        """Return what has to be done for it."""
        own = [] if self.network is None else self.network.own_chores()
        return [*self.throttle.chores(), *own]

    def remove(self) -> None:
        """Remove the throttle, and end the network."""
        with ExitStack() as stack:
            stack.callback(self.throttle.remove)
            if self.network is not None:
                stack.callback(self.network.close)

    def _add(self, cgroups: Sequence[Cgroup]) -> bool:
        """Limit more cgroups; return False if some that are there are wanted no longer."""
        if any(
            one.exists() and one.populated() for one in self.throttle.cgroups if one not in cgroups
        ):
            return False
        for one in cgroups:
            if not self.throttle.is_on(one):
                self.throttle.add(one)
        return True


class Keeper(Frequent):
    """The rules in force. ``chores`` keep them so; ``remove`` ends all.

    As a chore it limits processes that have begun to match.
    """

    def __init__(
        self,
        wish: Wish,
        say: Callable[[str], None],
        spared: Collection[int] = (),
        machine: Optional[Machine] = None,
        quotas: Optional[Quotas] = None,
        *,
        in_advance: bool = False,
    ) -> None:
        """``say`` gets a line for people; ``spared`` are processes that no rule limits.

        With ``in_advance`` throttles whose processes the kernel tells by their names are there
        before the first process.
        """
        self._wish = wish
        self._say = say
        self._spared = spared
        # As they are written, and those of them that are in force now.
        self._rules: Sequence[Rule] = ()
        self._now: Sequence[Rule] = ()
        self._quotas = quotas or Quotas()
        self._groups = Groups()
        self._machine = machine or ThisMachine(used=self._quotas.used)
        self._book = Rulebook((), spared)
        self._mounted: Optional[Mount] = None
        self.held: dict[tuple[str, Key], Held] = {}
        self._executions: Optional[Executions] = None
        self._said: set[str] = set()
        self._in_advance = in_advance
        # Rules whose throttles wait for processes, and how many share their programs.
        self._waiting: Mapping[str, int] = {}
        # Whether throttles have come, gone or changed since somebody asked.
        self._has_changed = False
        self._look_s = math.inf
        self._others: tuple[float, frozenset[int]] = (-math.inf, frozenset())
        self._budget = Budget(_MOST_WITHOUT_WORD)
        self._ticking = Look(_TICK_S, self._tick, Budget(_MOST_TICKING))

    def begin(self, rules: Sequence[Rule], groups: Sequence[GroupRule] = ()) -> None:
        """Put rules in force, and take over what a killed process has left of them."""
        self._listen()
        self._rules = rules
        self._regroup(groups)
        self._open_book()
        self._pick_up()
        self.look()

    def change(self, rules: Sequence[Rule], groups: Sequence[GroupRule] = ()) -> None:
        """Put other rules in force in place of these."""
        self._rules = rules
        if tuple(groups) != self._groups.rules:
            self._regroup(groups)
        self._follow_rules()

    def _regroup(self, groups: Sequence[GroupRule]) -> None:
        """Have throttles share in other groups; ``look`` has them join."""
        for held in self.held.values():
            self._groups.leave(held.throttle)
        self._groups.close()
        self._groups = Groups(groups)
        self._groups.start()

    def _follow_rules(self) -> None:
        """Put the rules in force that are to be now."""
        self._open_book()
        known = {rule.name: rule for rule in self._book.rules}
        for (name, key), held in list(self.held.items()):
            rule = known.get(name)
            if rule is None or rule.criteria != held.wanted.rule.criteria:
                self._end(name, key)
        self.look()

    def _open_book(self) -> None:
        """Have the rules decide that are in force now."""
        self._now = self._in_force()
        self._book = Rulebook(self._now, self._spared)
        self._waiting = _that_wait(self._book.rules) if self._in_advance else {}

    def _in_force(self) -> list[Rule]:
        """Return the rules that are in force now, with their limits of now."""
        found = in_force_now(self._rules, self._machine)
        for note in self._machine.notes():
            self._say_once(note)
        return found

    def look(self) -> None:
        """Look at all processes, and limit what is to be limited."""
        begin_s, before = time.thread_time(), list(self.held.values())
        families = process.families()
        survey = Survey(self._book, self._limited_by_others())
        self._mounted = survey.mounted
        survey.look(process.running())
        survey.inherit(families)
        self._doubt(survey.decided.keys())
        self._part(survey.decided)
        found = list(survey.wanted(families))
        surveyed_s = time.thread_time() - begin_s
        self._end_others(found)
        self._hold_all([*found, *self._for_later(found)])
        for note in survey.notes:
            self._say_once(note)
        least_s = _PAUSE_WITHOUT_WORD_S if self._executions is None else _LEAST_PAUSE_S
        # To limit what was found is not looking.
        is_same = before == list(self.held.values())
        cost_s = time.thread_time() - begin_s if is_same else surveyed_s
        self._look_s = self._budget.next_due_s(self, cost_s, least_s)

    def chores(self) -> list[Chore]:
        """Return what has to be done while the rules are in force."""
        found: list[Chore] = [self._ticking, self, *self._quotas.chores(), *self._groups.chores()]
        for held in self.held.values():
            found += held.chores()
        return found

    def throttles(self) -> dict[str, Throttle]:
        """Return the throttles of the rules by their ids."""
        return {held.throttle.id: held.throttle for held in self.held.values()}

    def shares(self) -> list[Now]:
        """Return what each throttle that shares a total has at the moment."""
        return self._groups.state()

    def charge(self) -> None:
        """Charge the rules that have a quota with what their throttles have passed."""
        for held in self.held.values():
            self._charge(held)

    def decisions(self) -> dict[str, Decision]:
        """Return how the quota of each rule in force that has one stands."""
        return self._quotas.decisions(self._now)

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program, or -1."""
        return -1 if self._executions is None else self._executions.fileno()

    @property
    def due_s(self) -> float:
        """When to look at all processes again."""
        return self._look_s

    def run(self) -> None:
        """Limit processes that have begun to match, and now and then look at all."""
        if self._executions is not None:
            self._executed(set(self._executions.executed()))
        if time.monotonic() >= self._look_s:
            self.look()
        self.changes_chores = self._take_change()

    def _take_change(self) -> bool:
        found, self._has_changed = self._has_changed, False
        return found

    def remove(self) -> None:
        """Remove all throttles of rules. What is still to be done finds no rules then."""
        self._rules, self._look_s = (), math.inf
        self._open_book()
        for name, key in list(self.held):
            self._end(name, key)
        if self._executions is not None:
            self._executions.close()
            self._executions = None
        self._groups.close()

    def _listen(self) -> None:
        try:
            self._executions = get_backend("ebpf").executions()
            self._budget = Budget(_MOST_LOOKING)
        except (Error, OSError) as error:
            self._say_once(
                f"new processes are limited within {_PAUSE_WITHOUT_WORD_S:g} s, not at once,"
                f" because the kernel does not report when they start: {error}"
            )

    def _executed(self, pids: Collection[int]) -> None:
        """Limit those that match among processes that have executed a program."""
        survey = Survey(self._book, mounted=self._mounted)
        survey.look(pids)
        others = self._limited_by_others() if survey.decided else frozenset()
        self._doubt(survey.decided.keys() - others, pids)
        if not survey.decided:
            return
        found = list(survey.wanted({}))
        self._part(survey.decided)
        for wanted in found:
            if not others.isdisjoint(wanted.pids) or self._holds(wanted):
                continue
            held = self.held.get((wanted.rule.name, wanted.key))
            if held is not None and wanted.cgroups:
                # Others of the rule's cgroups go on.
                together = sorted({*held.wanted.cgroups, *wanted.cgroups}, key=lambda c: c.path)
                wanted = dataclasses.replace(wanted, cgroups=tuple(together))
            self._hold(wanted)

    def _end_others(self, found: Iterable[Wanted]) -> None:
        """End limits on whole cgroups that are wanted no longer; others wait for processes."""
        wanted = {(one.rule.name, one.key) for one in found if one.cgroups}
        for name, key in [at for at, held in self.held.items() if held.wanted.cgroups]:
            if (name, key) not in wanted:
                self._end(name, key)

    def _holds(self, wanted: Wanted) -> bool:
        """Whether all processes that are wanted are limited by their rule already."""
        held = [one for (name, _), one in self.held.items() if name == wanted.rule.name]
        limited = {pid for one in held for pid in one.throttle.processes()}
        if not wanted.pids or not limited.issuperset(wanted.pids):
            return False
        return not any(one.throttle.by_name(wanted.pids) for one in held if one.names)

    def _doubt(self, decided: Collection[int], pids: Optional[Collection[int]] = None) -> None:
        """Take out processes that are limited for their names alone, and that no rule is for.

        With ``pids`` only some processes can be such.
        """
        expecting = [held for held in self.held.values() if held.names]
        if expecting and pids is not None:
            names = set(map(process.name_of, pids))
            expecting = [held for held in expecting if not names.isdisjoint(held.names)]
        for held in expecting:
            limited = held.throttle.processes() if pids is None else list(pids)
            gone = sorted(held.throttle.by_name(limited) - set(decided))
            if gone:
                held.throttle.let_go(gone)

    def _part(self, rule_of: Mapping[int, Rule]) -> None:
        """Take processes out of the throttles of rules that are no longer theirs."""
        for held in self.held.values():
            if held.wanted.cgroups:
                continue
            name = held.wanted.rule.name
            gone = [
                pid
                for pid in held.throttle.processes()
                if pid in rule_of and rule_of[pid].name != name
            ]
            if gone:
                held.throttle.let_go(gone)

    def _for_later(self, found: Iterable[Wanted]) -> list[Wanted]:
        """Return what is wanted for the first processes of rules to come."""
        busy = {one.rule.name for one in found}
        held = {name: one.wanted.rule for (name, _), one in self.held.items()}
        return [
            Wanted(rule, "")
            for rule in self._book.rules
            if rule.name in self._waiting and rule.name not in busy and held.get(rule.name) != rule
        ]

    def _hold_all(self, found: Iterable[Wanted]) -> None:
        """Limit all that is wanted; let others in between now and then."""
        pending = deque(found)
        while pending:
            until_s = time.monotonic() + _LONGEST_LOCK_S
            with registry.looking_once():
                while pending and time.monotonic() < until_s:
                    self._hold(pending.popleft())

    def _hold(self, wanted: Wanted) -> None:
        """Limit what is wanted, by the throttle that is there or by a new one."""
        name, key = wanted.rule.name, wanted.key
        if wanted.is_for_later and name not in self._waiting:
            return  # the kernel has refused it for another rule
        self._has_changed = True
        try:
            held = self.held.get((name, key))
            if held is not None and self._refresh(held, wanted):
                return
            self._end(name, key)
            wish = _in_company(self._waiting.get(name, 1), self._wish)
            wish = dataclasses.replace(wish, insist=wanted.rule.insist)
            throttle = start(self._spec(wanted), _wish_for(wanted.rule, wish))
            with ExitStack() as undo:
                undo.callback(throttle.remove)
                held = self.held[name, key] = Held(wanted, throttle)
                undo.pop_all()
            self._groups.join(wanted.rule, throttle)
            if wanted.target.by_rule:
                throttle.follow(wanted.pids)
                if not held.expect() and wanted.is_for_later:
                    raise ThrottleError("the kernel does not follow processes")
            for note in throttle.plan_notes:
                self._say_once(f"{name}: {note}")
        except (Error, OSError) as error:
            if wanted.is_for_later:
                # Who comes is limited all the same, after it has started.
                log.info("No throttle waits for processes of rule %s: %s", name, error)
                self._waiting = {}
                self._end(name, key)
                return
            if all(map(process.has_ended, wanted.pids or (0,))) and wanted.pids:
                return  # it has ended meanwhile
            self._say_once(f"rule {name} is not in force for all that it matches: {error}")

    def _refresh(self, held: Held, wanted: Wanted) -> bool:
        """Have a throttle limit what is wanted now, and share as it is to."""
        before = held.wanted.rule
        if (before.member, before.limits) != (wanted.rule.member, wanted.rule.limits):
            self._groups.leave(held.throttle)
        if not held.refresh(wanted):
            return False
        self._groups.join(wanted.rule, held.throttle)
        return True

    def _spec(self, wanted: Wanted) -> ThrottleSpec:
        rule = wanted.rule
        return ThrottleSpec(wanted.target, rule.limits, _traffic(rule), rule.name, kept=True)

    def _end(self, name: str, key: Key) -> None:
        held = self.held.pop((name, key), None)
        if held is not None:
            self._has_changed = True
            self._charge(held)
            self._groups.leave(held.throttle)
            held.remove()

    def _charge(self, held: Held) -> None:
        try:
            self._quotas.charge(held.wanted.rule, held.throttle.id, held.throttle.counters)
        except (Error, OSError) as error:
            self._say_once(f"{held.wanted.rule.name}: its quota cannot be charged now: {error}")

    def _tick(self) -> bool:
        """Follow time and circumstances, and remove throttles that limit nothing any more."""
        self.charge()
        self._quotas.tell(self._now)
        by_itself = any(rule.changes_by_itself for rule in self._rules)
        if by_itself and self._in_force() != self._now:
            self._follow_rules()
        for note in self._groups.notes():
            self._say_once(note)
        now = time.monotonic()
        for (name, key), held in list(self.held.items()):
            ended = held.throttle.ended()
            if ended == "removed":
                self._say(
                    f"{held.throttle.id} was removed, but rule {name} is in force: it returns"
                )
                self._look_s = now
            if ended or self._is_idle(held, now):
                self._end(name, key)
        return self._take_change()

    def _is_idle(self, held: Held, now: float) -> bool:
        waits = held.wanted.rule.name in self._waiting
        if waits or held.wanted.cgroups or held.throttle.processes():
            held.idle_since_s = math.inf
            return False
        held.idle_since_s = min(held.idle_since_s, now)
        return now - held.idle_since_s >= (_IDLE_WITH_NAMES_S if held.names else _IDLE_S)

    def _pick_up(self) -> None:
        """Take over the throttles of rules whose process was killed; remove what no rule wants."""
        for one in _abandoned():
            rule = next(
                (r for r in self._book.rules if r.name == one.record.spec.target.rule), None
            )
            try:
                if rule is None or not self._fits(rule, one.parts):
                    one.remove()
                    continue
                self._quotas.charge(rule, one.id, one.counters, one.record.owner)
                with ExitStack() as undo:
                    throttle = take_over(one.parts, _wish_for(rule, self._wish).options)
                    undo.callback(throttle.remove)
                    self._adopt(rule, throttle)
                    undo.pop_all()
            except (Error, OSError) as error:
                log.info("%s is not taken over: %s", one.id, error)
                continue

    def _fits(self, rule: Rule, parts: Sequence[Record]) -> bool:
        """Whether a throttle is as a rule would make it but for its limits."""
        spec = parts[0].spec
        directions = {direction for part in parts for direction in part.spec.limits}
        return (
            not rule.each
            and spec.traffic == _traffic(rule)
            and directions == set(rule.limits)
            and bool(spec.target.cgroups) == self._book.limits_whole_cgroups(rule)
            and spec.target.children == rule.children
        )

    def _adopt(self, rule: Rule, throttle: Throttle) -> None:
        # One that was paused stays so.
        before = dataclasses.replace(rule, limits={**throttle.limits, **throttle.paused})
        cgroups_now = throttle.cgroups if throttle.selection is None else ()
        held = self.held[rule.name, ""] = Held(Wanted(before, "", cgroups=cgroups_now), throttle)
        held.expect()

    def _limited_by_others(self) -> frozenset[int]:
        """Return the processes that somebody limits by hand: that counts more than a rule."""
        now = time.monotonic()
        if now - self._others[0] > _OTHERS_LAST_S:
            found: set[int] = set()
            with suppress(Error, OSError):
                for record in registry.records():
                    if not record.spec.target.rule:
                        found.update(get_backend(record.backend).processes(record))
            self._others = (now, frozenset(found))
        return self._others[1]

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def in_force_now(rules: Iterable[Rule], machine: Machine) -> list[Rule]:
    """Return the rules that are in force now, with their limits of now."""
    now = datetime.now(timezone.utc)
    at = (rule.at(now, machine) if rule.changes_by_itself else rule for rule in rules)
    return [rule for rule in at if rule is not None]


def _that_wait(rules: Iterable[Rule]) -> dict[str, int]:
    """Return the names of rules whose throttles are to wait, and how many are of the same kind."""
    waiting = [(rule.name, _traffic(rule)) for rule in rules if rule.waits]
    kinds = list(dict.fromkeys(traffic for _, traffic in waiting))[:_MOST_KINDS_WAITING]
    chosen = [one for one in waiting if one[1] in kinds][:_MOST_WAITING]
    counts = Counter(traffic for _, traffic in chosen)
    return {name: counts[traffic] for name, traffic in chosen}


def _in_company(number: int, wish: Wish) -> Wish:
    """Return how to start one of so many throttles that may share their programs."""
    options: Options = wish.options.get("ebpf") or Options()
    return wish.changed(options={**wish.options, "ebpf": options._replace(company=number)})


def _wish_for(rule: Rule, wish: Wish) -> Wish:
    """Return how to start a rule's throttle."""
    if rule.network is None:
        return wish
    from pybpfthrottle.conditions.network import wish_for

    return wish_for(_asked(rule, rule.network), wish)


def _network(rule: Rule, throttle: Throttle) -> Optional[Network]:
    """Put a rule's bad network in force, if it has one. Raises an error of this package."""
    if rule.network is None:
        return None
    from pybpfthrottle.conditions.network import Network

    return Network(throttle, _asked(rule, rule.network), loopback=rule.loopback, owned=False)


def _asked(rule: Rule, network: Asked) -> Asked:
    """Return a rule's network with the limits that are in force now, as of a schedule."""
    return dataclasses.replace(network, limits=rule.limits)


def _traffic(rule: Rule) -> Traffic:
    return networks.traffic(rule.kind, rule.to, rule.but, loopback=rule.loopback)


def by_rules() -> list[InForce]:
    """Return the throttles of rules that are in force. Raises OSError."""
    return [one for one in in_force(registry.records()) if one.record.spec.target.rule]


def _abandoned() -> list[InForce]:
    with suppress(Error, OSError):
        return [one for one in by_rules() if not one.record.supervised]
    return []
