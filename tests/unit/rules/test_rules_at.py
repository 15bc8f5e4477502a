"""What a rule limits at a moment."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from typing import Any

import pytest

from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.rules import schedule
from pybpfthrottle.rules.model import Criteria, Rule
from pybpfthrottle.rules.when import Condition

RULE = Rule("r", Criteria(name=("x",)), {Direction.UPLOAD: Rate(5000)})
NOON = datetime(2026, 11, 26, 12, tzinfo=timezone.utc)


class Mains:
    """A machine on mains."""

    def on_battery(self) -> bool:
        """Whether it runs on its battery."""
        return False


def at_noon(**changes: Any) -> Any:
    """The limits of a changed rule at noon, or None."""
    machine: Any = Mains()
    found = dataclasses.replace(RULE, **changes).at(NOON, machine)
    return None if found is None else found.limits


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        ({"hours": "08:00-18:00", "zone": "UTC"}, {Direction.UPLOAD: Rate(5000)}),
        ({"hours": "18:00-20:00", "zone": "UTC"}, None),
        (
            {"hours": "08:00-18:00", "zone": "UTC", "download": "1M"},
            {Direction.UPLOAD: Rate(5000), Direction.DOWNLOAD: Rate(1024**2)},
        ),
        (
            {"hours": "08:00-18:00", "zone": "UTC", "download": "1M", "upload": "off"},
            {Direction.DOWNLOAD: Rate(1024**2)},
        ),
        ({"hours": "08:00-18:00", "zone": "UTC", "upload": "off"}, None),
    ],
)
def test_a_schedule_replaces_limits(written: Any, limits: Any) -> None:
    """Of the directions that it names; without any limit the rule is not in force."""
    assert at_noon(schedule=schedule.parse(written)) == limits


def test_what_has_to_hold_decides_first() -> None:
    """Whatever the schedule says."""
    assert at_noon(when=Condition(on_battery=False)) == RULE.limits
    assert at_noon(when=Condition(on_battery=True)) is None
