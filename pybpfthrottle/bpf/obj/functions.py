"""Sections of code -> functions, each with what it refers to. No system calls."""

from __future__ import annotations

from bisect import bisect_left
from typing import Collection, Iterable, Iterator, Mapping, Optional, TypeVar, Union

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.elffile import Elf, Relocation, Section, Symbol
from pybpfthrottle.bpf.obj.insn import (
    BPF_PSEUDO_CALL,
    CALL,
    INSN_BYTES,
    LD_IMM64,
    Code,
    RelocationType,
)
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import (
    CallReference,
    ConstantReference,
    ExternReference,
    FunctionKey,
    FunctionSpec,
    MapReference,
)

# Which relocation an instruction may have; others are for data only.
_TYPES = {LD_IMM64: RelocationType.R_BPF_64_64, CALL: RelocationType.R_BPF_64_32}

_Reference = Union[MapReference, CallReference, ExternReference, ConstantReference]
_R = TypeVar("_R")


class Places(NamedTuple):
    """Targets that code may refer to, by the numbers of the sections.

    ``maps`` has the names of maps by their section and offset, ``data`` the names of data maps by
    their section, ``externs`` the names that the kernel is to have. ``declared`` has all names
    that the types declare and do not define, and is None where there are no types.
    """

    maps: Mapping[tuple[int, int], str]
    data: Mapping[int, str]
    externs: Collection[str] = ()
    declared: Optional[Collection[str]] = None


class Function(NamedTuple):
    """A function under one of its names; ``local`` means static."""

    name: str
    local: bool
    spec: FunctionSpec


def read_functions(elf: Elf, section: Section, places: Places) -> list[Function]:
    """Return the functions of a section in order; one that has two names is there twice.

    Raises ObjectFileError with the place of what is not understood.
    """
    symbols = _function_symbols(elf, section)
    section.relocations.sort(key=lambda relocation: relocation.offset)
    offsets = [relocation.offset for relocation in section.relocations]
    specs: dict[int, FunctionSpec] = {}
    result = []
    for symbol, end in _extents(section, symbols):
        start = symbol.value
        if start not in specs:
            first, last = bisect_left(offsets, start), bisect_left(offsets, end)
            reader = _Reader(elf, section, start, end, places)
            specs[start] = reader.read(symbol.name, section.relocations[first:last])
        result.append(Function(symbol.name, symbol.local, specs[start]))
    return result


def _function_symbols(elf: Elf, section: Section) -> list[Symbol]:
    symbols = elf.symbols_of(section)
    functions = [symbol for symbol in symbols if symbol.type == "STT_FUNC"]
    # clang before 7 does not mark them; its labels of blocks are no functions.
    functions = functions or [
        symbol
        for symbol in symbols
        if symbol.type == "STT_NOTYPE"
        and symbol.name
        and not (symbol.local and symbol.name.startswith("LBB"))
    ]
    if not functions:
        raise ObjectFileError("it has code but no function", section=section.name, offset=0)
    return functions


def _extents(section: Section, symbols: list[Symbol]) -> Iterator[tuple[Symbol, int]]:
    """Return each function with its end; without a size that is the next, or the section's end."""
    size = len(section.data or b"")
    starts = sorted({symbol.value for symbol in symbols})
    following = dict(zip(starts, [*starts[1:], size]))
    for symbol in symbols:
        limit = following[symbol.value]
        end = symbol.value + symbol.size if symbol.size else limit
        is_inside = symbol.value < end <= min(limit, size)
        if not is_inside or symbol.value % INSN_BYTES or end % INSN_BYTES:
            raise ObjectFileError(
                f"function {symbol.name!r} of {symbol.size} bytes does not fit in its section",
                section=section.name,
                offset=symbol.value,
            )
        yield symbol, end


