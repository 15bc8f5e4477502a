"""A clang-built object file: bytes -> ObjectSpec. Same bytes, same spec; no system calls."""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Iterator, Optional, Union

from pybpfthrottle.bpf.abi import ProgType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import datasections, elffile, sections
from pybpfthrottle.bpf.obj.btf import Btf, Kind, Linkage
from pybpfthrottle.bpf.obj.elffile import Elf, Section, Symbol
from pybpfthrottle.bpf.obj.functions import Function, Places, read_functions
from pybpfthrottle.bpf.obj.legacymaps import LegacyMaps
from pybpfthrottle.bpf.obj.specs import (
    FunctionKey,
    FunctionSpec,
    MapSpec,
    ObjectSpec,
    Place,
    ProgramSpec,
    SectionLayout,
)
from pybpfthrottle.bpf.obj.typedmaps import TypedMaps

# Which few objects have.
if TYPE_CHECKING:
    from pybpfthrottle.bpf.obj.structops import StructOpsMaps

_EXCEPTION_CALLBACK = "exception_callback"
_EXTERN_SECTIONS = (".kconfig", ".ksyms")
# The largest that are known, with DWARF and the whole kernel's types in them, have a tenth of it.
_MAX_FILE_BYTES = 64 << 20

Path = Union[str, "os.PathLike[str]"]


def read_file(path: Path) -> ObjectSpec:
    """Read an object file. Raises OSError, or ObjectFileError with the path in front."""
    with naming(path):
        return read_object(file_bytes(path), name=name_of(path))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the path in front of what an ObjectFileError says."""
    try:
        yield
    except ObjectFileError as error:
        error.args = (f"{os.fspath(path)}: {error}",)
        raise


def name_of(path: Path) -> str:
    """Return the name of the object in a file: what stands before the first dot."""
    return os.path.basename(os.fspath(path)).partition(".")[0]


def file_bytes(path: Path) -> bytes:
    """Return the bytes of a regular file of up to 64 MB that begins as an ELF file does.

    Nothing else is opened: pipes and devices may have no end, and to read some of them does
    something. Raises OSError, or ObjectFileError.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ObjectFileError("not a regular file")
    # Files that the kernel makes up have no size, and reading them may block.
    if not status.st_size:
        raise ObjectFileError("the file is empty")
    with open(path, "rb") as file:
        elffile.refuse_other_files(file.read(4))
        if status.st_size > _MAX_FILE_BYTES:
            raise ObjectFileError(f"{status.st_size >> 20} MB are too many for a BPF object file")
        file.seek(0)
        return file.read(_MAX_FILE_BYTES)


def read_object(data: bytes, *, name: str = "object") -> ObjectSpec:
    """Read an object of a BPF compiler; ``name`` goes into the names of its data maps.

    Raises ObjectFileError with the section and offset at fault.
    """
    return object_in(elffile.read(data), name)


def object_in(file: Elf, name: str) -> ObjectSpec:
    """Return what the records of an ELF file define. Raises ObjectFileError."""
    return _Reading(file, name).read()


