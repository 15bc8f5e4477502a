"""What the full screen shows, worked out without a screen."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import K, M, limited, moving

from pybpfthrottle.backends.protocol import Match
from pybpfthrottle.cli import screen
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.inforce import Cover, InForce
from pybpfthrottle.linux.connections import Connection
from pybpfthrottle.linux.endpoints import Description, Endpoint, Kind
from pybpfthrottle.model import MAX_RATE, MIN_RATE, Direction, Rate, Target
from pybpfthrottle.tui.columns import Column, fit
from pybpfthrottle.tui.machine import Connections, Look
from pybpfthrottle.tui.view import ASCII, CONNECTION_COLUMNS, View, target_of, throttles_of
from pybpfthrottle.usage import Interval, Row

COLUMNS = [Column("a", 3, 10, 1), Column("b", 5, 5, 0), Column("c", 4, 8, 2)]


def look(*processes, throttles=()) -> Look:
    """A look at processes a second after they had moved nothing."""
    return Look(Interval([], processes, 1.0, Cover(list(throttles))), {})


def only_row(process, group="process", throttles=()) -> Row:
    """The row of a process."""
    interval = Interval([], [process], 1.0, Cover([]))
    (row,) = interval.rows(group=group)
    return row._replace(throttles=tuple(throttles))


@pytest.mark.parametrize(
    ("width", "placed"),
    [
        (1, {1: 1}),
        (8, {1: 5}),
        (9, {0: 3, 1: 5}),
        (13, {0: 7, 1: 5}),
        (14, {0: 3, 1: 5, 2: 4}),
        (25, {0: 10, 1: 5, 2: 8}),
        (99, {0: 10, 1: 5, 2: 8}),
    ],
)
def test_the_least_important_columns_go_first(width, placed) -> None:
    """What is left over widens the others, the most important ones first."""
    assert fit(COLUMNS, width) == placed


@given(st.integers(1, 400))
def test_columns_never_need_more_than_there_is(width) -> None:
    """Whatever the width, with a space between them."""
    for columns in (COLUMNS, CONNECTION_COLUMNS, View().columns()):
        placed = fit(columns, width)
        assert placed
        assert sum(placed.values()) + len(placed) - 1 <= width


def test_a_trend_is_relative_to_its_own_peak() -> None:
    """The peak is full, nothing is empty, and next to nothing is not nothing."""
    view = View(signs=ASCII)
    for rate in (800, 0, 1, 400):
        view.see(look(moving(1, "a", rate, 1 if rate == 0 else 0)))
    heads = [column.head for column in view.columns()]
    trend = view.cells(view.rows[0])[heads.index("vtrend")].text
    assert trend[0] == ASCII.levels[-1]
    assert trend[1:3] == ASCII.levels[1] * 2
    assert trend[3] == ASCII.levels[4]


@pytest.mark.parametrize(
    ("group", "target"),
    [
        ("process", Target(pids=(7,))),
        ("name", Target(names=("curl",))),
        ("user", Target(users=("root",))),
        ("cgroup", Target(cgroups=("/sys/fs/cgroup/a",))),
        ("unit", Target(units=("a.service",))),
    ],
)
def test_a_row_is_limited_as_what_it_is(group, target) -> None:
    """By the same kind of target as the option of that name."""
    where = "/a.service" if group == "unit" else "/a"
    assert target_of(only_row(moving(7, "curl", 1, 1, cgroup=where), group), group) == target


def test_a_container_is_limited_by_its_cgroup() -> None:
    """If it has but one; what has several cannot be limited as a whole."""
    where = f"/system.slice/docker-{'a1' * 32}.scope"
    row = only_row(moving(7, "curl", 1, 1, cgroup=where), "container")
    assert target_of(row, "container") == Target(cgroups=(f"/sys/fs/cgroup{where}",))
    other = moving(8, "curl", 1, 1, cgroup=f"{where}/inner")
    with pytest.raises(ThrottleError, match="as a whole"):
        target_of(row._replace(members=(*row.members, other)), "container")


@pytest.mark.parametrize("group", ["process", "name", "user", "cgroup"])
def test_what_belongs_to_nobody_is_no_target(group) -> None:
    """Whatever it is added up by."""
    with pytest.raises(ThrottleError, match="cannot be limited"):
        target_of(only_row(moving(None, "unknown", 1, 1), group), group)


def test_a_group_has_the_throttles_of_the_group_only() -> None:
    """Those of its members are changed where they are: in their own rows."""
    process = moving(7, "curl", 1, 1)
    own = limited(Target(pids=(7,)), download=Rate(M))
    whole = limited(Target(names=("curl",)), key="other", download=Rate(M))
    assert throttles_of(only_row(process, throttles=[own, whole]), "process") == (own, whole)
    assert throttles_of(only_row(process, "name", [own, whole]), "name") == [whole]
    with pytest.raises(ThrottleError, match="limit of"):
        throttles_of(only_row(process, "name", [own]), "name")


def test_connections_have_rates_from_the_second_look_on() -> None:
    """The busiest comes first, what has no other end last."""
    kind, here, there = Kind(2, 1, 6), Endpoint("192.0.2.1", 1), Endpoint("192.0.2.2", 2)
    listener = Connection(1, 3, Description(kind, here, None, "listen"))

    def read(at_s: float, first: int, second: int) -> Connections:
        made = Description(kind, here, there, "established")
        moved = [Connection(1, 1, made, first, 0), Connection(1, 2, made, second, 0)]
        return Connections(at_s, [listener, *moved])

    view = View()
    view.see_connections(read(1.0, 0, 0))
    assert {one.down for one in view.connections} == {None}
    view.see_connections(read(3.0, K, 3 * K))
    found = [(one.connection.inode, one.down) for one in view.connections]
    assert found == [(2, 1.5 * K), (1, 0.5 * K), (3, None)]
    view.see_connections(read(3.0, 9 * K, 9 * K))  # the same look again
    assert [(one.connection.inode, one.down) for one in view.connections] == found


def test_a_limit_of_sockets_is_not_one_of_a_cgroup(monkeypatch) -> None:
    """Although it is attached to one: only the processes with marked sockets are limited."""
    one = limited(Target(pids=(7,)), download=Rate(M))
    record = one.record.__class__(
        **{**vars(one.record), "cgroups": ("/sys/fs/cgroup",), "match": Match.MARKS}
    )
    monkeypatch.setattr("pybpfthrottle.inforce.get_backend", lambda name: Marks)
    monkeypatch.setattr(type(record), "visible_cgroups", lambda record: [Root])
    marked = InForce((record,))
    assert Cover([marked]).of(7, "/sys/fs/cgroup/a") == [marked]
    assert Cover([marked]).of(8, "/sys/fs/cgroup/a") == []
    whole = InForce((record.__class__(**{**vars(record), "match": Match.CGROUP}),))
    assert Cover([whole]).of(8, "/sys/fs/cgroup/a") == [whole]


class Marks:
    """A backend that limits one process."""

    @staticmethod
    def processes(record) -> list[int]:
        """As Backend.processes."""
        return [7]


class Root:
    """The root cgroup."""

    path = "/sys/fs/cgroup"


def test_both_parts_of_a_throttle_count() -> None:
    """Each backend has a direction of its own; the lowest limit of a direction is what counts."""
    one = limited(Target(pids=(7,)), download=Rate(M))
    two = limited(Target(pids=(7,)), upload=Rate(2 * M))
    both = InForce((one.record, two.record))
    other = limited(Target(pids=(7,)), key="other", download=Rate(K))
    row = only_row(moving(7, "curl", 1, 1), throttles=[both, other])
    assert row.limits == {Direction.DOWNLOAD: Rate(K), Direction.UPLOAD: Rate(2 * M)}


@given(st.integers(MIN_RATE.bytes_per_s, MAX_RATE.bytes_per_s))
def test_a_limit_is_written_as_it_is_read(number) -> None:
    """Exactly, so that to confirm the dialog of an old limit changes nothing."""
    assert Rate.parse(Rate(number).written()) == Rate(number)


@pytest.mark.parametrize(
    ("number", "text"),
    [(M, "1M"), (1536 * K, "1536K"), (1_000_000, "8mbit"), (1001, "1001"), (1000, "8kbit")],
)
def test_a_limit_is_written_as_people_do(number, text) -> None:
    """In the largest unit that is exact."""
    assert Rate(number).written() == text


@pytest.mark.parametrize(
    ("environment", "encoding", "unicode"),
    [
        ({"LANG": "en_US.UTF-8"}, "utf-8", True),
        ({"LANG": "en_US.utf8"}, "utf-8", True),
        ({"LC_CTYPE": "UTF-8"}, "utf-8", True),
        ({"LANG": "C.UTF-8", "LC_ALL": "C"}, "utf-8", False),
        ({"LANG": "C"}, "utf-8", False),
        ({}, "utf-8", False),
        ({"LC_CTYPE": "C.UTF-8"}, "utf-8", False),
        ({"LANG": "en_US.UTF-8", "LC_CTYPE": "C.UTF-8"}, "utf-8", True),
        ({"LANG": "en_US.UTF-8"}, "ascii", False),
        ({"LANG": "de_DE.ISO-8859-1"}, "iso8859-1", False),
    ],
)
def test_which_locales_have_more_than_ascii(environment, encoding, unicode) -> None:
    """As the user has set them: Python replaces the C locale by C.UTF-8."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    assert screen._shows_unicode(stream, environment) is unicode


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        """As for a file."""
        return True


@pytest.fixture
def possible(monkeypatch):
    """Says whether the full screen is possible, with terminals but for one standard stream."""
    monkeypatch.setenv("TERM", "xterm")

    def ask(without: str = "") -> bool:
        # pytest replaces them between a fixture and the test.
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.StringIO() if name == without else Terminal())
        return screen.is_possible()

    return ask


def test_a_terminal_and_textual_are_needed(possible, monkeypatch) -> None:
    """With both, the full screen is possible; not on a terminal that can only append."""
    assert possible()
    monkeypatch.setenv("TERM", "dumb")
    assert not possible()


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_without_a_terminal_it_is_not_possible(possible, name) -> None:
    """Keys come from one, and the picture goes to another."""
    assert not possible(without=name)


@pytest.mark.parametrize("version", [None, "0.89.1", "2.1.2", "odd"])
def test_without_the_right_textual_it_is_not_possible(possible, monkeypatch, version) -> None:
    """Neither without any, nor with one that is too old."""

    def told(name: str) -> str:
        if version is None:
            raise screen.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(screen, "version", told)
    assert not possible()