class _Reader:
    """The instructions of one function: bytes ``start`` to ``end`` of a section."""

    def __init__(self, elf: Elf, section: Section, start: int, end: int, places: Places) -> None:
        self._elf = elf
        self._section = section
        self._start = start
        self._code = (section.data or b"")[start:end]
        self._places = places
        self._instructions = Code(self._code, elf.byteorder)

    def read(self, name: str, relocations: list[Relocation]) -> FunctionSpec:
        """Return the function with its references, in the order of its code."""
        references: list[_Reference] = [self._reference(relocation) for relocation in relocations]
        references += self._plain_calls({reference.offset for reference in references})
        references.sort(key=lambda reference: reference.offset)
        return FunctionSpec(
            name,
            FunctionKey(self._section.name, self._start),
            self._code,
            _of(MapReference, references),
            _of(CallReference, references),
            _of(ExternReference, references),
            _of(ConstantReference, references),
        )

    def _reference(self, relocation: Relocation) -> _Reference:
        at = relocation.offset - self._start
        opcode = self._instructions.opcode(at)
        wide = opcode == LD_IMM64
        if at % INSN_BYTES or (wide and not self._instructions.is_wide(at)):
            raise ObjectFileError(
                "a relocation points into the middle of an instruction",
                section=self._section.name,
                offset=relocation.offset,
            )
        reference = None
        if _TYPES.get(opcode) == relocation.type:
            symbol = relocation.symbol
            if symbol.undefined and symbol.name in self._places.externs:
                return ExternReference(at, symbol.name, symbol.weak)
            reference = self._address(at, symbol) if wide else self._callee(at, symbol)
        if reference is None:
            raise self._unresolved(relocation)
        return reference

    def _callee(self, at: int, symbol: Symbol) -> Optional[CallReference]:
        section = self._section_of(symbol)
        if section is None or not section.executable:
            return None
        # clang counts the distance from the section's start in instructions, less one.
        extra = self._instructions.target(at) - at if symbol.type == "STT_SECTION" else 0
        return CallReference(at, FunctionKey(section.name, symbol.value + extra))

    def _address(self, at: int, symbol: Symbol) -> Optional[_Reference]:
        if self._is_constant(symbol):
            return ConstantReference(at, symbol.name)
        section = self._section_of(symbol)
        if section is None:
            return None
        offset = self._offset(at, symbol)
        if section.executable:
            return CallReference(at, FunctionKey(section.name, offset), address=True)
        name = self._places.maps.get((section.number, offset))
        if name is not None:
            return MapReference(at, name)
        if section.number in self._places.data and 0 <= offset <= section.size:
            return MapReference(at, self._places.data[section.number], offset)
        return None

    def _is_constant(self, symbol: Symbol) -> bool:
        """Return whether a symbol is known to inline assembly alone: C's are in the types."""
        declared = self._places.declared
        is_open = symbol.undefined and not symbol.local and bool(symbol.name)
        return is_open and declared is not None and symbol.name not in declared

    def _offset(self, at: int, symbol: Symbol) -> int:
        """Return the place in its section that a load is of: the instruction has what to add."""
        imm = self._instructions.imm(at)
        # gcc 12 has put the symbol's own value there.
        added = imm == symbol.value and self._elf.by_gcc
        return imm if added else symbol.value + imm

    def _section_of(self, symbol: Symbol) -> Optional[Section]:
        number = symbol.section
        return self._elf.sections.get(number) if isinstance(number, int) else None

    def _unresolved(self, relocation: Relocation) -> ObjectFileError:
        symbol = relocation.symbol
        what = f"symbol {symbol.name!r}" if symbol.name else "a symbol without a name"
        if symbol.undefined:
            what += ", which is not defined in this object"
        if symbol.section == "SHN_COMMON":
            what += ", which has no section; compile with -fno-common"
        return ObjectFileError(
            f"cannot resolve the relocation (type {relocation.type}) against {what}",
            section=self._section.name,
            offset=relocation.offset,
        )

    def _plain_calls(self, relocated: set[int]) -> Iterator[CallReference]:
        """Calls inside of one section carry the distance and need no relocation."""
        code = self._instructions
        for at in code.calls():
            if code.source(at) == BPF_PSEUDO_CALL and at not in relocated:
                target = FunctionKey(self._section.name, self._start + code.target(at))
                yield CallReference(at, target)


def _of(kind: type[_R], references: Iterable[object]) -> tuple[_R, ...]:
    return tuple(reference for reference in references if isinstance(reference, kind))
