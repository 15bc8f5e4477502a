"""pybpfthrottle usage: what was moved in the last days, and recording it in the foreground."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from contextlib import ExitStack
from typing import Any, Optional, Sequence

import click

from pybpfthrottle import history, traffic
from pybpfthrottle.cli import tables
from pybpfthrottle.cli.records import csv_text
from pybpfthrottle.cli.say import echo, echo_json, is_terminal
from pybpfthrottle.history import Line, Recorder
from pybpfthrottle.linux.signals import SignalQueue
from pybpfthrottle.model import Moved, format_bytes, printable
from pybpfthrottle.periods import Span
from pybpfthrottle.store import Store, default_path
from pybpfthrottle.supervisor import Supervisor

SCHEMA = 1
DAY = "day"
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNITS_DAYS = {"d": 1, "w": 7}
_MOST_DAYS = 3660
# How subjects without a name are shown.
_REST, _NONE = "(others)", "(none)"
_BAR = 20


def usage(
    path: Optional[str], *, last: str, by: str, records: bool, as_json: bool, as_csv: bool
) -> None:
    """Record, or show. Raises an error of this package."""
    path = path or default_path()
    if records and (as_json or as_csv):
        raise click.UsageError("--record prints nothing; give --json or --csv without it")
    if as_json and as_csv:
        raise click.UsageError("give --json or --csv, not both")
    if records:
        _record(path)
    else:
        _show(path, history.last_days(_days(last)), by, as_json=as_json, as_csv=as_csv)


def _days(text: str) -> int:
    """Return a number of days, given as ``30d``, ``4w`` or ``30``."""
    found = re.fullmatch("([0-9]{1,4})([dw]?)", text.strip().lower())
    days = int(found[1]) * _UNITS_DAYS[found[2] or "d"] if found else 0
    if not 1 <= days <= _MOST_DAYS:
        raise click.UsageError(
            f"--last: {text!r} is not a number of days: give days or weeks, such as 30d or 4w"
        )
    return days


def _record(path: str) -> None:
    """Record what is moved until a signal comes."""
    with ExitStack() as stack:
        signals = stack.enter_context(SignalQueue(_STOP))
        supervisor = stack.enter_context(Supervisor())
        watch = stack.enter_context(traffic.watch())
        recorder = Recorder(stack.enter_context(Store.open(path)), watch)
        supervisor.add(lambda: [watch, *recorder.chores()])
        supervisor.add(lambda: [signals], strict=True)
        echo(f"Recording the usage to {path}. Ctrl-C ends it.")
        sys.stdout.flush()
        while not signals.take():
            supervisor.step(math.inf)


def _show(path: str, span: Span, by: str, *, as_json: bool, as_csv: bool) -> None:
    """Show what was moved on some days."""
    lines = history.read(path, "name" if by == DAY else by, span)
    if as_csv:
        echo_json(_csv(lines, by).rstrip("\n"))
    elif as_json:
        tables.show_json(_json(lines, by, span))
    elif not lines:
        echo(f"Nothing was recorded from {span.first} on.")
    else:
        _print(lines, by)


def _json(lines: Sequence[Line], by: str, span: Span) -> dict[str, Any]:
    told: list[dict[str, Any]]
    if by == DAY:
        told = [
            {"day": day.isoformat(), **_bytes(moved)}
            for day, moved in history.by_day(lines).items()
        ]
    else:
        days: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for line in lines:
            day = {"day": line.day.isoformat(), **_bytes(line.moved)}
            days.setdefault((line.subject, line.rest), []).append(day)
        told = [
            {by: None if who[1] else who[0], **_bytes(moved), "days": days[who]}
            for who, moved in history.by_subject(lines).items()
        ]
    first, last = span.first.isoformat(), span.last.isoformat()
    return {"schema": SCHEMA, "first": first, "last": last, "by": by, "usage": told}


def _bytes(moved: Moved) -> dict[str, int]:
    return {"download_bytes": moved.download, "upload_bytes": moved.upload}


def _csv(lines: Sequence[Line], by: str) -> str:
    """Return a row for each day and subject."""
    if by == DAY:
        days = history.by_day(lines)
        return csv_text([(DAY, *_bytes(Moved())), *((day, *moved) for day, moved in days.items())])
    named = ((one.day, _name(one.subject, one.rest), *one.moved) for one in lines)
    return csv_text([(DAY, by, *_bytes(Moved())), *named])


def _name(subject: str, rest: bool) -> str:
    return _REST if rest else subject or _NONE


def _print(lines: Sequence[Line], by: str) -> None:
    if by == DAY:
        named = {day.isoformat(): moved for day, moved in history.by_day(lines).items()}
    else:
        named = {_name(*who): moved for who, moved in history.by_subject(lines).items()}
    total = Moved()
    for moved in named.values():
        total = total.plus(moved)
    if is_terminal(sys.stdout):
        _table(named, by, total)
        return
    rows = [(name, *_cells(moved)) for name, moved in named.items()]
    tables.show([(by, *_HEADS), *rows, ("total", *_cells(total))])


_HEADS = ("download", "upload", "total")


def _cells(moved: Moved) -> tuple[str, ...]:
    return (*map(format_bytes, moved), format_bytes(sum(moved)))


def _table(named: dict[str, Moved], by: str, total: Moved) -> None:
    """Show it in colour, with bars."""
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, no_color="NO_COLOR" in os.environ or None)
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=True)
    table.add_column(by, "total", overflow="ellipsis", no_wrap=True)
    for name, sum_of_all in zip(_HEADS, _cells(total)):
        table.add_column(name, sum_of_all, justify="right", no_wrap=True)
    table.add_column("", width=_BAR)
    most = max(map(sum, named.values()))
    for name, moved in named.items():
        bar = Bar(most, 0, sum(moved), color="cyan")
        table.add_row(Text(printable(name)), *_cells(moved), bar)
    console.print(table)
