"""The files for /usr/share or the like: manual pages, and completion for the shells."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

from packing import manpages


def files() -> Iterator[tuple[str, str]]:
    """Yield each file's place and text."""
    from pybpfthrottle.cli import completion
    from pybpfthrottle.cli.app import cli

    for page in manpages.pages(cli):
        yield f"man/man{manpages.SECTION}/{page.file}", page.source
    for shell, place in completion.FILES.items():
        yield place, completion.script(shell, cli)


def write(directory: Path) -> None:
    """Write all of them below a directory."""
    for place, text in files():
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