class _Reading:
    """One object while its parts are put together."""

    def __init__(self, elf: Elf, name: str) -> None:
        self._elf = elf
        data = elf.contents(".BTF")
        self._btf = Btf(data) if data else None
        self.spec = ObjectSpec(
            name,
            elf.byteorder,
            license=_license(elf),
            btf=self._btf,
            btf_ext=elf.contents(".BTF.ext"),
            layouts=_layouts(elf),
            hidden=_hidden(elf),
        )

    def read(self) -> ObjectSpec:
        """Return the whole object."""
        typed = TypedMaps(self._elf, self._btf)
        legacy = LegacyMaps(self._elf)
        structs = self._struct_ops()
        defined = {**legacy.maps, **typed.maps, **(structs.maps if structs else {})}
        data = datasections.data_maps(self._elf, self._btf, self.spec.name)
        for (number, offset), spec in defined.items():
            self._add_map(spec, number, offset)
        for number, spec in data.items():
            self._add_map(spec, number, 0)
        data.update(datasections.arena_data(self._elf, defined.values()))
        names = datasections.Names()
        for variable in datasections.variables(self._elf, self._btf, data):
            variable.name = names.take(variable.name)
            self.spec.variables[variable.name] = variable
        self._read_code(
            Places(
                {place: spec.name for place, spec in defined.items()},
                {number: spec.name for number, spec in data.items()},
                _externs(self._btf),
                _declared(self._btf),
            )
        )
        typed.fill({p.function.key: p.name for p in self.spec.programs.values()})
        legacy.fill(self.spec)
        if structs:
            structs.fill(self.spec)
        return self.spec

    def _struct_ops(self) -> Optional[StructOpsMaps]:
        if not any(".struct_ops" in section.name for section in self._elf.sections.values()):
            return None
        from pybpfthrottle.bpf.obj.structops import StructOpsMaps

        return StructOpsMaps(self._elf, self._btf)

    def _add_map(self, spec: MapSpec, section: int, offset: int) -> None:
        if spec.name in self.spec.maps:
            raise ObjectFileError(
                f"the map {spec.name!r} is defined twice",
                section=self._elf.sections[section].name,
                offset=offset,
            )
        self.spec.maps[spec.name] = spec

    def _read_code(self, places: Places) -> None:
        read = [
            (section, read_functions(self._elf, section, places))
            for section in self._elf.sections.values()
            if section.executable and section.size
        ]
        callbacks = _exception_callbacks(self._btf, [f for _, found in read for f in found])
        for section, functions in read:
            functions[:] = [_with_callback(function, callbacks) for function in functions]
            self._add_functions(section, functions)
        self.spec.constants = {
            constant.name: 0
            for function in self.spec.functions.values()
            for constant in function.constant_references
        }
        called = {
            call.target
            for function in self.spec.functions.values()
            for call in function.call_references
        } | set(callbacks.values())
        for section, functions in read:
            self._add_programs(section, functions, called)

    def _add_functions(self, section: Section, functions: list[Function]) -> None:
        for function in functions:
            key = function.spec.key
            if self.spec.functions.setdefault(key, function.spec) is not function.spec:
                raise ObjectFileError(
                    "two sections have this name", section=section.name, offset=key.offset
                )

    def _add_programs(
        self, section: Section, functions: list[Function], called: set[FunctionKey]
    ) -> None:
        """Add the functions outside of .text as programs, but static ones that others call."""
        if section.name == ".text" or section.name.startswith(".text."):
            return
        kind, target, autoload = sections.meaning_of(section.name)
        for function in functions:
            key = function.spec.key
            if key in called and (function.local or kind.type == ProgType.UNSPEC):
                continue
            if function.name in self.spec.programs:
                raise ObjectFileError(
                    f"the program {function.name!r} is defined twice",
                    section=section.name,
                    offset=key.offset,
                )
            self.spec.programs[function.name] = ProgramSpec(
                *(function.name, section.name, kind.type, kind.attach_type, function.spec),
                flags=kind.flags,
                attach_to=target,
                autoload=autoload,
            )


def _license(elf: Elf) -> str:
    return (elf.contents("license") or b"").partition(b"\0")[0].decode("ascii", "replace")


def _layouts(elf: Elf) -> dict[str, SectionLayout]:
    """Return where the variables are in each section of data."""
    return {
        section.name: _layout(section.size, elf.symbols_of(section))
        for section in elf.sections.values()
        if 0 < section.size <= datasections.MAX_BYTES and not section.executable
    }


def _layout(size: int, symbols: list[Symbol]) -> SectionLayout:
    return SectionLayout(
        size,
        {
            symbol.name: Place(symbol.value, symbol.size)
            for symbol in symbols
            if symbol.type == "STT_OBJECT" and symbol.size and symbol.value + symbol.size <= size
        },
    )


def _hidden(elf: Elf) -> frozenset[str]:
    return frozenset(
        symbol.name
        for symbols in elf.symbols.values()
        for symbol in symbols
        if symbol.type == "STT_FUNC" and symbol.hidden
    )


def _externs(btf: Optional[Btf]) -> frozenset[str]:
    """Return the names of the kernel's functions, variables and settings that the types declare."""
    datasecs = (btf.find(Kind.DATASEC, name) for name in _EXTERN_SECTIONS) if btf else ()
    return frozenset(
        btf.type(variable.type).name
        for datasec in datasecs
        if btf and datasec
        for variable in btf.variables(datasec)
    )


def _declared(btf: Optional[Btf]) -> Optional[frozenset[str]]:
    """Return the names of all functions and variables that the types leave to others to define."""
    if btf is None:
        return None
    found = btf.of_kind(Kind.FUNC, Kind.VAR)
    return frozenset(item.name for item in found if btf.linkage(item) == Linkage.EXTERN)


def _exception_callbacks(btf: Optional[Btf], functions: list[Function]) -> dict[str, FunctionKey]:
    """Return the functions that tags name to be called when a function throws, by its name."""
    callbacks: dict[str, FunctionKey] = {}
    tags = btf.of_kind(Kind.DECL_TAG) if btf else ()
    keys = {function.name: function.spec.key for function in functions if not function.local}
    for tag in tags:
        mark, _, callback = tag.name.partition(":")
        if btf is None or mark != _EXCEPTION_CALLBACK:
            continue
        thrower = btf.type(tag.size_or_type).name
        if callback not in keys or callbacks.setdefault(thrower, keys[callback]) != keys[callback]:
            raise ObjectFileError(
                f"{thrower!r} needs one global function {callback!r} as its exception callback",
                section=".BTF",
            )
    return callbacks


def _with_callback(function: Function, callbacks: dict[str, FunctionKey]) -> Function:
    callback = callbacks.get(function.name)
    if callback is None:
        return function
    spec = FunctionSpec(**{**vars(function.spec), "exception_callback": callback})
    return function._replace(spec=spec)
