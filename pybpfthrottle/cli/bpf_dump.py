"""pybpfthrottle bpf prog dump and map dump: the code of a program, the elements of a map."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any, Optional

from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.xlated import source_lines, xlated_lines
from pybpfthrottle.cli import bpf_show, tables
from pybpfthrottle.cli.say import echo


def dump_program(target: Optional[str], name: Optional[str], *, as_json: bool) -> None:
    """Show a program's instructions, with source lines if the kernel has them."""
    with bpf_show.refused("dump the program"):
        for program in bpf_show.one(bpf_show.PROGRAMS, target, name):
            lines = list(xlated_lines(program.fd))
            source = source_lines(program.fd)
    if as_json:
        tables.show_json(
            [
                {"at": at, "disasm": text, **({"src": source[at]} if at in source else {})}
                for at, text in lines
            ]
        )
        return
    for line in lines:
        if source.get(line.at):
            echo(f"; {source[line.at].expandtabs()}")
        echo(f"{line.at:4}: {line.text}")


def dump_map(target: Optional[str], name: Optional[str], *, as_json: bool) -> None:
    """Show the elements of one map."""
    with bpf_show.refused("dump the map"):
        for found in bpf_show.one(bpf_show.MAPS, target, name):
            pairs = list(_typed(found).items())
    if as_json:
        tables.show_json([{"key": _plain(key), "value": _plain(value)} for key, value in pairs])
        return
    for key, value in pairs:
        echo(f"{_text(key)}: {_text(value)}")
    echo(f"{len(pairs)} element{'' if len(pairs) == 1 else 's'}")


def _typed(found: Map[Any, Any]) -> Map[Any, Any]:
    with suppress(LookupError):
        return found.typed_by_btf()
    return found


def _plain(value: Any) -> Any:
    """Return bytes as hex, since JSON has no bytes; anything else unchanged."""
    if isinstance(value, bytes):
        return value.hex(" ")
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _text(value: Any) -> str:
    plain = _plain(value)
    return plain if isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)
