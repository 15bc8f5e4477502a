"""pybpfthrottle apply, daemon and explain: limits by rules."""

from __future__ import annotations

import gc
import math
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple, Optional, Sequence

from pybpfthrottle import registry
from pybpfthrottle.cli import background, tables
from pybpfthrottle.cli.accounts import Accounts, StoreWhenNeeded
from pybpfthrottle.cli.background import Background
from pybpfthrottle.cli.options import wish_by_settings
from pybpfthrottle.cli.say import echo, say, why
from pybpfthrottle.errors import Error, RulesError, ThrottleError
from pybpfthrottle.inforce import Cover
from pybpfthrottle.linux import login, process
from pybpfthrottle.linux.cgroup import locked
from pybpfthrottle.linux.notify import notify
from pybpfthrottle.linux.signals import SignalQueue
from pybpfthrottle.rules import changes, instance, reading
from pybpfthrottle.rules.instance import APPLY, DAEMON, HAND_OVER, RELOAD, Instance
from pybpfthrottle.rules.keeper import Keeper, by_rules, in_force_now
from pybpfthrottle.rules.matching import Facts, Matcher, Rulebook
from pybpfthrottle.rules.model import Rule
from pybpfthrottle.rules.quotas import Quotas, used
from pybpfthrottle.rules.reading import Rules
from pybpfthrottle.rules.when import ThisMachine
from pybpfthrottle.supervisor import Supervisor

SCHEMA = 1
_STOP = (signal.SIGINT, signal.SIGTERM)


class Sources(NamedTuple):
    """Where rules are read from, as absolute paths."""

    paths: tuple[str, ...]

    @classmethod
    def of(cls, given: Sequence[str]) -> Sources:
        """Return the files that are given, or where rules are by default."""
        paths = [os.path.abspath(path) for path in given] or reading.directories(os.environ)
        return cls(tuple(paths))

    def read(self) -> Rules:
        """Return the rules. Raises RulesError after all mistakes but one were said."""
        try:
            return reading.read(self.paths)
        except RulesError as error:
            for mistake in error.mistakes[:-1]:
                say(f"error: {mistake}")
            raise RulesError(error.mistakes[-1:]) from error

    def none(self, rules: Rules) -> str:
        """Return that there are no rules, and where they were looked for."""
        if rules.files:
            return f"There are no enabled rules in {' or '.join(rules.files)}."
        return f"There are no rules in {reading.places(self.paths)}."


def apply(given: Sequence[str], *, dry_run: bool, diff: bool, stop: bool, as_json: bool) -> int:
    """Make the machine match rules; return the exit status."""
    keeps = instance.current()
    if stop:
        return _stop(keeps)
    sources = Sources.of(given)
    rules = sources.read()
    found = changes.find(rules.rules, login.processes())
    if as_json:
        _show_json(rules, found)
    elif dry_run or diff:
        for line in changes.lines(found):
            echo(line)
    if not rules.rules and not as_json:
        echo(sources.none(rules))
    if not dry_run:
        return _make_it_so(sources, rules, keeps, quiet=as_json)
    if rules.rules and not found.pending and not as_json:
        echo("The machine matches the rules.")
    return 0


def _stop(keeps: Optional[Instance]) -> int:
    if keeps is None:
        found = _remove_left()
        echo("The limits of the rules are removed." if found else "No process keeps rules.")
        return 0
    if keeps.kind == DAEMON:
        raise ThrottleError(
            f"process {keeps.owner.pid} is pybpfthrottle daemon: stop that, for example by"
            " systemctl stop pybpfthrottle"
        )
    keeps.stop()
    echo("The limits of the rules are removed.")
    return 0


def _remove_left() -> bool:
    """Remove what a process that kept the rules has left, if it was killed; return whether it had.

    Raises ThrottleError or OSError.
    """
    with locked():
        left = [one for one in by_rules() if not one.record.supervised]
        for one in left:
            one.remove()
        if instance.current() is None:  # and nobody has begun meanwhile
            instance.leave()
    return bool(left)


