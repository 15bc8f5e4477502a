"""pybpfthrottle top and monitor: who uses the line."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Callable, Iterator, Optional, Sequence

import click

from pybpfthrottle import traffic
from pybpfthrottle.cli import screen, tables
from pybpfthrottle.cli.records import CSV, Output, flat
from pybpfthrottle.cli.say import echo, echo_json, is_terminal
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.model import Direction, format_bytes, format_rate, printable
from pybpfthrottle.targets import user_id
from pybpfthrottle.traffic import ProcessTraffic, Watch
from pybpfthrottle.usage import Intervals, Row

SCHEMA = 1
_LINES_AROUND = 4
# Who looks at a screen sees something so soon.
_FIRST_S = 0.05


@dataclass(frozen=True)
class Options:
    """What the command line asks for. ``keeps`` tells which processes are of interest."""

    interval_s: float = 1.0
    scope: str = "network"
    group: str = "process"
    order: str = "rate"
    lines: Optional[int] = None
    once: bool = False
    as_json: bool = False
    plain: bool = False
    interfaces: tuple[str, ...] = ()
    keeps: Callable[[ProcessTraffic], bool] = lambda one: True

    def watch(self) -> Watch:
        """Begin to count what is to be shown. Raises an error of this package."""
        return traffic.watch(interfaces=self.interfaces, remotes=self.group == "remote")


def top(options: Options) -> None:
    """Show who uses the line, until it is told to end, or once. Raises an error of this package."""
    if not (options.plain or options.once or options.as_json) and screen.is_possible():
        screen.show(options)
        return
    with options.watch() as watch:
        tables_of_rows = _intervals(watch, options)
        if options.once:
            _show(next(tables_of_rows), options)
        elif is_terminal(sys.stdout) and not options.as_json:
            _full_screen(tables_of_rows, options)
        else:
            for rows in tables_of_rows:
                _show(rows, options)


def monitor(options: Options, record: Optional[Output] = None) -> None:
    """Print a line for each process, or group, every interval. Raises an error of this package."""
    silent = record is not None and record.on_stdout
    with options.watch() as watch:
        for rows in _intervals(watch, options):
            now = time.time()
            for row in rows[: options.lines]:
                fields = {"time": round(now, 3), "by": options.group, **row.to_json()}
                if record is not None:
                    record.write(flat(fields) if record.form == CSV else fields)
                if options.as_json:
                    echo_json(json.dumps(fields))
                elif not silent:
                    clock = time.strftime("%H:%M:%S", time.localtime(now))
                    echo(f"{clock}  {'  '.join(_cells(row, options))}")


def _intervals(watch: Watch, options: Options) -> Iterator[list[Row]]:
    """Yield the rows of each interval, in order."""
    intervals = Intervals(watch)
    lives = is_terminal(sys.stdout) and not (options.once or options.as_json)
    wait_s = min(_FIRST_S, options.interval_s) if lives else options.interval_s
    while True:
        time.sleep(wait_s)
        wait_s = options.interval_s
        yield intervals.next().rows(options.scope, options.group, options.order, options.keeps)


_HEADS = {
    "process": ("pid", "name", "user"),
    "name": ("name",),
    "user": ("user",),
    "cgroup": ("cgroup",),
    "unit": ("unit",),
    "container": ("container",),
    "interface": ("interface",),
    "remote": ("remote",),
}
_NUMBERS = ("down/s", "up/s", "downloaded", "uploaded", "limit down", "limit up")


def _head(options: Options) -> tuple[str, ...]:
    return (*_HEADS[options.group], *_NUMBERS)


def _cells(row: Row, options: Options) -> tuple[str, ...]:
    first = row.members[0]
    names = {
        "pid": "-" if first.pid is None else str(first.pid),
        "name": first.name if first.alive or first.pid is None else f"{first.name} (ended)",
        "user": first.user_name() or "-",
        "cgroup": first.cgroup or "-",
        "unit": first.unit or "-",
        "container": first.container or "-",
        "interface": first.share,
        "remote": first.share,
    }
    if options.group == "name":
        names["name"] = first.name
    return (
        *(names[head] for head in _HEADS[options.group]),
        format_rate(row.down),
        format_rate(row.up),
        format_bytes(row.total.download_bytes),
        format_bytes(row.total.upload_bytes),
        *(
            str(row.limits.get(direction) or "-")
            for direction in (Direction.DOWNLOAD, Direction.UPLOAD)
        ),
    )


def _show(rows: Sequence[Row], options: Options) -> None:
    rows = rows[: options.lines]
    if options.as_json:
        found = [row.to_json() for row in rows]
        echo_json(
            json.dumps(
                {"schema": SCHEMA, "time": round(time.time(), 3), "scope": options.scope}
                | {"processes": found},
                indent=2 if options.once else None,
            )
        )
    elif not rows:
        echo("nobody has sent or received anything")
    else:
        tables.show([_head(options), *(_cells(row, options) for row in rows)])
        if not options.once:
            echo()


def _full_screen(tables_of_rows: Iterator[list[Row]], options: Options) -> None:
    """Redraw the table in place; the terminal is as it was afterwards."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, no_color="NO_COLOR" in os.environ or None)
    with Live(Text("counting..."), console=console, screen=True, auto_refresh=False) as live:
        for rows in tables_of_rows:
            table = Table(box=None, expand=True, pad_edge=False, header_style="bold")
            for name in _head(options):
                right = name in _NUMBERS or name == "pid"
                table.add_column(name, justify="right" if right else "left", no_wrap=True)
            room = max(1, console.height - _LINES_AROUND)
            for row in rows[: min(room, options.lines or room)]:
                table.add_row(*(Text(printable(cell)) for cell in _cells(row, options)))
            down, up = sum(row.down for row in rows), sum(row.up for row in rows)
            table.caption = Text(
                f"{format_rate(down)} down, {format_rate(up)} up ({options.scope}); Ctrl-C ends it"
            )
            live.update(table, refresh=True)


def kept(
    pids: Sequence[int], names: Sequence[str], users: Sequence[str], cgroups: Sequence[str]
) -> Callable[[ProcessTraffic], bool]:
    """Return what tells whether a process is one of those; all are if nothing is given.

    Raises ProcessError for processes and users that do not exist: they would never be shown.
    """
    for pid in pids:
        if not os.path.exists(f"/proc/{pid}"):
            raise ProcessError(f"there is no process {pid}")
    for user in users:
        user_id(user)
    if not (pids or names or users or cgroups):
        return lambda one: True
    paths = [os.path.realpath(path) for path in cgroups]
    for path in paths:
        if not os.path.isdir(path):
            raise click.UsageError(f"--cgroup {path}: there is no such cgroup")

    def keeps(one: ProcessTraffic) -> bool:
        return (
            one.pid in pids
            or one.name in names
            or one.user_name() in users
            or (one.user is not None and str(one.user) in users)
            or any(one.cgroup == path or one.cgroup.startswith(path + "/") for path in paths)
        )

    return keeps
