"""When the reason is looked for why nothing passes, and where it is shown."""

from __future__ import annotations

import io
from typing import Any, Optional

import pytest

from pybpfthrottle import idle
from pybpfthrottle.cli import display
from pybpfthrottle.errors import CgroupError
from pybpfthrottle.idle import Idleness, Reason
from pybpfthrottle.meter import Reading
from pybpfthrottle.model import Counters, Direction, Rate
from pybpfthrottle.witness import Spending

WHY = Reason("loopback", "all goes over loopback, to 7 (proxy)")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Over how many seconds each look asks."""
    found: list[float] = []

    def why(throttle: Any, process_id: Optional[int], seconds: float) -> Reason:
        found.append(seconds)
        return WHY

    monkeypatch.setattr(idle, "why", why)
    monkeypatch.setattr(Idleness, "_spending", Spending())
    monkeypatch.setattr(Spending, "due", True)
    return found


def test_it_is_looked_for_ever_more_rarely(looks: list[float]) -> None:
    """At first after three seconds, at last once a minute."""
    own = Idleness(None, 7)  # type: ignore[arg-type]
    reasons = [own.sample(0) for _ in range(300)]
    assert reasons[:4] == [None, None, WHY, WHY]
    assert looks == [3, 6, 12, 24, 48, 96, 156, 216, 276]


def test_what_passes_ends_it(looks: list[float]) -> None:
    """And the next pause begins anew."""
    own = Idleness(None, 7)  # type: ignore[arg-type]
    assert [own.sample(5) for _ in range(4)] == [None, None, None, WHY]
    assert [own.sample(count) for count in (6, 6, 6, 6)] == [None, None, None, WHY]
    assert looks == [3, 3]


def test_a_look_that_costs_much_makes_the_next_wait(
    looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1 % of a CPU, for all throttles together."""
    monkeypatch.setattr(Spending, "due", False)
    own = Idleness(None, 7)  # type: ignore[arg-type]
    assert {own.sample(0) for _ in range(10)} == {None}
    monkeypatch.undo()
    spending, now, spent = Spending(), [10.0], [1.0]
    monkeypatch.setattr("pybpfthrottle.witness.time.monotonic", lambda: now[0])
    monkeypatch.setattr("pybpfthrottle.witness.time.process_time", lambda: spent[0])
    with spending:
        spent[0] += 0.05
    now[0] += 4.9
    assert not spending.due
    now[0] += 0.2
    assert spending.due


def test_a_look_that_fails_ends_nothing(
    looks: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes and cgroups come and go."""

    def fail(*_: Any) -> Reason:
        raise CgroupError("it is gone")

    monkeypatch.setattr(idle, "why", fail)
    own = Idleness(None, 7)  # type: ignore[arg-type]
    assert {own.sample(0) for _ in range(5)} == {None}


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        """It is one."""
        return True


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (200, "download: actual=0 B/s, limit=1000 B/s, ratio=0.00x idle   all goes over loopback"),
        (80, "download 0 B/s 0.00x idle   all goes over loopback, to 7 (proxy)"),
        (50, "↓0 0.00x   all goes over loopback, to 7 (proxy)"),
        (30, "↓0 0.00x   all goes over loo…"),
    ],
)
def test_the_line_has_it_behind_the_rates(
    columns: int, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the form that fits."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    line = display.LiveLine(terminal)
    line.draw([Reading(Direction.DOWNLOAD, Rate(1000), 0.0, Counters())], WHY.text)
    line.close()
    assert shown in terminal.getvalue()
    assert "\n" not in terminal.getvalue()
