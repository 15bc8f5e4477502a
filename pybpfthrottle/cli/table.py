"""Columns of text."""

from __future__ import annotations

from typing import Sequence

import click


def print_table(rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
    """Print rows, the first of them the titles, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths))
        click.echo((indent + "  ".join(cells)).rstrip())
