"""The files of packages: for /usr/share manual pages, completion and the SBOM; units of systemd."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

from packing import manpages, sbom


def files() -> Iterator[tuple[str, str]]:
    """Yield each file's place and text."""
    from pybpfthrottle.cli import completion
    from pybpfthrottle.cli.commands.bare import cli

    for page in manpages.pages(cli):
        yield f"man/man{manpages.SECTION}/{page.file}", page.source
    for shell, place in completion.FILES.items():
        yield place, completion.script(shell, cli)
    yield f"doc/pybpfthrottle/{sbom.NAME}", sbom.text()


def write_units(directory: Path) -> None:
    """Write the units of systemd for a program in /usr/bin."""
    from pybpfthrottle import unitfiles

    directory.mkdir(parents=True, exist_ok=True)
    program = unitfiles.Program(["/usr/bin/pybpfthrottle"])
    (directory / unitfiles.DAEMON).write_text(unitfiles.daemon(program))


def write(directory: Path) -> None:
    """Write all of them below a directory."""
    for place, text in files():
        path = directory / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
