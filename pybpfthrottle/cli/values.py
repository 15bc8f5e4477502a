"""The values of options that several commands have: rates, times, processes, files to record to."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from typing import Any, Optional

import click

from pybpfthrottle.cli import completing
from pybpfthrottle.errors import LimitError
from pybpfthrottle.model import Rate

_MAX_DURATION_S = 10 * 366 * 86400.0
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_rate(ctx: click.Context, param: click.Parameter, text: Optional[str]) -> Optional[Rate]:
    """Return a limit, as Rate.parse reads it."""
    if text is None:
        return None
    try:
        return Rate.parse(text)
    except LimitError as error:
        raise click.BadParameter(str(error)) from error


def parse_duration(
    ctx: click.Context, param: click.Parameter, text: Optional[str]
) -> Optional[float]:
    """Return ``5``, ``0.5``, ``90s``, ``2h`` or ``1h30m`` in seconds; more than 0."""
    if text is None:
        return None
    seconds = _seconds(text.strip())
    if not 0 < seconds <= _MAX_DURATION_S:
        raise click.BadParameter(
            f"{text!r} is not a duration: give seconds above 0 and up to ten years, such as 5 or"
            " 0.5, or use a unit: 90s, 1m, 2h, 1d"
        )
    return seconds


def _seconds(text: str) -> float:
    """Return a duration in seconds, or NaN if it is not a duration."""
    parts = re.findall(r"([0-9.]+)([smhd])", text.lower(), re.ASCII)
    if parts and "".join(map("".join, parts)) != text.lower():
        return math.nan
    with suppress(ValueError):
        if not parts:
            return float(text)
        return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
    return math.nan


class ProcessId(click.IntRange):  # type: ignore[misc]  # mypy does not read click
    """The id of a process, with clear errors for what ``--pid "$(pgrep x)"`` may give instead."""

    name = "pid"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> Any:
        """Return the number."""
        text = str(value).strip()
        if not text:
            self.fail("a process id is missing: the value is empty (did pgrep find nothing?)")
        if len(text.split()) > 1:
            self.fail(f"{text!r} is several process ids; repeat the option for each")
        if re.match(r"-+[A-Za-z]", text):
            self.fail(f"a process id is missing before {text}")
        return super().convert(text, param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        """Return the processes that run, with their names."""
        return completing.pids(ctx, param, incomplete)


class RecordFile(click.File):  # type: ignore[misc]  # mypy does not read click
    """The name of a file to record to: its ending tells the form; ``-`` is CSV."""

    def __init__(self) -> None:
        super().__init__("w", lazy=False)

    def convert(
        self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]
    ) -> Any:
        """Return the Output, whose file is empty."""
        from pybpfthrottle.cli.records import CSV, FORMS, Output

        if isinstance(value, Output):
            return value
        form = CSV if value == "-" else FORMS.get(os.path.splitext(value)[1].lower(), "")
        if not form:
            self.fail(f"{value!r} must end in .csv for CSV, or in .jsonl or .json for JSON lines")
        return Output(super().convert(value, param, ctx), form, on_stdout=value == "-")


def record_option(command: Any) -> Any:
    """Add the option --record."""
    option = click.option(
        "--record",
        type=RecordFile(),
        metavar="FILE",
        help="Record every second to FILE, as CSV (.csv) or JSON lines (.jsonl); - is CSV on"
        " standard output. See pybpfthrottle plot.",
    )
    return option(command)
