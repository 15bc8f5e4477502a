"""What the full screen shows, and in which order: rows as cells of text. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Callable, Iterable, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.inforce import InForce
from pybpfthrottle.linux.connections import Connection
from pybpfthrottle.model import (
    Direction,
    Rate,
    Target,
    Verdict,
    format_bytes,
    format_rate,
    printable,
)
from pybpfthrottle.traffic import ProcessTraffic
from pybpfthrottle.tui.columns import Cell, Column
from pybpfthrottle.tui.machine import Connections, Force, Look
from pybpfthrottle.usage import GROUPS, ORDERS, SCOPES, Row

# Trends reach so far back.
_HISTORY = 30
# The worst last: what a limit of both directions is judged by.
_VERDICTS = (
    *(Verdict.IDLE, Verdict.BELOW, Verdict.BURST, Verdict.THROTTLED, Verdict.BLOCKED),
    *(Verdict.OVER_LIMIT, Verdict.NOT_WORKING),
)
_STYLES = {
    **dict.fromkeys((Verdict.THROTTLED, Verdict.BLOCKED), "good"),
    **dict.fromkeys((Verdict.OVER_LIMIT, Verdict.NOT_WORKING), "bad"),
}
_LONGEST_AMOUNT = len("1023.9 KB")


class Signs(NamedTuple):
    """The characters that not all terminals have. ``levels`` are those of trends."""

    levels: str
    down: str
    up: str
    falling: str
    rising: str
    rule: str
    cut: str


UNICODE = Signs(" ▁▂▃▄▅▆▇█", "↓", "↑", "▼", "▲", "─", "…")
ASCII = Signs(" .:-=+*#@", "down", "up", "v", "^", "-", "~")


@dataclass
class View:
    """What is chosen to be seen. ``selected`` is the label of a row, ``frozen`` stops the news.

    ``interface`` is empty for all of them.
    """

    scope: str = "network"
    interface: str = ""
    group: str = "process"
    order: str = "rate"
    reverse: bool = False
    search: str = ""
    frozen: bool = False
    lines: Optional[int] = None
    groups: Sequence[str] = tuple(GROUPS)
    signs: Signs = UNICODE
    keeps: Callable[[ProcessTraffic], bool] = lambda one: True
    selected: Optional[str] = None
    look: Optional[Look] = None
    rows: Sequence[Row] = ()
    connections: Sequence[Moving] = ()
    _read: Optional[Connections] = None
    _history: dict[str, deque[float]] = field(default_factory=dict)

    def see(self, look: Look) -> None:
        """Show what was seen, unless frozen."""
        if self.frozen:
            return
        self.look = look
        rows = self.arrange()
        before, self._history = self._history, {}
        for row in rows:
            trend = before.get(row.label) or deque(maxlen=_HISTORY)
            trend.append(row.down + row.up)
            self._history[row.label] = trend

    def see_connections(self, read: Connections) -> None:
        """Show the connections of what is selected, unless frozen."""
        if not self.frozen and (self._read is None or read.at_s != self._read.at_s):
            self.connections = _moving(self._read, read)
            self._read = read

    def arrange(self) -> Sequence[Row]:
        """Choose and sort the rows; the selection stays with its row, or else where it was.

        Returns all rows, also those that are not sought.
        """
        position = self.position
        if self.look is None:
            return ()
        found = self.look.interval.rows(
            self.scope, self.group, self.order, self.keeps, self.interface
        )
        if self.reverse:
            found.reverse()
        self.rows = [row for row in found if self._is_sought(row)][: self.lines]
        if self.row is None:
            self.move_to(position)
        return found

    @property
    def row(self) -> Optional[Row]:
        """The selected row."""
        return next((row for row in self.rows if row.label == self.selected), None)

    @property
    def position(self) -> int:
        """The number of the selected row; 0 if there is none."""
        found = (number for number, row in enumerate(self.rows) if row.label == self.selected)
        return next(found, 0)

    def move_to(self, position: int) -> None:
        """Select the row with a number, or the nearest."""
        if self.rows:
            self.selected = self.rows[max(0, min(position, len(self.rows) - 1))].label

    def seek(self, text: str) -> None:
        """Show only rows with this text in a name, user, cgroup or process id."""
        self.search = text
        self.arrange()

    def sort(self, step: int) -> None:
        """Sort by the next order, or the one before."""
        self.order = _after(ORDERS, self.order, step)
        self.arrange()

    def turn_round(self) -> None:
        """Sort the other way round."""
        self.reverse = not self.reverse
        self.arrange()

    def next_group(self) -> None:
        """Add up by what comes next; trends begin anew."""
        self.group = _after(self.groups, self.group, 1)
        self._history = {}
        self.arrange()

    def next_scope(self) -> None:
        """Show the traffic that comes next; trends begin anew."""
        self.scope = _after(tuple(SCOPES), self.scope, 1)
        self._history = {}
        self.arrange()

    def next_interface(self) -> None:
        """Show what passes the interface that comes next, or all; trends begin anew."""
        known = self.look.interval.interfaces() if self.look is not None else []
        names = sorted({"", self.interface, *known})
        self.interface = _after(names, self.interface, 1)
        self._history = {}
        self.arrange()

    def plain(self, text: str) -> str:
        """Return a text of others as one line that this terminal can show."""
        text = printable(text)
        return text if self.signs is UNICODE else text.encode("ascii", "backslashreplace").decode()

    def status(self) -> list[Cell]:
        """Return the totals, and what is chosen to be seen."""
        signs, down, up = self.signs, sum(r.down for r in self.rows), sum(r.up for r in self.rows)
        cells = [
            Cell(f"{signs.down} {format_rate(down)}  {signs.up} {format_rate(up)}   ", "strong")
        ]
        if self.frozen:
            cells.append(Cell("FROZEN   ", "bad"))
        if self.search:
            cells.append(Cell(f"search: {self.plain(self.search)}   ", "strong"))
        count = f"{len(self.rows)} {self.group}"
        plural = ("es" if self.group == "process" else "s") * (len(self.rows) != 1)
        order = f"{self.order}, reversed" if self.reverse else self.order
        where = f"{self.scope} on {self.plain(self.interface)}" if self.interface else self.scope
        return [*cells, Cell(f"{count}{plural}   scope: {where}   sort: {order}")]

    def columns(self) -> list[Column]:
        """Return the columns of the table; those about limits only if there are any."""
        heads = {self.order: self.signs.rising if self.reverse else self.signs.falling}
        return [
            one.column._replace(head=heads.get(one.order, "") + one.column.head)
            for one in self._fields()
        ]

    def cells(self, row: Row) -> list[Cell]:
        """Return what a row has in each of the columns; a trend is as long as it can be."""
        return [one.cell(self, row) for one in self._fields()]

    def about(self, row: Row) -> list[Cell]:
        """Return what the panel below the table says of a row."""
        first = row.members[0]
        opened = sum(one.connection.open for one in self.connections)
        count = f"{opened} connection{'s' * (opened != 1)}"
        others = len(self.connections) - opened
        more = f", {others} other socket{'s' * (others != 1)}" if others else ""
        cells = [Cell(f"{self.plain(self.name(row))}: ", "strong"), Cell(count + more)]
        if self.group != "cgroup" and first.cgroup:
            cells.append(Cell(f"   {self.plain(cgroup_name(first.cgroup))}", "weak"))
        return cells

    def about_limits(self, row: Row) -> list[Cell]:
        """Return how a row is limited, and by whom."""
        told = []
        for one in row.throttles:
            for direction in one.limits:
                force = self._forces(one).get(direction)
                how = f" ({force.backend}, {force.shape})" if force else ""
                dropped = f", {force.reading.counters.packets_dropped} dropped" if force else ""
                told.append(f"{direction} {one.limit(direction)}{how}{dropped}")
            told.append(f"of {self.plain(one.target)}")
            told.append(f"by {self.plain(one.owner)}")
        return [Cell("limit: ", "strong"), Cell(", ".join(told))] if told else []

    def name(self, row: Row) -> str:
        """Return what a row is, in a word or two."""
        first = row.members[0]
        if self.group == "process":
            return "unknown" if first.pid is None else f"{first.pid} ({first.name})"
        if not row.label:
            return "unknown"
        return cgroup_name(row.label) if self.group == "cgroup" else row.label

    def connection_cells(self, one: Moving) -> list[Cell]:
        """Return a connection's cells, for CONNECTION_COLUMNS."""
        connection, description = one.connection, one.connection.description
        ends = ("" if end is None else str(end) for end in (description.local, description.remote))
        trip = connection.round_trip_s
        return [
            Cell(description.kind.words),
            *(Cell(self.plain(end)) for end in ends),
            Cell(description.state or ""),
            Cell("" if one.down is None else format_bytes(one.down)),
            Cell("" if one.up is None else format_bytes(one.up)),
            Cell("" if trip is None else f"{trip * 1000:.1f} ms"),
        ]

    def _fields(self) -> Iterable[_Field]:
        limited = any(row.throttles for row in self.rows)
        first = _FIRST[self.group]
        return [one for one in (*first, *_FIELDS) if limited or not one.about_limits]

    def _is_sought(self, row: Row) -> bool:
        sought = self.search.lower()
        return not sought or any(
            sought in text.lower()
            for one in row.members
            for text in (one.name, one.user_name(), one.cgroup, str(one.pid or ""))
        )

    def _forces(self, one: InForce) -> Mapping[Direction, Force]:
        return self.look.forces.get(one.id, {}) if self.look is not None else {}

    def _all_forces(self, row: Row) -> list[Force]:
        return [force for one in row.throttles for force in self._forces(one).values()]

    def _trend(self, row: Row) -> Cell:
        rates, levels = self._history.get(row.label, ()), self.signs.levels
        top = max(rates, default=0.0)
        # What is not quite nothing shows.
        steps = (int(-(-rate * (len(levels) - 1) // top)) if top else 0 for rate in rates)
        return Cell("".join(levels[step] for step in steps), "weak")

    def _verdict(self, row: Row) -> Cell:
        found = [force.reading.verdict for force in self._all_forces(row)]
        verdicts = [verdict for verdict in found if verdict is not None]
        if not verdicts:
            return Cell("")
        worst = max(verdicts, key=_VERDICTS.index)
        return Cell(worst.name.lower().replace("_", " "), _STYLES.get(worst, ""))

    def _how(self, row: Row) -> Cell:
        shapes = [force.shape for force in self._all_forces(row)]
        return Cell("/".join(dict.fromkeys(shapes)))

    def _drops(self, row: Row) -> Cell:
        forces = self._all_forces(row)
        dropped = sum(force.reading.counters.packets_dropped for force in forces)
        return Cell(str(dropped) if forces else "")


class Moving(NamedTuple):
    """A connection, and its bytes per second if it tells."""

    connection: Connection
    down: Optional[float] = None
    up: Optional[float] = None


CONNECTION_COLUMNS = [
    Column("proto", 5, 7, 4),
    Column("local", 18, 47, 3),
    Column("remote", 18, 47, 0),
    Column("state", 11, 0, 5),
    Column("down/s", _LONGEST_AMOUNT, 0, 1, right=True),
    Column("up/s", _LONGEST_AMOUNT, 0, 2, right=True),
    Column("round trip", 10, 0, 6, right=True),
]


def _moving(before: Optional[Connections], now: Connections) -> list[Moving]:
    """Return the connections with their rates since they were last read, the busiest first."""
    known = {one.inode: one for one in before.found} if before is not None else {}
    found = []
    for one in now.found:
        old = known.get(one.inode)
        if old is None or before is None:
            found.append(Moving(one))
            continue
        seconds = now.at_s - before.at_s
        down = _rate(one.received_bytes, old.received_bytes, seconds)
        found.append(Moving(one, down, _rate(one.sent_bytes, old.sent_bytes, seconds)))
    return sorted(found, key=lambda one: (not one.connection.open, -sum(filter(None, one[1:]))))


def _rate(later: Optional[int], earlier: Optional[int], seconds: float) -> Optional[float]:
    return None if later is None or earlier is None else max(0, later - earlier) / seconds


class _Field(NamedTuple):
    """A column of the table: what it has for a row, and which order it shows."""

    column: Column
    cell: Callable[[View, Row], Cell]
    order: str = ""
    about_limits: bool = False


def _process_name(view: View, row: Row) -> Cell:
    first = row.members[0]
    if first.alive or first.pid is None:
        return Cell(view.plain(first.name))
    return Cell(f"{view.plain(first.name)} (ended)", "weak")


def _limit(view: View, row: Row) -> Cell:
    limits = row.limits
    if any(one.paused for one in row.throttles):
        return Cell("paused", "weak")
    return Cell("/".join(_short(limits.get(direction)) for direction in Direction) * bool(limits))


def _short(rate: Optional[Rate]) -> str:
    return str(rate).removesuffix("B/s").replace(" ", "") if rate else "-"


def _count(view: View, row: Row) -> Cell:
    return Cell(str(row.processes))


_FIRST: Mapping[str, Sequence[_Field]] = {
    "process": (
        _Field(
            Column("pid", 7, 0, 3, right=True),
            lambda view, row: Cell(str(row.members[0].pid or "-")),
        ),
        _Field(Column("name", 12, 24, 0), _process_name, "name"),
        _Field(
            Column("user", 8, 12, 6), lambda view, row: Cell(view.plain(row.members[0].user_name()))
        ),
    ),
    **{
        group: (
            _Field(Column(group, 20, 80, 0), lambda view, row: Cell(view.plain(view.name(row)))),
            _Field(Column("processes", 9, 0, 3, right=True), _count),
        )
        for group in GROUPS
        if group != "process"
    },
}
_FIELDS: Sequence[_Field] = (
    _Field(
        Column("down/s", _LONGEST_AMOUNT, 0, 1, right=True),
        lambda view, row: Cell(format_bytes(row.down)),
        "down",
    ),
    _Field(
        Column("up/s", _LONGEST_AMOUNT, 0, 2, right=True),
        lambda view, row: Cell(format_bytes(row.up)),
        "up",
    ),
    _Field(Column("trend", 6, _HISTORY, 7, right=True), View._trend, "rate"),
    _Field(Column("limit d/u", 11, 0, 4), _limit, about_limits=True),
    _Field(Column("verdict", 11, 0, 5), View._verdict, about_limits=True),
    _Field(Column("how", 9, 16, 8), View._how, about_limits=True),
    _Field(Column("drops", 6, 0, 9, right=True), View._drops, about_limits=True),
    _Field(
        Column("downloaded", 10, 0, 10, right=True),
        lambda view, row: Cell(format_bytes(row.total.download_bytes)),
        "total",
    ),
    _Field(
        Column("uploaded", _LONGEST_AMOUNT, 0, 11, right=True),
        lambda view, row: Cell(format_bytes(row.total.upload_bytes)),
        "total",
    ),
)


def cgroup_name(path: str) -> str:
    """Return a cgroup's path without where cgroups are mounted."""
    return path.removeprefix("/sys/fs/cgroup").removeprefix("/unified") or "/"


def target_of(row: Row, group: str) -> Target:
    """Return what is limited where a row is. Raises ThrottleError if that is nothing."""
    first = row.members[0]
    if not row.label or first.pid is None:
        raise ThrottleError("what belongs to no known process, or is no group, cannot be limited")
    if group == "process":
        return Target(pids=(first.pid,))
    kinds = {"name": "names", "user": "users", "cgroup": "cgroups"}
    if group in kinds:
        return Target.from_json({kinds[group]: [row.label]})
    if group == "unit" and "/" not in row.label:
        return Target(units=(row.label,))
    cgroups = sorted({one.cgroup for one in row.members})
    if group in ("unit", "container") and len(cgroups) == 1:
        return Target(cgroups=(cgroups[0],))
    raise ThrottleError(f"{group} {row.label} cannot be limited as a whole; g shows other groups")


def throttles_of(row: Row, group: str) -> Sequence[InForce]:
    """Return the throttles that are changed and removed where a row is.

    For a process those that limit it, whatever else they limit; for a group those of the group.
    Raises ThrottleError if there are only others of its members.
    """
    if group == "process" or not row.throttles:
        return row.throttles
    target = target_of(row, group)
    own = [one for one in row.throttles if one.record.spec.target == target]
    if not own:
        one = row.throttles[0]
        raise ThrottleError(
            f"there is a limit of {one.target} already: remove that one first (g shows processes)"
        )
    return own


def _after(values: Sequence[str], value: str, step: int) -> str:
    return values[(values.index(value) + step) % len(values)]
