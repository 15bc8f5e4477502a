"""What rules with a quota have used: by their throttles, while these are in force."""

from __future__ import annotations

import time
from typing import Callable, Iterable, Mapping, Optional

from pybpfthrottle.ledger import Ledger, used_in_file
from pybpfthrottle.linux import process
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.model import Counters, Direction
from pybpfthrottle.notices import Notices
from pybpfthrottle.periods import Span
from pybpfthrottle.quota import Decision
from pybpfthrottle.rules.model import Rule
from pybpfthrottle.store import Store, default_path
from pybpfthrottle.supervisor import Chore


def used(rule: str, span: Span) -> int:
    """Return what a rule has used on some days, as it was written last; for who keeps no rules."""
    return used_in_file(default_path(), rule, span)


class Quotas:
    """Charges rules with what their throttles pass.

    ``open_store`` opens the file that keeps it, when it is needed; None if that is impossible.
    """

    def __init__(self, open_store: Callable[[], Optional[Store]] = lambda: None) -> None:
        self._open_store = open_store
        self._opened: Optional[Ledger] = None
        self._notices = Notices()

    def chores(self) -> list[Chore]:
        """Return what has to be done for who was told."""
        return self._notices.chores()

    def charge(
        self,
        rule: Rule,
        throttle_id: str,
        counters: Callable[[], Mapping[Direction, Counters]],
        owner: Optional[Identity] = None,
    ) -> None:
        """Charge a rule with what a throttle of it has passed since the last time.

        ``owner`` is the process that keeps it, None for this one: whoever takes a throttle over
        counts anew. Raises what ``counters`` raises, and StoreError.
        """
        if rule.quota is not None:
            keeps = owner or process.identity()
            key = f"{throttle_id}-{keeps.pid}-{keeps.start_ticks}"
            self._ledger.count(rule.name, key, counters(), rule.quota.day(time.time()))

    def used(self, rule: str, span: Span) -> int:
        """Return how many bytes a rule has passed on some days."""
        return self._ledger.used(rule, span)

    def decisions(self, rules: Iterable[Rule]) -> dict[str, Decision]:
        """Return how the quota of each rule that has one stands."""
        now_s = time.time()
        found = {rule.name: rule.decision(now_s, self) for rule in rules}
        return {name: decision for name, decision in found.items() if decision is not None}

    def tell(self, rules: Iterable[Rule]) -> None:
        """Tell people of quotas that are used up, each once."""
        for name, decision in self.decisions(rules).items():
            self._notices.tell(name, decision)

    @property
    def _ledger(self) -> Ledger:
        if self._opened is None:
            self._opened = Ledger(self._open_store())
        return self._opened
