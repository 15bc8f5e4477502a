"""Does all with an object that needs no kernel: what the fuzzers run, whatever the bytes are.

A refusal is one of our errors; everything else that is raised is a bug.
"""

from __future__ import annotations

import ast
import json
import struct
from contextlib import suppress
from typing import NamedTuple, Optional

from pybpfthrottle.bpf.obj import btf_c, disasm, relocate, stubs
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.btf_values import BtfCodec
from pybpfthrottle.bpf.obj.core import Kernel
from pybpfthrottle.bpf.obj.fitting import Fitting
from pybpfthrottle.bpf.obj.inspection import Inspection
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.errors import AmbiguousTypeError, ExternError, ObjectFileError

FIXTURES = (
    *("object_maps", "object_legacy", "object_data", "object_calls", "object_callbacks"),
    *("object_beyond", "object_sections", "core_reads", "core_fields", "externs", "values"),
    *("flows", "ring", "targets", "object_foreign", "object_iproute2", "object_struct_ops"),
    *("object_arena", "object_templates", "object_statics"),
)
_REFUSALS = (ObjectFileError, ExternError, AmbiguousTypeError)
_MAX_VALUE_BYTES = 1 << 12


def use(data: bytes) -> None:
    """Read, tell, disassemble, link and fit it; code of an object is fitted to its own types."""
    try:
        inspection = Inspection(data)
        json.dumps(inspection.describe(with_types=True))
    except ObjectFileError:
        return
    spec = inspection.spec
    for function in spec.functions.values():
        for line in disasm.function_lines(function, spec.byteorder):
            assert line.text
    for variable in spec.variables.values():
        room = max(variable.map.value_size, len(variable.map.contents or b""))
        assert variable.offset + variable.size <= room
    _fit(spec)
    _write(spec)
    _show_values(spec)


def _fit(spec: ObjectSpec) -> None:
    try:
        fitting = Fitting(spec, _OwnTypes(spec), lambda _: 0)
        fitting.loadable_types()
    except _REFUSALS:
        return
    for program in spec.programs.values():
        try:
            fitted = fitting.fit(program, relocate.link(spec, program))
            fds = dict.fromkeys((*spec.maps, *fitted.linked.maps), 3)
            relocate.resolve(fitted.linked, fds)
            fitted.source(0)
        except _REFUSALS:
            continue
    with suppress(*_REFUSALS):
        fitting.settings_map()


def _write(spec: ObjectSpec) -> None:
    """The module and the header that are made of it: whatever the names are, Python takes it."""
    with suppress(ObjectFileError):
        ast.parse(stubs.module(spec, "broken.o"))
    with suppress(ObjectFileError):
        btf_c.header(spec.btf or Btf(b""))


def _show_values(spec: ObjectSpec) -> None:
    """What a map's zeros are by the names of the fields, there and back."""
    typed = [one for found in spec.maps.values() for one in (found.key_type, found.value_type)]
    btf = spec.btf
    for type_id in filter(None, typed) if btf else ():
        try:
            size = btf.size(type_id)
            codec = BtfCodec(btf, type_id)
            if size <= _MAX_VALUE_BYTES:
                codec.encode(codec.decode(bytes(size)))
        except (ObjectFileError, ValueError):
            continue


class _OwnTypes:
    """A kernel that has the object's own types, each setting, and no symbols."""

    def __init__(self, spec: ObjectSpec) -> None:
        self._spec = spec

    @property
    def types(self) -> Kernel:
        return Kernel(self._spec.btf or Btf(b""))

    core_types = types

    def setting(self, name: str) -> Optional[str]:
        return "y" if len(name) % 2 else "250"

    def symbol(self, name: str) -> Optional[int]:
        return 0xFFFF_FFFF_8000_0000

    def has_symbol(self, name: str) -> bool:
        return True


class Extent(NamedTuple):
    """Where a section's bytes are in a file."""

    name: str
    begin: int
    end: int


def extents(data: bytes) -> list[Extent]:
    """The sections of a sound little-endian object that have bytes."""
    table, count, names_at = (
        struct.unpack_from("<Q", data, 40)[0],
        struct.unpack_from("<H", data, 60)[0],
        struct.unpack_from("<H", data, 62)[0],
    )
    headers = [struct.unpack_from("<IIQQQQ", data, table + 64 * index) for index in range(count)]
    names = data[headers[names_at][4] :]
    return [
        Extent(names[name:].partition(b"\0")[0].decode(), begin, begin + size)
        for name, type_, _, _, begin, size in headers
        if size and type_ not in (0, 8)
    ]
