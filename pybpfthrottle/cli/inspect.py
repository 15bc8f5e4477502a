"""pybpfthrottle inspect: what an object file contains, and needs from a kernel."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, Iterable, Iterator

from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.inspection import Inspection
from pybpfthrottle.cli import bpf_show, tables
from pybpfthrottle.cli.say import echo, echo_lines
from pybpfthrottle.diagnostics import inspection

_COLUMNS = {
    "sections": ("name", "type", "size", "flags"),
    "programs": (
        *("name", "section", "type", "expected_attach_type", "target", "flags"),
        *("instructions", "linked_instructions", "maps", "functions"),
    ),
    "maps": (
        *("name", "type", "key_size", "value_size", "max_entries", "flags"),
        *("key_type", "value_type", "options"),
    ),
    "variables": ("section", "name", "type", "size", "value"),
    "externs": ("section", "name", "type", "weak"),
    "relocations": ("section", "kind", "count"),
}
_HEADINGS = {"expected_attach_type": "attach_type", "linked_instructions": "linked"}


def inspect(path: str, *, as_json: bool, with_types: bool) -> None:
    """Show an object file. Raises ObjectFileError with the section and offset of a fault."""
    with bpf_show.refused(f"read {path}"), elf.naming(path):
        found = Inspection(elf.file_bytes(path), elf.name_of(path))
        record = found.describe(with_types=with_types)
    record["faults"] = list(inspection.faults(found.spec))
    if as_json:
        tables.show_json(record)
        return
    _show(path, record)


def _show(path: str, record: dict[str, Any]) -> None:
    echo(
        f"{path}: {record['byteorder']}-endian, license {record['license']!r},"
        f" for Linux {record['oldest_kernel']} and later"
    )
    for what, fields in _COLUMNS.items():
        rows = [{**row, "options": _options(row)} for row in record[what]]
        _table(what, fields, rows)
    _table("CO-RE relocations", ("count", "text"), _counted(record["core_relocations"]))
    _table("needs", ("since", "name"), _needs(record["needs"]))
    counts = ", ".join(f"{count} {kind}" for kind, count in record["types"].items())
    echo(f"types: {counts or 'none'}")
    for line in record.get("definitions", ()):
        echo_lines(f"  {line}")
    for fault in record["faults"]:
        echo(f"warning: {fault}")


def _table(what: str, fields: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> None:
    cells = [[_cell(row[field]) for field in fields] for row in rows]
    if cells:
        # Empty columns are left out.
        kept = [i for i in range(len(fields)) if any(row[i] != "-" for row in cells)]
        headings = [_HEADINGS.get(field, field) for field in fields]
        echo(f"{what}:")
        tables.show([[row[i] for i in kept] for row in [headings, *cells]], indent="  ")


def _options(row: dict[str, Any]) -> list[str]:
    """Return the properties that few maps have."""
    known = [name for name in ("frozen", "pinned") if row.get(name)]
    known += [f"{name}={row[name]}" for name in ("numa_node", "extra") if row.get(name)]
    if row.get("inner"):
        known.append(f"inner={row['inner']['type']}")
    return known + [f"[{key}]={name}" for key, name in row.get("initial", {}).items()]


def _counted(relocations: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for text, count in Counter(row["text"] for row in relocations).items():
        yield {"count": count, "text": text}


def _needs(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for need in found:
        optional = " (done without where there is none)" if need["optional"] else ""
        yield {"since": need["since"], "name": need["name"] + optional}


def _cell(value: Any) -> str:
    if value is None or value in ([], ""):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if not isinstance(value, str) else value
