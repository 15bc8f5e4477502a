"""The border to the terminal: whatever the command line prints for people goes through here.

Names that others chose may hold anything, escape sequences and newlines too. Nobody else calls
click.echo.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO, Any, Callable, Optional

import click

from pybpfthrottle.model import printable

# Takes the live line away, so that a line which is not its own begins on an empty one.
make_room: list[Callable[[], None]] = []


def echo(line: str = "", *, err: bool = False, file: Optional[IO[Any]] = None) -> None:
    """Print one line; what is no text in it is shown escaped. Raises OSError."""
    for clear in make_room:
        clear()
    click.echo(printable(line), file=file, err=err)


def echo_lines(text: str, *, err: bool = False) -> None:
    """Print a text whose newlines are meant. Raises OSError."""
    for line in text.split("\n"):
        echo(line.expandtabs(), err=err)


def echo_json(text: str, *, file: Optional[IO[Any]] = None) -> None:
    """Print JSON, which has all that is no text escaped already. Raises OSError."""
    click.echo(text, file=file)


def is_terminal(file: Optional[IO[Any]]) -> bool:
    """Whether a file is a terminal that can do more than to append."""
    if file is None or os.environ.get("TERM") in ("dumb", "unknown"):
        return False
    return file.isatty()


def say(line: str) -> None:
    """Print one line that begins with the program's name, to standard error."""
    # The terminal, or whoever reads standard error, may be gone.
    with suppress(OSError):
        echo(f"pybpfthrottle: {line}", err=True)


def show_error(error: click.ClickException) -> None:
    """Show a mistake in the usage as click does, in one line."""
    # Only its list of choices has newlines, and nothing of what was given.
    if isinstance(error, click.MissingParameter):
        error.show()
        return
    message = printable(error.format_message())
    if isinstance(error, click.UsageError):
        error = click.UsageError(message, error.ctx)
    else:
        error = click.ClickException(message)
    error.show()