def _make_it_so(sources: Sources, rules: Rules, keeps: Optional[Instance], *, quiet: bool) -> int:
    """Have the process that keeps the rules put them in force, or start one."""
    if keeps is not None and keeps.sources == sources.paths:
        keeps.reload()
    elif keeps is not None and keeps.kind == DAEMON:
        raise ThrottleError(
            f"process {keeps.owner.pid} (pybpfthrottle daemon) keeps the rules of"
            f" {', '.join(keeps.sources)}: put the file there, or stop the daemon"
        )
    else:
        going_on = background.begin()
        if isinstance(going_on, Background):
            return _keep(APPLY, sources, rules, keeps, going_on, Accounts())
        if going_on:
            return going_on
    if not quiet:
        echo(f"{_count(rules)} in force; pybpfthrottle apply --stop ends that.")
    return 0


def _count(rules: Rules) -> str:
    count = len(rules.rules)
    return f"{count} rule{'s are' if count != 1 else ' is'}"


def daemon(given: Sequence[str], accounts: Accounts) -> int:
    """Keep rules in force until told to stop; return the exit status."""
    sources = Sources.of(given)
    rules = sources.read()
    keeps = instance.current()
    if keeps is not None and keeps.kind == DAEMON:
        raise ThrottleError(f"process {keeps.owner.pid} is pybpfthrottle daemon already")
    if not rules.files:  # who writes such files may have none in force for now
        say(sources.none(rules))
    return _keep(DAEMON, sources, rules, keeps, None, accounts)


def _keep(
    kind: str,
    sources: Sources,
    rules: Rules,
    before: Optional[Instance],
    going_on: Optional[Background],
    accounts: Accounts,
) -> int:
    """Keep rules in force, in place of the process that did so before."""
    spared = login.processes()
    with SignalQueue((*_STOP, RELOAD, HAND_OVER)) as signals, ExitStack() as stack:
        if before is not None:
            before.hand_over()
        own = instance.claim(kind, sources.paths)
        stack.callback(instance.leave)
        supervisor = stack.enter_context(Supervisor())
        store = stack.enter_context(StoreWhenNeeded(supervisor))
        quotas = Quotas(store.get)
        wish, in_advance = wish_by_settings(), kind == DAEMON
        keeper = Keeper(wish, say, spared, quotas=quotas, in_advance=in_advance)
        stack.callback(keeper.remove)
        accounts.begin(supervisor, stack, keeper, store)
        keeper.begin(rules.rules, rules.groups)
        registry.tidy_up()
        # What was needed to begin is no longer: this goes on for weeks.
        gc.collect()
        own = _told(own)
        if going_on is not None:
            going_on.ready()
        notify("READY=1")
        supervisor.add(keeper.chores)
        supervisor.add(lambda: [signals], strict=True)
        reloaded = True
        while True:
            supervisor.step(math.inf, ask_all=reloaded)
            reloaded = False
            for number in signals.take():
                if number in _STOP:
                    notify("STOPPING=1")
                    return 0
                if number is HAND_OVER:
                    # The kernel keeps the limits, and the next process takes them over.
                    keeper.charge()
                    store.close()
                    instance.leave()
                    os._exit(0)
                notify("RELOADING=1")
                own = _reloaded(own, sources, keeper)
                reloaded = True
                notify("READY=1")


def _told(own: Instance, mistakes: Sequence[str] = ()) -> Instance:
    now = replace(own, looked=own.looked + 1, mistakes=tuple(mistakes))
    now.tell()
    return now


def _reloaded(own: Instance, sources: Sources, keeper: Keeper) -> Instance:
    """Read the rules again; with mistakes what was in force goes on."""
    try:
        rules = reading.read(sources.paths)
    except RulesError as error:
        for mistake in error.mistakes:
            say(f"error: {mistake}; the rules of before go on")
        return _told(own, error.mistakes)
    if not rules.files:
        say(sources.none(rules))
    keeper.change(rules.rules, rules.groups)
    return _told(own)


