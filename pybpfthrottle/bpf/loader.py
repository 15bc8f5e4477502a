"""ObjectSpec -> loaded Object: the programs that were selected, and only the maps that they use."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any, Iterable, Optional

from pybpfthrottle.bpf import maps, programs, relocate
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.bpf.specs import ObjectSpec
from pybpfthrottle.errors import ObjectFileError


class Object:
    """The loaded programs and maps of one object, by name; ``close`` or ``with`` ends them all."""

    def __init__(self, programs: dict[str, Program], maps: dict[str, Map[Any, Any]]) -> None:
        self.programs = programs
        self.maps = maps

    def close(self) -> None:
        """Close all descriptors. What is attached stays with its link or legacy attachment."""
        for program in self.programs.values():
            program.close()
        for live in self.maps.values():
            live.close()

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Object programs={list(self.programs)} maps={list(self.maps)}>"


def load(spec: ObjectSpec, select: Optional[Iterable[str]] = None) -> Object:
    """Load the programs named by ``select`` (all, if None) and the maps that they use. Linux 4.10.

    A program that the kernel cannot take does not matter as long as it is not selected. Raises
    KeyError for a name that the object does not have, ObjectFileError, MapCreateError,
    ProgramLoadError or VerifierError; then nothing stays open.
    """
    if spec.byteorder != sys.byteorder:
        raise ObjectFileError(
            f"{spec.name!r} was built for {spec.byteorder}-endian machines;"
            f" this one is {sys.byteorder}-endian"
        )
    selected = [
        spec.programs[name] for name in dict.fromkeys(spec.programs if select is None else select)
    ]
    linked = {program.name: relocate.link(spec, program) for program in selected}
    needed = frozenset[str]().union(*(program.maps for program in linked.values()))
    with ExitStack() as undo:
        live_maps = {
            name: undo.enter_context(maps.create(map_spec))
            for name, map_spec in spec.maps.items()
            if name in needed
        }
        fds = {name: live.fd for name, live in live_maps.items()}
        live_programs = {
            program.name: undo.enter_context(
                programs.load(
                    relocate.resolve(linked[program.name], fds),
                    type=program.type,
                    license=spec.license,
                    name=program.name,
                    expected_attach_type=program.expected_attach_type,
                )
            )
            for program in selected
        }
        undo.pop_all()
    return Object(live_programs, live_maps)
