"""The file of what was counted, and what rules have passed by it, whatever happens."""

from __future__ import annotations

import builtins
import os
import signal
import sqlite3
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest
from since import needs_machine

from pybpfthrottle import store as store_module
from pybpfthrottle.errors import StoreError
from pybpfthrottle.ledger import Ledger, Tally
from pybpfthrottle.model import Counters, Direction, Moved
from pybpfthrottle.periods import Span
from pybpfthrottle.store import Store, default_path, reading

ROOT = Path(__file__).resolve().parents[3]
NOVEMBER = Span(date(2026, 11, 1), date(2026, 12, 1))
DAY = "2026-11-26"


@pytest.fixture
def path(tmp_path) -> str:
    """Where a file may be."""
    return str(tmp_path / "state" / "usage.db")


def counted(down: int, up: int = 0) -> dict[Direction, Counters]:
    """What a throttle tells that has passed this much, and dropped 7 bytes."""
    return {
        Direction.DOWNLOAD: Counters(1, 1, down + 7, 1, 7),
        Direction.UPLOAD: Counters(1, 1, up + 7, 1, 7),
    }


def test_a_rule_has_what_its_throttles_have_passed(path) -> None:
    """Dropped bytes are none of it; days outside the period neither; both directions count."""
    with Store.open(path) as store:
        ledger = Ledger(store)
        ledger.count("video", "a", counted(100, 10), DAY)
        ledger.count("video", "a", counted(150, 10), DAY)
        ledger.count("video", "b", counted(5), "2026-11-01")
        ledger.count("video", "c", counted(3), "2026-12-01")
        ledger.count("other", "d", counted(1000), DAY)
        assert ledger.used("video", NOVEMBER) == 165
        assert store.write()
        assert ledger.used("video", NOVEMBER) == 165


def test_what_was_used_grows_whatever_begins_anew(path) -> None:
    """A throttle that stays goes on where it was; one that counts anew adds all that it has."""
    used = []
    for throttle, passed in [("a", 100), ("a", 130), ("b", 20), ("b", 25), ("b", 5)]:
        with Store.open(path) as store:
            ledger = Ledger(store)
            ledger.count("video", throttle, counted(passed), DAY)
            used.append(ledger.used("video", NOVEMBER))
    assert used == [100, 130, 150, 155, 160]


def test_without_a_file_it_counts_in_memory() -> None:
    """Until the process ends."""
    ledger = Ledger(None)
    ledger.count("video", "a", counted(100), DAY)
    ledger.count("video", "a", counted(110), DAY)
    assert ledger.used("video", NOVEMBER) == 110


def test_it_does_not_grow_for_ever(path, monkeypatch) -> None:
    """The latest days and counters stay."""
    monkeypatch.setattr("pybpfthrottle.ledger._MOST_DAYS", 3)
    monkeypatch.setattr("pybpfthrottle.ledger._MOST_COUNTERS", 2)
    with Store.open(path) as store:
        ledger = Ledger(store)
        for day in range(1, 9):
            ledger.count("video", f"throttle {day}", counted(1), f"2026-11-0{day}")
            store.write()
        assert store.rows("SELECT day FROM passed") == [(f"2026-11-0{day}",) for day in (6, 7, 8)]
        assert len(store.rows("SELECT * FROM counter")) == 2


def test_a_tally_forgets_what_nobody_looks_at(path) -> None:
    """It is read again if somebody does."""
    with Store.open(path) as store:
        tally = Tally(store)
        store.add(tally)
        assert tally.added("", "a", Moved(5, 5)) == (5, 5)
        store.write()
        store.write()
        assert tally._last == {}
        assert tally.added("", "a", Moved(6, 7)) == (1, 2)


def test_the_file_is_root_s_alone(path) -> None:
    """Nobody else may read who has used what."""
    with Store.open(path) as store:
        Ledger(store)
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700


def test_two_processes_do_not_write_to_it(path) -> None:
    """They would count everything twice; reading is possible all the time."""
    with Store.open(path) as store:
        ledger = Ledger(store)
        ledger.count("video", "a", counted(100), DAY)
        store.write()
        with pytest.raises(StoreError, match="another process records"):
            Store.open(path)
        with reading(path) as query:
            assert query("SELECT rule, download FROM passed WHERE day = ?", DAY) == [("video", 100)]
    Store.open(path).close()


def test_who_may_not_read_it_is_told_so(path) -> None:
    """And not that nothing was recorded."""
    needs_machine("root, to become somebody else", found=os.geteuid() == 0)
    Store.open(path).close()
    os.seteuid(65534)
    try:
        with pytest.raises(StoreError, match="only root may"), reading(path):
            pass
    finally:
        os.seteuid(0)
    with pytest.raises(StoreError, match="nothing was recorded yet"), reading(path + "2"):
        pass


