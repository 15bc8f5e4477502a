"""Rules with a quota: what they are charged with, and what applies when it is used up."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from pybpfthrottle import quota
from pybpfthrottle.linux import process
from pybpfthrottle.linux.process import Identity
from pybpfthrottle.model import BLOCKED, Counters, Direction, Rate
from pybpfthrottle.rules import quotas, reading, schedule
from pybpfthrottle.rules.model import Criteria, Rule
from pybpfthrottle.rules.quotas import Quotas
from pybpfthrottle.rules.when import ThisMachine
from pybpfthrottle.store import Store

DOWN, UP = Direction.DOWNLOAD, Direction.UPLOAD
NOON = datetime(2026, 11, 26, 12, tzinfo=timezone.utc)
SLOW, FAST = Rate.parse("50K"), Rate.parse("5M")


def rule(then: str = "limit", limits: Any = None, **fields: Any) -> Rule:
    """One that may pass a kilobyte a day, and 64 a month."""
    given = {"day": "1K", "month": "64K", "then": then}
    if then == "limit":
        given["rate"] = "500K"
    found = Rule("video", Criteria(name=("mpv",)), limits or {DOWN: FAST})
    return dataclasses.replace(found, quota=quota.parse(given), **fields)


def limits(of: Rule, used: int) -> Any:
    """Its limits at noon, after a day with so much."""
    machine = ThisMachine(used=lambda name, span: used if name == "video" else 0)
    now = of.at(NOON, machine)
    return None if now is None else now.limits


@pytest.mark.parametrize(
    ("then", "used", "applies"),
    [
        ("limit", 1023, {DOWN: FAST, UP: None}),
        ("limit", 1024, {DOWN: Rate.parse("500K"), UP: Rate.parse("500K")}),
        ("block", 1024, {DOWN: BLOCKED, UP: BLOCKED}),
        ("warn", 10**9, {DOWN: FAST, UP: None}),
    ],
)
def test_what_applies_depends_on_what_was_used(then, used, applies) -> None:
    """Both directions are counted all the time, and limited when it is used up."""
    assert limits(rule(then), used) == applies


def test_a_lower_limit_of_the_rule_s_own_stays() -> None:
    """A quota that is used up makes nothing faster."""
    assert limits(rule(limits={DOWN: SLOW}), 1024) == {DOWN: SLOW, UP: Rate.parse("500K")}


def test_a_rule_may_have_a_quota_and_no_limit() -> None:
    """Then it only counts."""
    assert limits(rule(limits={UP: None}), 0) == {DOWN: None, UP: None}


def test_a_schedule_and_a_quota_go_together() -> None:
    """Outside its hours the rule is not in force; in them the lower limit holds."""
    by_day = schedule.parse({"hours": "08:00-18:00", "zone": "UTC", "download": "100K"})
    assert limits(rule(schedule=by_day), 1024) == {DOWN: Rate.parse("100K"), UP: Rate(500 << 10)}
    by_night = schedule.parse({"hours": "18:00-08:00", "zone": "UTC"})
    assert limits(rule(schedule=by_night), 1024) is None


TEXT = """
[[rule]]
name = "video"
match = { name = "mpv" }
quota = QUOTA
"""


def test_a_rule_of_a_file_has_its_quota(tmp_path) -> None:
    """And needs no other limit; it is told for scripts."""
    path = tmp_path / "rules.toml"
    path.write_text(TEXT.replace("QUOTA", '{ month = "64K", then = "limit", rate = "500K" }'))
    (found,) = reading.read([str(path)]).rules
    assert found.changes_by_itself
    assert found.to_json()["quota"] == {
        "month": 64 << 10,
        "then": "limit",
        "rate": 500 << 10,
        "start_day": 1,
        "zone": None,
    }


def test_a_quota_with_a_mistake_is_told_with_its_line(tmp_path) -> None:
    """Like every other mistake."""
    path = tmp_path / "rules.toml"
    path.write_text(TEXT.replace("QUOTA", '{ month = "1G", then = "explode" }'))
    with pytest.raises(reading.RulesError, match=f"{path}, line 5: quota is .*limit, block, warn"):
        reading.read([str(path)])


def passed(count: int) -> Any:
    """What reads the counters of a throttle that has passed so much."""
    return lambda: {DOWN: Counters(1, 1, count)}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Where what rules have used is kept."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    return quotas.default_path()


def test_a_rule_is_charged_across_processes(file) -> None:
    """Who takes a throttle over first charges what the one before has left; then it counts anew."""
    first, killed = rule(), Identity(4711, 1, 99)
    with Store.open(file) as store:
        found = Quotas(lambda: store)
        found.charge(first, "abc", passed(300), killed)
    with Store.open(file) as store:
        found = Quotas(lambda: store)
        found.charge(first, "abc", passed(500), killed)
        found.charge(first, "abc", passed(10))
        found.charge(first, "abc", passed(30))
        others = dataclasses.replace(first, name="other", quota=None)
        (decision,) = found.decisions([first, others]).values()
        assert [one.used_bytes for one in decision.standings] == [530, 530]
        assert process.identity() != killed
    spans = [one.span for one in decision.standings]
    assert [quotas.used("video", span) for span in spans] == [530, 530]


def test_without_a_file_nothing_was_used(file) -> None:
    """For who only looks."""
    machine = ThisMachine(used=quotas.used)
    (decision,) = Quotas().decisions([rule()]).values()
    assert machine.used("video", decision.standings[0].span) == 0


def test_a_rule_without_a_quota_is_not_charged(file) -> None:
    """Nor is a file made, nor are counters read."""
    found = Quotas(lambda: pytest.fail("opened"))
    found.charge(dataclasses.replace(rule(), quota=None), "abc", lambda: pytest.fail("read"))


def test_who_uses_it_up_is_told_once(monkeypatch) -> None:
    """By the rule's name."""
    told = []
    monkeypatch.setattr(
        "pybpfthrottle.linux.journal.send", lambda text, *_: bool(told.append(text))
    )
    monkeypatch.setattr("pybpfthrottle.linux.desktop.notify", lambda *_: 0)
    found, mine = Quotas(), rule("warn")
    found.charge(mine, "abc", passed(1000))
    found.tell([mine])
    assert told == []
    found.charge(mine, "abc", passed(1024))
    for _ in range(2):
        found.tell([mine])
    (text,) = told
    assert text.startswith("video has used 1.0 KB of its 1.0 KB a day")


PAGE = Path(__file__).parents[3] / "docs/guides/quotas.md"
BLOCKS = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_the_page_is_a_rule(block, tmp_path) -> None:
    """That can be read, with a quota."""
    path = tmp_path / "rules.toml"
    path.write_text(block)
    (found,) = reading.read([str(path)]).rules
    assert found.quota is not None
    assert len(BLOCKS) == 2
