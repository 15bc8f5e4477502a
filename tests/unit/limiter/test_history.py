"""What was moved on which day, as it is written down and told."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from datetime import date, datetime
from zoneinfo import ZoneInfo

import pytest
from click.testing import CliRunner

from pybpfthrottle import history
from pybpfthrottle.cli.commands.bare import cli
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.history import Line, Recorder, Throttled
from pybpfthrottle.model import Moved
from pybpfthrottle.periods import Span
from pybpfthrottle.store import Store
from pybpfthrottle.traffic import ProcessTraffic, Scope, Usage
from pybpfthrottle.usage import moved_since

NETWORK = (Scope.INTERNET, Scope.LOCAL)
ALL = Span(date(1970, 1, 1), date(2100, 1, 1))


def one(number: int, name: str, down: int, up: int = 0, **fields) -> ProcessTraffic:
    """A process that has moved so much, and more on loopback."""
    usage = {
        Scope.INTERNET: Usage(1, down - 1, 1, up),
        Scope.LOCAL: Usage(1, 1, 0, 0),
        Scope.LOOPBACK: Usage(9, 9999, 9, 9999),
    }
    told = ProcessTraffic(number, number, name, 0, "/c/system.slice/a.service", True, usage)
    return replace(told, **fields)


class Watched:
    """A watch that tells what it is told."""

    def __init__(self) -> None:
        self.found: list[ProcessTraffic] = []
        self.error = None

    def snapshot(self) -> list[ProcessTraffic]:
        """As Watch.snapshot."""
        if self.error:
            raise self.error
        return list(self.found)


class World:
    """A recorder of a watch and of throttles, at a time that is set."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.watch = Watched()
        self.throttles: list[Throttled] = []
        self.store = Store.open(path)
        self.recorder = Recorder(self.store, self.watch, lambda: self.throttles)

    def lines(self, kind: str = "name") -> list[tuple[str, str, int, int]]:
        """What the file has, after a write."""
        assert self.store.write()
        return [
            (line.day.isoformat(), "*" if line.rest else line.subject, *line.moved)
            for line in history.read(self.path, kind, ALL)
        ]


