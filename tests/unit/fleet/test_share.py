"""A machine's part of a total that many share, with a real Redis, a broken one and none."""

from __future__ import annotations

import re
import shlex
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis_server import fake, free_port, redis, until

from pybpfthrottle.errors import SettingsError
from pybpfthrottle.fleet import share as shares
from pybpfthrottle.fleet.redis import Connection, parse
from pybpfthrottle.fleet.share import FleetShare
from pybpfthrottle.model import MIN_RATE, Rate

TOTAL = Rate(100_000_000)
GUIDE = Path(__file__).parents[3] / "docs/guides/fleet.md"


@pytest.fixture(autouse=True)
def quicker(monkeypatch):
    """They agree more often than once a second, and wait less for what does not come."""
    monkeypatch.setattr(shares, "_PERIOD_S", 0.05)
    monkeypatch.setattr(shares, "_LONGEST_PAUSE_S", 0.1)


def fleet(port, count, **options):
    """Some machines that share the total."""
    url = f"redis://127.0.0.1:{port}/0"
    return [FleetShare(url, "backups", TOTAL, **options) for _ in range(count)]


def parts(machines, *demands):
    """The part of each, in millions."""
    return [share.part(demand).bytes_per_s // 1_000_000 for share, demand in zip(machines, demands)]


def test_three_agree_on_fair_parts():
    """What one does not want the others get; and what is left when one leaves."""
    with redis() as (_, port), ExitStack() as stack:
        first, second, third = [stack.enter_context(one) for one in fleet(port, 3)]
        until(lambda: parts([first, second, third], None, 4_000_000, None) == [48, 4, 48])
        third.close()
        until(lambda: parts([first, second], None, 4_000_000) == [96, 4])
        second.close()
        until(lambda: parts([first], 0) == [100])
        with Connection(parse(f"redis://127.0.0.1:{port}"), 20.0) as connection:
            [left, names] = connection.ask(("PTTL", "pybpfthrottle:backups"), ("KEYS", "*"))
            assert 0 < left <= 60_000  # it expires by itself
            assert names == [b"pybpfthrottle:backups"]


def test_a_server_that_is_gone_leaves_the_last_part_and_then_a_safe_one():
    """The safe one is an equal part of the machines that there were; until it is back."""
    clock = [1000.0]
    port = free_port()
    with ExitStack() as stack:
        machines = fleet(port, 4, clock=lambda: clock[0])
        wanted = (None, 4_000_000, None, None)
        with redis(port=port):
            for one in machines:
                stack.enter_context(one)
            until(lambda: parts(machines, *wanted) == [32, 4, 32, 32])
            assert machines[0].notes() == []
        until(lambda: all(one.notes() for one in machines))
        [note] = machines[0].notes()
        assert note.startswith(f"no agreement through redis://127.0.0.1:{port}/0: ")
        assert parts(machines, *wanted) == [32, 4, 32, 32]
        clock[0] += shares._KEEP_S - 0.1
        assert parts(machines, *wanted) == [32, 4, 32, 32]
        clock[0] += 0.2
        assert parts(machines, *wanted) == [25, 25, 25, 25]
        with redis(port=port):
            until(lambda: parts(machines, *wanted) == [32, 4, 32, 32])
            until(lambda: not machines[0].notes())


def test_the_rights_that_the_guide_names_are_enough():
    """And none of them is missing for what is done only now and then."""
    [told] = re.findall(r"^redis-cli (ACL SETUSER .*)$", GUIDE.read_text(), re.M)
    with redis() as (_, port):
        where = f"127.0.0.1:{port}/0"
        with Connection(parse(f"redis://{where}"), 20.0) as connection:
            old = ("HSET", "pybpfthrottle:backups", "old", "1 1")
            assert connection.ask(tuple(shlex.split(told)), old) == [b"OK", 1]
        with FleetShare(
            f"redis://throttle:password@{where}", "backups", TOTAL, machines=9
        ) as share:
            until(lambda: parts([share], None) == [100])
            assert share.notes() == []
        with Connection(parse(f"redis://{where}"), 20.0) as connection:
            until(lambda: connection.ask(("HLEN", "pybpfthrottle:backups")) == [0])


def test_without_an_answer_as_many_share_as_are_told_at_least():
    """Otherwise it would be the whole total for each of them."""
    [alone] = fleet(free_port(), 1)
    [many] = fleet(free_port(), 1, machines=20)
    assert parts([alone, many], None, None) == [100, 5]


def test_a_machine_that_died_is_forgotten(monkeypatch):
    """Its entry no longer counts after a while, and later it is deleted."""
    monkeypatch.setattr(shares, "_GONE_S", 0.5)
    monkeypatch.setattr(shares, "_FORGOTTEN_S", 1.0)
    with redis() as (_, port), ExitStack() as stack:
        one, other = fleet(port, 2)
        stack.enter_context(one)
        with Connection(parse(f"redis://127.0.0.1:{port}"), 20.0) as connection:
            other._agree(connection)  # once, and never again
            until(lambda: parts([one], None) == [50])
            until(lambda: parts([one], None) == [100])
            until(lambda: connection.ask(("HLEN", "pybpfthrottle:backups")) == [1])


@pytest.mark.parametrize(
    "command",
    [
        ("SET", "pybpfthrottle:backups", "a text"),
        ("HSET", "pybpfthrottle:backups", "evil", "1" * 5000),
        ("HSET", "pybpfthrottle:backups", "evil", "-5 -5"),
        ("HSET", "pybpfthrottle:backups", "evil", "9999999999999999 9999999999999999"),
        ("HSET", "pybpfthrottle:backups", "evil\x1b[2J", "٣ ٣"),
    ],
)
def test_what_others_write_raises_nobody_above_the_total(command):
    """Whatever its type and size; who reads it goes on."""
    with redis() as (_, port):
        with Connection(parse(f"redis://127.0.0.1:{port}"), 20.0) as connection:
            connection.ask(command)
            [share] = fleet(port, 1)
            with suppress(PermissionError):  # of the wrong type
                share._agree(connection)
        assert parts([share], None) == [100]


@pytest.mark.parametrize("answer", [b"", b"+OK\r\n", b"\0" * 100, b"*2\r\n$1\r\n1\r\n$1\r\n2\r\n"])
def test_a_server_that_is_none_is_waited_for_by_a_thread_alone(answer, monkeypatch):
    """The part is there at once, and leaving takes a moment."""
    monkeypatch.setattr(shares, "_PATIENCE_S", 0.2)
    with fake(answer) as port:
        [share] = fleet(port, 1)
        with share:
            until(share.notes)
            assert parts([share], None) == [100]
            assert share._thread.is_alive()
            [note] = share.notes()
            assert len(note) < 120


VALUES = st.recursive(
    st.one_of(st.none(), st.integers(), st.binary(max_size=20), st.just(b"5 5"), st.just(b"7")),
    lambda inner: st.lists(inner, max_size=6),
    max_leaves=20,
)


class Told:
    """A connection that answers with made-up values."""

    def __init__(self, time_of_day, hash_):
        self.answers = [[time_of_day], [1, 1, hash_], [0]]

    def ask(self, *commands):
        """The next answer."""
        return self.answers.pop(0)


@settings(deadline=None)
@given(st.one_of(VALUES, st.just([b"7", b"7"])), VALUES, st.integers(-(10**9), 10**12))
def test_whatever_is_told_the_part_is_between_the_least_and_the_total(time_of_day, hash_, demand):
    """Or it is an error of the server, which is noted."""
    share = FleetShare("redis://x", "g", TOTAL)
    share.part(demand)
    with suppress(OSError):
        share._agree(Told(time_of_day, hash_))
    assert MIN_RATE <= share.part(demand) <= TOTAL


def test_thousands_of_false_machines_slow_it_down_to_the_least_rate_only():
    """Who may write there can do that; a total is never exceeded by it."""
    flat = [text for i in range(4000) for text in (b"%d" % i, b"7000 99999999999")]
    share = FleetShare("redis://x", "g", Rate(2_000_000))
    share._agree(Told([b"7", b"0"], flat))
    assert share.part() == MIN_RATE


def test_an_address_that_is_none_is_refused():
    """Before anything is begun."""
    with pytest.raises(SettingsError, match="shared is no address of a Redis"):
        FleetShare("localhost", "g", TOTAL)
