"""Lines to standard error that begin with the program's name."""

from __future__ import annotations

from contextlib import suppress

import click


def printable(text: str) -> str:
    """A name that others chose may hold anything: what is no text is shown escaped."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def say(line: str) -> None:
    """One line."""
    # The terminal, or whoever reads standard error, may be gone.
    with suppress(OSError):
        click.echo(f"pybpfthrottle: {printable(line)}", err=True)