@pytest.fixture
def clock(monkeypatch):
    """Sets the time, in Berlin; time.time() is it until it is set again."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()

    def put(text: str) -> None:
        at = datetime.fromisoformat(text).replace(tzinfo=ZoneInfo("Europe/Berlin"))
        monkeypatch.setattr(history.time, "time", at.timestamp)

    put("2026-11-26T12:00")
    yield put
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def world(tmp_path, clock):
    """A recorder that has just begun."""
    made = World(str(tmp_path / "usage.db"))
    os.chmod(tmp_path, 0o700)
    with made.store:
        yield made


def test_what_processes_move_is_added_up(world) -> None:
    """By name, unit, container and user, without loopback; what was moved before is not."""
    inside = "/c/lxc.payload.web/x"
    world.watch.found = [one(1, "curl", 100, 10), one(2, "curl", 50), one(3, "x", 7, cgroup=inside)]
    assert world.lines() == [("2026-11-26", "curl", 150, 10), ("2026-11-26", "x", 7, 0)]
    world.watch.found = [one(1, "curl", 101, 10), *world.watch.found[1:]]
    assert world.lines()[0] == ("2026-11-26", "curl", 151, 10)
    assert world.lines("unit") == [("2026-11-26", "a.service", 151, 10), ("2026-11-26", "", 7, 0)]
    assert world.lines("container")[1] == ("2026-11-26", "lxc/web", 7, 0)
    assert world.lines("user") == [("2026-11-26", "root", 158, 10)]


def test_a_day_ends_at_local_midnight(world, clock) -> None:
    """The recorder is due then, and what was moved until then is of the day that ends."""
    clock("2026-11-26T23:59:30")
    world.recorder.run()
    world.watch.found = [one(1, "curl", 100)]
    assert world.recorder.due_s - time.monotonic() == pytest.approx(30, abs=5)
    clock("2026-11-27T00:00:00.100")
    world.recorder.run()
    world.watch.found = [one(1, "curl", 105)]
    assert world.recorder.due_s - time.monotonic() == pytest.approx(86400, abs=5)
    clock("2026-11-27T00:00:30")
    assert world.lines() == [("2026-11-26", "curl", 100, 0), ("2026-11-27", "curl", 5, 0)]


def test_the_day_that_the_clock_is_put_back_has_25_hours(world, clock) -> None:
    """The recorder waits for its midnight."""
    clock("2026-10-25T00:00")
    world.recorder.run()
    assert world.recorder.due_s - time.monotonic() == pytest.approx(25 * 3600, abs=5)


def test_a_clock_that_jumps_costs_nothing(world, clock, monkeypatch) -> None:
    """Not even many days into the future and back: the other days stay, nothing is negative."""
    monkeypatch.setattr(history, "_MOST_DAYS", 4)
    for number, day in enumerate(("2026-11-24", "2026-11-25", "2036-01-01", "2026-11-26")):
        clock(f"{day}T10:00")
        world.recorder.run()
        world.watch.found = [one(1, "curl", 100 * (number + 1))]
        world.lines()
    assert [(day, down) for day, _, down, _ in world.lines()] == [
        ("2026-11-24", 100),
        ("2026-11-25", 100),
        ("2026-11-26", 100),
        ("2036-01-01", 100),
    ]


def test_the_oldest_days_are_forgotten(world, clock, monkeypatch) -> None:
    """So many of them are kept."""
    monkeypatch.setattr(history, "_MOST_DAYS", 2)
    for day in (24, 25, 26, 27):
        clock(f"2026-11-{day}T10:00")
        world.recorder.run()
        world.watch.found = [one(1, "curl", 100 * day)]
        world.lines()
    assert [day for day, *_ in world.lines()] == ["2026-11-26", "2026-11-27"]


def test_the_smallest_are_added_up(world, monkeypatch) -> None:
    """Those that have moved the most have a line; the sum is that of all."""
    monkeypatch.setattr(history, "_MOST_SUBJECTS", 3)
    world.watch.found = [one(number, f"p{number}", number) for number in range(1, 7)]
    assert len(world.lines()) == 6
    world.watch.found += [one(7, "p7", 7)]
    assert world.lines() == [
        *(("2026-11-26", f"p{number}", number, 0) for number in (7, 6, 5)),
        ("2026-11-26", "*", 1 + 2 + 3 + 4, 0),
    ]


def test_while_it_cannot_be_written_memory_is_bounded(world, monkeypatch) -> None:
    """Those that come later are added up."""
    monkeypatch.setattr(history, "_MOST_NEW", 8)
    world.watch.found = [one(number, f"p{number}", number) for number in range(1, 100)]
    world.recorder.update()
    assert len(world.recorder._new) <= 12
    assert sum(down for *_, down, _ in world.lines()) == sum(range(1, 100))


def test_what_turns_out_to_be_another_s_is_moved(world) -> None:
    """A listener was charged for what its worker has moved: no sum is counted twice."""
    world.watch.found = [one(1, "listener", 1000)]
    assert world.lines() == [("2026-11-26", "listener", 1000, 0)]
    world.watch.found = [one(1, "listener", 10), one(2, "worker", 1000)]
    assert world.lines() == [("2026-11-26", "worker", 1000, 0), ("2026-11-26", "listener", 10, 0)]
    world.watch.found = [one(1, "listener", 1), one(2, "worker", 1000)]
    assert world.lines()[1] == ("2026-11-26", "listener", 1, 0)


def test_ended_processes_that_are_added_up_have_moved_nothing(world) -> None:
    """Their sum is that of both, and was counted already."""
    world.watch.found = [one(1, "curl", 100), one(2, "curl", 50), one(3, "other", 20)]
    world.lines()
    world.watch.found = [one(1, "curl", 150, processes=2), one(3, "other", 20)]
    assert world.lines() == [("2026-11-26", "curl", 150, 0), ("2026-11-26", "other", 20, 0)]


def test_what_is_moved_while_processes_are_added_up_counts() -> None:
    """As much as is new."""
    before = [one(1, "curl", 100), one(2, "curl", 50)]
    after = [one(1, "curl", 157, processes=2)]
    assert [moved for _, moved in moved_since(before, after, NETWORK)] == [(7, 0)]


def test_a_throttle_s_own_counters_count(world) -> None:
    """By its rule, from the first byte; also after a restart of the recorder, and of a throttle."""
    world.throttles = [Throttled("backup", "a", Moved(100, 10)), Throttled("backup", "b", Moved(1))]
    world.lines()
    world.store.close()
    second = World(world.path)
    with second.store:
        second.throttles = [Throttled("backup", "a", Moved(120, 10))]
        assert second.lines("rule") == [("2026-11-26", "backup", 121, 10)]
        second.throttles = [Throttled("backup", "c", Moved(7))]
        assert second.lines("rule") == [("2026-11-26", "backup", 128, 10)]


def test_a_look_that_fails_is_said_and_made_up_for(world, caplog) -> None:
    """By the next one; what throttles pass is noted meanwhile."""
    world.watch.found = [one(1, "curl", 100)]
    world.watch.error = ProcessError("no look")
    world.throttles = [Throttled("backup", "a", Moved(100))]
    assert world.lines() == []
    assert "no look" in caplog.text
    assert world.lines("rule") != []
    world.watch.error = None
    assert world.lines() == [("2026-11-26", "curl", 100, 0)]


HOSTILE = "=\x1b[31m\n\udcff" + "x" * 500


def test_hostile_names_are_escaped_and_cut_off(world) -> None:
    """Whatever a process, unit or throttle is called."""
    world.watch.found = [one(1, HOSTILE, 100)]
    world.throttles = [Throttled("'); DROP TABLE usage; --", "a", Moved(5))]
    [(_, name, down, _)] = world.lines()
    assert name.startswith("=\\x1b[31m\\n\\udcffxxx")
    assert (len(name), down) == (200, 100)
    assert world.lines("rule") == [("2026-11-26", "'); DROP TABLE usage; --", 5, 0)]


def test_lines_are_added_up_by_subject_and_by_day() -> None:
    """The most first, what has no line of its own last; days in their order."""
    first, second = date(2026, 11, 25), date(2026, 11, 26)
    lines = [
        Line(second, "a", False, Moved(1, 1)),
        Line(first, "b", False, Moved(5, 0)),
        Line(first, "", True, Moved(100, 0)),
        Line(first, "a", False, Moved(1, 1)),
    ]
    assert history.by_subject(lines) == {
        ("b", False): (5, 0),
        ("a", False): (2, 2),
        ("", True): (100, 0),
    }
    assert list(history.by_subject(lines)) == [("b", False), ("a", False), ("", True)]
    assert list(history.by_day(lines).items()) == [(first, (106, 1)), (second, (1, 1))]


@pytest.fixture
def usage(world, monkeypatch):
    """Runs pybpfthrottle usage on a file of two days."""
    monkeypatch.setattr(history, "_MOST_SUBJECTS", 2)
    world.watch.found = [one(1, "curl", 3000, 100), one(2, HOSTILE, 2000), one(3, "", 1000)]
    world.lines()
    world.watch.found += [one(4, "d", 10), one(5, "e", 10)]
    world.lines()

    def run(*options: str):
        done = CliRunner().invoke(cli, ["usage", "--file", world.path, *options])
        assert done.exit_code == 0, done
        return done.output

    return run


def test_usage_shows_a_table(usage) -> None:
    """With the sum, and names that cannot do anything to the terminal."""
    head, *rows, total = usage("--last", "2d").splitlines()
    assert head.split() == ["name", "download", "upload", "total"]
    assert [row.split()[0] for row in rows] == ["curl", rows[1].split()[0], "(others)"]
    assert rows[1].startswith("=\\x1b[31m\\n\\udcff")
    assert total.split() == ["total", *["5.9", "KB", "100", "B", "6.0", "KB"]]


def test_usage_shows_bars_on_a_terminal(usage, monkeypatch) -> None:
    """By rich; as wide as the terminal."""
    monkeypatch.setattr("pybpfthrottle.cli.usage.is_terminal", lambda file: True)
    monkeypatch.setenv("COLUMNS", "90")
    shown = usage()
    assert "█" in shown
    assert "\x1b[31m" not in shown
    assert max(map(len, shown.splitlines())) <= 90


def test_usage_tells_scripts_each_day(usage) -> None:
    """With what has no line of its own."""
    told = json.loads(usage("--json", "--last", "2d"))
    assert (told["schema"], told["by"]) == (1, "name")
    assert (told["first"], told["last"]) == ("2026-11-25", "2026-11-26")
    first, _, rest = told["usage"]
    assert first == {
        "name": "curl",
        "download_bytes": 3000,
        "upload_bytes": 100,
        "days": [{"day": "2026-11-26", "download_bytes": 3000, "upload_bytes": 100}],
    }
    assert (rest["name"], rest["download_bytes"]) == (None, 1020)
    assert json.loads(usage("--json", "--by", "day"))["usage"] == [
        {"day": "2026-11-26", "download_bytes": 6020, "upload_bytes": 100}
    ]


def test_usage_as_csv_has_no_formulas(usage) -> None:
    """A row for each day and subject; a name that begins with = is none."""
    head, first, second, rest = usage("--csv").splitlines()
    assert head == "day,name,download_bytes,upload_bytes"
    assert first == "2026-11-26,curl,3000,100"
    assert second.startswith("2026-11-26,'=")
    assert rest == "2026-11-26,(others),1020,0"
    assert usage("--csv", "--by", "day").splitlines()[1] == "2026-11-26,6020,100"


def test_usage_of_other_days_is_nothing(usage, clock) -> None:
    """Today is the last of them."""
    clock("2026-12-03T10:00")
    assert usage("--last", "1w") == "Nothing was recorded from 2026-11-27 on.\n"
    assert "curl" in usage("--last", "8")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--last", "0d"], "30d"),
        (["--last", "1h"], "30d"),
        (["--last", "9999w"], "30d"),
        (["--record", "--json"], "without it"),
        (["--json", "--csv"], "not both"),
    ],
)
def test_wrong_usage_of_usage_is_refused(options, says) -> None:
    """With what is accepted."""
    done = CliRunner().invoke(cli, ["usage", *options])
    assert done.exit_code == 2
    assert says in done.output


def test_a_file_that_is_not_there_is_told(tmp_path) -> None:
    """With what records it."""
    path = str(tmp_path / "usage.db")
    done = CliRunner().invoke(cli, ["usage", "--file", path])
    assert "usage --record" in str(done.exception)
    assert not os.path.exists(path)