def spoil(path: str, how: str) -> None:
    """Do something to the file or its directory that somebody else could have done."""
    directory = os.path.dirname(path)
    os.mkdir(directory, 0o700)
    if how == "directory of another user":
        os.chown(directory, 4711, 4711)
    elif how == "directory for all":
        os.chmod(directory, 0o777)  # noqa: S103
    elif how == "directory that is a link":
        os.rename(directory, directory + "2")
        os.symlink(directory + "2", directory)
    elif how == "link":
        os.symlink("/etc/passwd", path)
    elif how == "hard link":
        Path(path).touch(0o600)
        os.link(path, path + "2")
    elif how == "pipe":
        os.mkfifo(path, 0o600)
    else:
        Path(path).touch(0o600)
        if how == "another user":
            os.chown(path, 4711, 4711)
        elif how == "writable":
            os.chmod(path, 0o666)  # noqa: S103
        elif how == "of another program":
            with sqlite3.connect(path) as database:
                database.execute("CREATE TABLE passwords (secret)")
        elif how == "of a later version":
            with sqlite3.connect(path) as database:
                database.executescript(store_module._SCHEMA + "PRAGMA user_version = 99")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("directory of another user", "belongs to another user"),
        ("directory for all", "chmod go-w"),
        ("directory that is a link", "cannot use"),
        ("link", "not a regular file"),
        ("hard link", "not a regular file"),
        ("pipe", "not a regular file"),
        ("another user", "belongs to another user"),
        ("writable", "chmod go-w"),
        ("of another program", "another program"),
        ("of a later version", "newer version"),
    ],
)
def test_what_somebody_else_may_have_made_is_refused(path, how, says) -> None:
    """Root writes to nothing that others chose, and leaves it as it is."""
    if how.endswith("another user"):
        needs_machine("root, to give a file away", found=os.geteuid() == 0)
    spoil(path, how)
    with pytest.raises(StoreError, match=says):
        Store.open(path)
    assert not os.path.exists(path + ".damaged")


@pytest.mark.parametrize("how", ["text", "cut off", "overwritten"])
def test_a_damaged_file_is_moved_aside(path, how, caplog) -> None:
    """That is said, and a new one is begun; the journal of the old one is not applied to it."""
    with Store.open(path) as store:
        ledger = Ledger(store)
        for day in range(500):
            ledger.count(f"rule {day}", "a", counted(100), DAY)
    data = Path(path).read_bytes()
    broken = {
        "text": b"no database\n" * 100,
        "cut off": data[: len(data) // 2],
        "overwritten": data[:4096] + b"\xff" * (len(data) - 4096),
    }[how]
    Path(path).write_bytes(broken)
    Path(path + "-journal").write_bytes(b"\xff" * 600)
    with Store.open(path) as store:
        assert store.rows("SELECT * FROM passed") == []
        ledger = Ledger(store)
        ledger.count("rule 1", "a", counted(3), DAY)
    assert "moved to" in caplog.text
    assert Path(path + ".damaged").read_bytes() == broken
    with reading(path) as query:
        assert query("SELECT rule, download FROM passed") == [("rule 1", 3)]


def test_a_file_that_is_damaged_or_deleted_meanwhile_is_made_anew(path, caplog) -> None:
    """What is in memory is not lost: what is new, and what rules were known to have used."""
    with Store.open(path) as store:
        ledger = Ledger(store)
        ledger.count("video", "a", counted(100), DAY)
        assert ledger.used("video", NOVEMBER) == 100
        assert store.write()
        os.unlink(path)
        ledger.count("video", "a", counted(150), DAY)
        assert store.write()
        with reading(path) as query:
            assert query("SELECT download FROM passed") == [(50,)]
        Path(path).write_bytes(b"garbage" * 1000)
        ledger.count("video", "a", counted(155), DAY)
        assert store.write()
        assert ledger.used("video", NOVEMBER) == 155
    assert "moved to" in caplog.text


def test_a_full_disk_is_said_once_and_nothing_is_lost(path, caplog) -> None:
    """What could not be written is written when there is room."""
    with Store.open(path) as store:
        ledger = Ledger(store)
        assert store.write()
        [[pages]] = store.rows("PRAGMA page_count")
        store.rows(f"PRAGMA max_page_count = {pages}")
        for round_ in range(3):
            for rule in range(100):
                ledger.count(f"{rule}{'x' * 100}", "a", counted(10 + round_), DAY)
            assert not store.write()
        assert ledger.used(f"7{'x' * 100}", NOVEMBER) == 12
        assert caplog.text.count("disk is full") == 1
        assert store.rows("SELECT * FROM passed") == []
        store.rows("PRAGMA max_page_count = 100000")
        assert store.write()
        assert store.rows("SELECT DISTINCT download FROM passed") == [(12,)]
        assert "is written again" in caplog.text


def test_a_killed_writer_leaves_a_sound_file(path) -> None:
    """At whatever moment: both sums of each of its writes are there, or neither."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pybpfthrottle.ledger import Ledger
from pybpfthrottle.model import Counters, Direction
from pybpfthrottle.store import Store
store = Store.open({path!r})
ledger = Ledger(store)
for count in range(1, 10**9):
    for rule in range(50):
        ledger.count(str(rule), "a", {{Direction.DOWNLOAD: Counters(1, 1, count)}}, {DAY!r})
    assert store.write()
    print(count, flush=True)
"""
    for pause_s in (0.0, 0.003, 0.011):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as writer:
            assert writer.stdout
            writer.stdout.readline()
            time.sleep(pause_s)
            writer.send_signal(signal.SIGKILL)
        with reading(path) as query:
            sums = dict(query("SELECT rule, download FROM passed"))
            counters = query("SELECT owner, download FROM counter")
        assert len(sums) == 50
        assert len(set(sums.values())) == len({down for _, down in counters}) == 1
    with Store.open(path) as store:
        assert store.rows("PRAGMA quick_check") == [("ok",)]


def test_a_python_without_sqlite_says_so(path, monkeypatch) -> None:
    """In one sentence, with what to do."""

    def refuse(name, *rest, real=builtins.__import__):
        if name == "sqlite3":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(StoreError, match="no sqlite3"):
        Store.open(path)


def test_the_file_is_in_systemd_s_state_directory(monkeypatch) -> None:
    """Or where that would be."""
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert default_path() == "/var/lib/pybpfthrottle/usage.db"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/one:/var/lib/two")
    assert default_path() == "/var/lib/one/usage.db"
