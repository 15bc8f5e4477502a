"""Lines to standard error that begin with the program's name."""

from __future__ import annotations

from contextlib import suppress

import click


def say(line: str) -> None:
    """One line; what a user's string may hold that is no text is shown escaped."""
    printable = "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in line
    )
    # The terminal, or whoever reads standard error, may be gone.
    with suppress(OSError):
        click.echo(f"pybpfthrottle: {printable}", err=True)
