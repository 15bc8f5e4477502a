"""Terminal output: whatever the command line prints for people goes through here.

Names chosen by others may contain anything, including escape sequences and newlines. No other
module calls click.echo.
"""

from __future__ import annotations

import os
from contextlib import suppress
from errno import EMFILE
from typing import IO, Any, Callable, Optional

import click

from pybpfthrottle.model import printable

PROGRAM = "pybpfthrottle: "

# Clears the live line, so that other output begins on an empty line.
make_room: list[Callable[[], None]] = []


def clear_the_line() -> None:
    """Clear the live line. Raises OSError."""
    for clear in make_room:
        clear()


def echo(line: str = "", *, err: bool = False, file: Optional[IO[Any]] = None) -> None:
    """Print one line, with unprintable characters escaped. Raises OSError."""
    clear_the_line()
    click.echo(printable(line), file=file, err=err)


def echo_lines(text: str, *, err: bool = False) -> None:
    """Print text whose newlines are intended. Raises OSError."""
    for line in text.split("\n"):
        echo(line.expandtabs(), err=err)


def echo_json(text: str, *, file: Optional[IO[Any]] = None) -> None:
    """Print JSON, in which unprintable characters are escaped already. Raises OSError."""
    click.echo(text, file=file)


def is_terminal(file: Optional[IO[Any]]) -> bool:
    """Whether a file is a terminal that can do more than append."""
    if file is None or os.environ.get("TERM") in ("dumb", "unknown"):
        return False
    return file.isatty()


def say(line: str) -> None:
    """Print one line that begins with the program's name, to standard error."""
    # The terminal, or the reader of standard error, may be gone.
    with suppress(OSError):
        echo(PROGRAM + line, err=True)


def say_error(error: Exception) -> None:
    """Print an error, and what to do where its cause is not in what was asked for."""
    cause: Optional[BaseException] = error
    while cause is not None and getattr(cause, "errno", None) != EMFILE:
        cause = cause.__cause__ or cause.__context__
    remedy = "" if cause is None else "; allow this process more of them: ulimit -n 1024"
    say(f"error: {why(error)}{remedy}")


def why(error: Exception) -> str:
    """Return an error's text without an errno; where bpf(2) refused it, what is behind that."""
    if not (isinstance(error, OSError) and error.filename and error.strerror):
        return str(error)
    if not str(error.filename).startswith("BPF_"):
        return f"{error.filename}: {error.strerror}"
    from pybpfthrottle.backends.ebpf import privileges

    return privileges.why_refused(error, str(error.filename))


def show_error(error: click.ClickException) -> None:
    """Show a usage error as click does, in one line."""
    # Only click's list of choices has newlines, never the user's input.
    if isinstance(error, click.MissingParameter):
        error.show()
        return
    # A group of commands without one of them: its help. click before 8.2 prints that itself.
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        echo_lines(error.format_message(), err=True)
        return
    message = printable(error.format_message())
    if isinstance(error, click.UsageError):
        error = click.UsageError(message, error.ctx)
    else:
        error = click.ClickException(message)
    error.show()
