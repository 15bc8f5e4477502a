"""pybpfthrottle bpf load: an object file -> the kernel, and a bpf file system."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import Any, Optional, Sequence, Union

import click

from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.cli import bpf_show, tables
from pybpfthrottle.cli.say import echo, echo_lines
from pybpfthrottle.errors import BpfError, CompileError, VerifierError


def compile_source(
    source: str, output: Optional[str], flags: Sequence[str], headers: Optional[str]
) -> None:
    """Compile a source, and say where the object is."""
    from pybpfthrottle.bpf import compiling

    try:
        with bpf_show.refused("write the headers"):
            built = compiling.compile_object(source, output, flags=flags, headers=headers)
    except CompileError as error:
        if error.output:
            echo_lines(error.output.rstrip("\n"), err=True)
        raise
    echo(built)


def load(
    path: str, directory: Optional[str], names: Sequence[str], *, show_log: bool, as_json: bool
) -> None:
    """Load an object, pin it if requested, and show its programs and maps."""
    with bpf_show.refused(f"read {path}"):
        spec = elf.read_file(path)
    _check_names(spec, names)
    try:
        loaded = loader.load(spec, names or None)
    except VerifierError as error:
        if show_log:
            echo_lines(error.log, err=True)
        raise
    with loaded, bpf_show.refused("pin"):
        pins = _pin(loaded, directory) if directory else {}
        _show(loaded, pins, as_json=as_json)


def _check_names(spec: ObjectSpec, names: Sequence[str]) -> None:
    for name in names:
        if name not in spec.programs:
            known = ", ".join(spec.programs) or "none"
            raise click.BadParameter(f"the object has no program {name!r}; it has: {known}")


def _pin(loaded: Object, directory: str) -> dict[Any, str]:
    """Pin all or nothing; return the path of each."""
    with ExitStack() as undo:
        pins: dict[Any, str] = {}
        for parent, live in (
            (directory, loaded.programs),
            (os.path.join(directory, "maps"), loaded.maps),
        ):
            _make_directory(parent, undo)
            for name, own in live.items():
                # A bpf file system accepts no dots in names.
                pins[own] = os.path.join(parent, name.replace(".", "_"))
                _pin_one(own, pins[own])
                undo.callback(os.unlink, pins[own])
        undo.pop_all()
    return pins


def _make_directory(path: str, undo: ExitStack) -> None:
    with suppress(FileExistsError):
        os.mkdir(path)
        undo.callback(os.rmdir, path)


def _pin_one(own: Union[Program, Map[Any, Any]], path: str) -> None:
    try:
        own.pin(path)
    except PermissionError as error:
        parent = os.path.dirname(path)
        raise BpfError(
            f"cannot pin to {path}: {parent} must be in a bpf file system"
            " (mount -t bpf bpf /sys/fs/bpf)",
            errno=error.errno or 0,
        ) from error


def _show(loaded: Object, pins: dict[Any, str], *, as_json: bool) -> None:
    records = {
        "programs": [
            {**bpf_show.program_record(program.info()), **_pinned(pins, program)}
            for program in loaded.programs.values()
        ],
        "maps": [
            {**bpf_show.map_record(live.info()), **_pinned(pins, live)}
            for live in loaded.maps.values()
        ],
    }
    if as_json:
        tables.show_json(records)
        return
    for what, found in records.items():
        columns = ("id", "type", "name", "pinned")
        short = [{key: row[key] for key in columns if key in row} for row in found]
        tables.show_records(short, as_json=False, none=f"There are no {what}.")


def _pinned(pins: dict[Any, str], own: Any) -> dict[str, str]:
    return {"pinned": pins[own]} if own in pins else {}