def _show_json(rules: Rules, found: changes.Changes) -> None:
    tables.show_json(
        {
            "schema": SCHEMA,
            "rules": [rule.to_json() for rule in rules.rules],
            "groups": [group.to_json() for group in rules.groups],
            "changes": [one.to_json() for one in found.changes],
            "precedences": [one._asdict() for one in found.precedences],
            "notes": list(found.spared),
        }
    )


def explain(pid: int, given: Sequence[str], *, as_json: bool) -> int:
    """Say which rule is for a process, and why; return the exit status."""
    process.Process(pid)
    sources = Sources.of(given)
    rules = sources.read()
    if not rules.rules:
        say(sources.none(rules))
    told = _Explained(rules.rules, pid)
    if as_json:
        if told.unseen:
            say(f"what limits it now cannot be seen: {told.unseen}")
        tables.show_json({"schema": SCHEMA, **told.to_json()})
    else:
        for line in told.lines():
            echo(line)
    return 0


class _Explained:
    """Why a process is limited, or not."""

    def __init__(self, rules: Sequence[Rule], pid: int) -> None:
        self._pid = pid
        machine = ThisMachine(used=used)
        now = in_force_now(rules, machine)
        self._book = Rulebook(now, login.processes())
        self._from, self._decision = self._decided(pid)
        rule = self._decision.rule
        self._quota = None if rule is None else rule.decision(time.time(), machine)
        facts = Facts(pid)
        names = {rule.name for rule in now}
        self._asleep = [
            rule
            for rule in rules
            if rule.name not in names and Matcher(rule.criteria).matches(facts)
        ]
        self._limits = []
        self.unseen = ""
        try:
            cgroup = facts.cgroup
            self._limits = Cover.now().of(pid, "" if cgroup is None else cgroup.path)
        except (Error, OSError) as error:
            self.unseen = why(error)

    def _decided(self, pid: int) -> Any:
        """Return the process that a rule matches, it or who has started it, and the decision."""
        for one in process.ancestors(pid):
            decision = self._book.decide(one)
            if decision.rule is not None and (one == pid or decision.rule.children):
                return one, decision
        return pid, self._book.decide(pid)

    def lines(self) -> list[str]:
        """Return it for people."""
        who = process.listed([self._pid])
        rule, decision = self._decision.rule, self._decision
        if rule is None:
            found = [f"No rule matches {who}."]
        elif decision.spared:
            found = [f"{who} matches rule {rule.name}, but is not limited: {decision.spared}."]
        else:
            found = [f"{who}: rule {rule.name} ({rule.where}): {rule.criteria}"]
            if self._from != self._pid:
                found.append(f"  It was started by {process.listed([self._from])}, which matches.")
            if self._quota is not None:
                found += [f"  Quota: {one}." for one in self._quota.standings]
            if self._book.limits_whole_cgroups(rule):
                found.append("  The whole cgroup is limited: no other rule is for parts of it.")
        found += [
            f"  It matches rule {one.name} too, which is less specific: {one.criteria}"
            for one in decision.others
        ]
        found += [
            f"  It matches rule {one.name} too, which is not in force now, by its"
            f" {'schedule' if one.when is None else 'when'}: {one.criteria}"
            for one in self._asleep
        ]
        for one in self._limits:
            limits = ", ".join(f"{way} {one.limit(way)}" for way in sorted(one.limits))
            found.append(f"Limited now by {one.id} ({one.target}): {limits}")
        if self.unseen:
            found.append(f"What limits it now cannot be seen: {self.unseen}")
        elif not self._limits:
            found.append("Nothing limits it now.")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        rule = self._decision.rule
        return {
            "pid": self._pid,
            "name": process.name_of(self._pid),
            "rule": None if rule is None else rule.to_json(),
            "quota": None if self._quota is None else self._quota.to_json(),
            "matched_pid": self._from if rule is not None else None,
            "spared": self._decision.spared or None,
            "less_specific": [one.name for one in self._decision.others],
            "not_in_force": [one.name for one in self._asleep],
            "throttles": [one.id for one in self._limits],
        }
