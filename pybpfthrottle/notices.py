"""Telling people that a quota is used up: in the journal, and on their desktops. Never fails."""

from __future__ import annotations

import logging
from typing import Any

from pybpfthrottle.linux import desktop, journal
from pybpfthrottle.model import printable
from pybpfthrottle.quota import Decision
from pybpfthrottle.supervisor import Chore, Periodic

log = logging.getLogger(__name__)

_TITLE = "Quota used up"
_REAP_S = 5.0


class Notices:
    """Tells once of each quota that is used up, and again when it is in a later period.

    A supervisor should have its ``chores``.
    """

    def __init__(self) -> None:
        self._told: dict[tuple[str, Any], float] = {}
        self._reaping = Periodic(_REAP_S, desktop.reap)

    def chores(self) -> list[Chore]:
        """Return what a supervisor has to do: ending notifications that a desktop holds up."""
        return [self._reaping]

    def tell(self, rule: str, decision: Decision) -> bool:
        """Tell if a rule's quota is used up, and that was not told yet; return whether it was."""
        one = decision.exceeded
        if one is None or self._told.get((rule, one.period)) == one.ends_s:
            return False
        self._told[rule, one.period] = one.ends_s
        text = printable(decision.text(rule))
        if not journal.send(text, journal.WARNING, {"PYBPFTHROTTLE_RULE": rule}):
            log.warning("%s", text)
        desktop.notify(_TITLE, text)
        return True
