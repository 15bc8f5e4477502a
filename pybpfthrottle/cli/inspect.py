"""pybpfthrottle inspect: what an object file has in it."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from pybpfthrottle.bpf import elf
from pybpfthrottle.cli import tables
from pybpfthrottle.diagnostics import inspection

_PROGRAM = ("name", "section", "type", "expected_attach_type", "instructions", "maps")
_MAP = ("name", "type", "key_size", "value_size", "max_entries", "flags")


def inspect(path: str, *, as_json: bool) -> None:
    """Show it. Raises ObjectFileError with section and offset of what is wrong."""
    found = inspection.describe(elf.read_file(path))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    title = f"{os.path.basename(path)}: {found['byteorder']}-endian, license {found['license']!r}"
    click.echo(title)
    for what, fields in (("programs", _PROGRAM), ("maps", _MAP)):
        click.echo(f"{what}:")
        tables.show([fields, *(_cells(row, fields) for row in found[what])], indent="  ")
    for fault in found["faults"]:
        click.echo(f"warning: {fault}")


def _cells(row: dict[str, Any], fields: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_cell(row[field]) for field in fields)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "-"
    return "-" if value is None else str(value)
