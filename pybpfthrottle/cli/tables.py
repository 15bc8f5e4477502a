"""Records as a plain table or as JSON."""

from __future__ import annotations

import json
from typing import Any, Sequence

from pybpfthrottle.cli.say import echo, echo_json
from pybpfthrottle.model import printable

_WIDEST = 60  # characters; with the other columns of a list about 120


def show(rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
    """Print rows of text in columns as wide as necessary."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths))
        echo((indent + "  ".join(cells)).rstrip())


def shortened(text: str) -> str:
    """Return the beginning of a text that would make its column too wide."""
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def show_json(value: Any) -> None:
    """Print a value as indented JSON."""
    echo_json(json.dumps(value, indent=2))


def show_records(records: Sequence[dict[str, Any]], *, as_json: bool, none: str) -> None:
    """Print records as a table with a row each, or as JSON; print ``none`` if there are none."""
    if as_json:
        show_json(records)
    elif not records:
        echo(none)
    else:
        keys = list(dict.fromkeys(key for record in records for key in record))
        show([keys, *([_cell(record.get(key)) for key in keys] for record in records)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value)
