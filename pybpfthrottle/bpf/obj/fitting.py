"""A linked program -> the same, fitted to a kernel: CO-RE answered, externs found. No system calls.

It also brings along what the object says of its source, for the kernel and for error messages.
"""

from __future__ import annotations

import ctypes
from functools import cached_property, partial
from typing import TYPE_CHECKING, Callable, Iterator, Optional, TypeVar, Union

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType, ProgType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import externs
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.btf_ext import BtfExt, CoreRelocation, FunctionInfo, Records
from pybpfthrottle.bpf.obj.btf_rewrite import loadable
from pybpfthrottle.bpf.obj.externs import Address, Extern, KernelId, Symbols
from pybpfthrottle.bpf.obj.insn import BPF_PSEUDO_BTF_ID, CALL, INSN_BYTES
from pybpfthrottle.bpf.obj.patch import Instructions, PatchError, Poisoned
from pybpfthrottle.bpf.obj.plain import NamedTuple, Protocol
from pybpfthrottle.bpf.obj.relocate import LinkedProgram, Placed
from pybpfthrottle.bpf.obj.specs import (
    ExternReference,
    MapReference,
    MapSpec,
    ObjectSpec,
    ProgramSpec,
    SectionLayout,
)

# What asks for the kernel's types imports these itself: most objects do not.
if TYPE_CHECKING:
    from pybpfthrottle.bpf.obj import structops
    from pybpfthrottle.bpf.obj.core import Kernel, Resolver

R = TypeVar("R", FunctionInfo, CoreRelocation)


class KernelFacts(Protocol):
    """Facts about a kernel, each looked up when it is asked for."""

    @property
    def types(self) -> Kernel:
        """The types of the kernel, and those of its modules."""

    @property
    def core_types(self) -> Kernel:
        """The types that answer CO-RE, which may come from elsewhere."""

    def setting(self, name: str) -> Optional[str]:
        """Return a setting of its configuration."""

    def symbol(self, name: str) -> Optional[int]:
        """Return the address of a symbol."""

    def has_symbol(self, name: str) -> bool:
        """Return whether there is a symbol of this name."""


class Fitted(NamedTuple):
    """A program for one kernel; ``poisoned`` are its instructions that must not be reached.

    ``modules`` are descriptors for fd_array. ``functions`` and ``lines`` are struct bpf_func_info
    and bpf_line_info, empty where the object does not say all that the kernel wants; ``source``
    tells the line of an instruction. ``target`` is the function that it is loaded for: its type,
    and the descriptor of its module's types; or the struct of functions, whose ``member`` it is.
    """

    linked: LinkedProgram
    poisoned: tuple[Poisoned, ...] = ()
    modules: tuple[int, ...] = ()
    functions: bytes = b""
    lines: bytes = b""
    source: Callable[[int], Optional[str]] = lambda _: None
    target: tuple[int, int] = (0, 0)
    member: int = 0


class Fitting:
    """Fits the programs of one object to one kernel.

    ``descriptor`` opens the types of a module, and keeps them open until the programs are loaded.
    """

    def __init__(
        self, spec: ObjectSpec, kernel: KernelFacts, descriptor: Callable[[Btf], int]
    ) -> None:
        self._spec = spec
        self._kernel = kernel
        self._descriptor = descriptor
        self._btf = spec.btf
        self._structs: dict[str, structops.Fitted] = {}
        self._records = BtfExt(spec.btf_ext, spec.btf) if spec.btf and spec.btf_ext else None

    def fit(self, program: ProgramSpec, linked: LinkedProgram) -> Fitted:
        """Fit one program. Raises ObjectFileError, ExternError or AmbiguousTypeError."""
        fitted = Fitted(linked)
        if self._btf is not None:
            work = _Program(self, linked)
            work.answer()
            work.find_externs()
            fitted = work.finished()
        if program.type == ProgType.STRUCT_OPS:
            from pybpfthrottle.bpf.obj import structops

            structs = {
                name: self.struct_ops(name)
                for name, spec in self._spec.maps.items()
                if spec.type == MapType.STRUCT_OPS and program.name in spec.initial.values()
            }
            slot = structops.slot_of(program, structs)
            return fitted._replace(
                target=(slot.struct, self.descriptor(slot.btf)), member=slot.number
            )
        if not program.attach_to:
            return fitted
        from pybpfthrottle.bpf.obj import targets

        if not targets.is_targeted(program):
            return fitted
        target = targets.find(program, self._kernel.types)
        return fitted._replace(target=(target.type, self.descriptor(target.btf)))

    def struct_ops(self, name: str) -> structops.Fitted:
        """Return a struct of functions as the kernel has it."""
        from pybpfthrottle.bpf.obj import structops

        if name not in self._structs:
            struct = self._spec.maps[name]
            self._structs[name] = structops.fit(self._spec, struct, self._kernel.types)
        return self._structs[name]

    def loadable_types(self) -> Optional[bytes]:
        """Return the object's types for BPF_BTF_LOAD, if it has any."""
        if self._btf is None:
            return None
        layouts = {**self._spec.layouts, externs.KCONFIG: self.settings_layout}
        return loadable(self._btf, layouts, self._spec.hidden)

    def settings_map(self) -> MapSpec:
        """Return the map of the settings that the object asks for."""
        weak = self._spec.weak_externs
        return externs.kconfig_map(self.btf, self.externs, weak, self._kernel.setting)

    @property
    def btf(self) -> Btf:
        """The object's types."""
        if self._btf is None:
            raise ObjectFileError("needs a .BTF section; compile with -g")
        return self._btf

    @property
    def records(self) -> Optional[BtfExt]:
        """The compiler's records of single instructions."""
        return self._records

    @cached_property
    def externs(self) -> dict[str, Extern]:
        """The names that the object declares and does not define."""
        return externs.externs(self.btf)

    @cached_property
    def settings_layout(self) -> SectionLayout:
        """The places of the settings in their map."""
        return externs.kconfig_layout(self.btf, self.externs)

    @cached_property
    def resolver(self) -> Resolver:
        """The resolver of the object's CO-RE relocations."""
        from pybpfthrottle.bpf.obj.core import Resolver

        # Not of this object: a cycle would keep the kernel's types until the garbage is collected.
        kernel = self._kernel
        return Resolver(self.btf, lambda: kernel.core_types)

    @cached_property
    def symbols(self) -> Symbols:
        """The finder of the object's externs."""
        kernel = self._kernel
        return Symbols(
            *(self.btf, lambda: kernel.types),
            address=kernel.symbol,
            is_symbol=kernel.has_symbol,
        )

    def descriptor(self, btf: Btf) -> int:
        """Return a descriptor of a module's types; 0 for the kernel's own."""
        return self._descriptor(btf) if btf.base else 0


def within(records: dict[str, Records[R]], placed: Placed) -> Iterator[tuple[int, R]]:
    """Return the records of a function, each with its byte in the linked code."""
    start, function = placed
    begin = function.key.offset
    if function.key.section in records:
        for row in records[function.key.section].between(begin, begin + len(function.code)):
            yield start + row.offset - begin, row


class _Program:
    """One program while it is fitted."""

    def __init__(self, fitting: Fitting, linked: LinkedProgram) -> None:
        self._fitting = fitting
        self._linked = linked
        self._code = bytearray(linked.code)
        self._instructions = Instructions(self._code, linked.byteorder)
        self._poisoned: list[Poisoned] = []
        self._modules: list[int] = []
        self._settings: list[MapReference] = []

    def answer(self) -> None:
        """Put the answers of CO-RE in."""
        records = self._fitting.records
        if records is None:
            return
        for placed in self._linked.placed:
            for at, relocation in within(records.relocations, placed):
                try:
                    answer = self._fitting.resolver.answer(relocation)
                    # No error yet: the program may never reach it, behind bpf_core_field_exists.
                    if not self._instructions.answer(at, answer, len(self._poisoned)):
                        self._poisoned.append(self._unresolved(relocation))
                except (ObjectFileError, PatchError) as error:
                    raise self._bad(at, str(error)) from error

    def _unresolved(self, relocation: CoreRelocation) -> Poisoned:
        from pybpfthrottle.bpf.obj.accesses import describe

        btf = self._fitting.btf
        return Poisoned(
            describe(btf, relocation), btf.type(relocation.type).name, relocation.kind.name
        )

    def find_externs(self) -> None:
        """Put in what the kernel has of what the object declares."""
        for reference in self._linked.extern_references:
            extern = self._fitting.externs.get(reference.name)
            if extern is None:
                raise self._bad(reference.offset, f"{reference.name!r} is not declared")
            try:
                self._put(reference, extern)
            except PatchError as error:
                raise self._bad(reference.offset, f"{reference.name!r}: {error}") from error

    def _put(self, reference: ExternReference, extern: Extern) -> None:
        at = reference.offset
        if extern.section == externs.KCONFIG:
            place = self._fitting.settings_layout.places[reference.name]
            self._settings.append(MapReference(at, externs.KCONFIG, place.offset))
            return
        location = self._fitting.symbols.find(extern, weak=reference.weak)
        if location is None and not reference.weak:
            raise externs.missing(extern)
        if self._code[at] == CALL:
            self._put_call(at, extern, location)
        else:
            self._put_address(at, location)

    def _put_call(self, at: int, extern: Extern, location: Union[Address, KernelId, None]) -> None:
        if isinstance(location, KernelId):
            module = self._fitting.descriptor(location.btf)
            if module and module not in self._modules:
                self._modules.append(module)
            # Place 0 of fd_array stands for the kernel itself.
            place = self._modules.index(module) + 1 if module else 0
            self._instructions.call_kernel(at, location.type, place)
        else:
            self._instructions.poison(at, len(self._poisoned))
            self._poisoned.append(Poisoned(f"{extern.name}()", "", "a function"))

    def _put_address(self, at: int, location: Union[Address, KernelId, None]) -> None:
        if isinstance(location, KernelId):
            module = self._fitting.descriptor(location.btf)
            self._instructions.load_imm64(at, BPF_PSEUDO_BTF_ID, location.type | module << 32)
        else:
            self._instructions.load_imm64(at, 0, location.value if location else 0)

    def _bad(self, at: int, reason: str) -> ObjectFileError:
        origin = self._linked.origin(at)
        return ObjectFileError(reason, section=origin.section, offset=origin.offset)

    def finished(self) -> Fitted:
        """Return the program with all that was found out."""
        linked = self._linked._replace(
            code=bytes(self._code),
            map_references=(*self._linked.map_references, *self._settings),
            extern_references=(),
        )
        functions, lines = self._functions(), self._lines()
        return Fitted(
            *(linked, tuple(self._poisoned), tuple(self._modules), functions, lines),
            # Not a method: what is fitted is kept, and is not to keep the kernel's types.
            partial(_source, self._fitting.records, self._fitting.btf, linked),
        )

    def _functions(self) -> bytes:
        """Return one record for each function, at its beginning, as the kernel wants it."""
        records = self._fitting.records
        if records is None:
            return b""
        table = b""
        for placed in self._linked.placed:
            first = next(within(records.functions, placed), None)
            if first is not None and first[0] == placed.start:
                table += bytes(abi.FuncInfo(placed.start // INSN_BYTES, first[1].type))
        whole = len(self._linked.placed) * ctypes.sizeof(abi.FuncInfo)
        return table if len(table) == whole else b""

    def _lines(self) -> bytes:
        """Return the records of lines; the kernel wants one at the beginning of each function."""
        records = self._fitting.records
        if records is None:
            return b""
        tables = []
        for start, function in self._linked.placed:
            section, begin = function.key
            lines = records.lines.get(section)
            table = lines.encoded(begin, begin + len(function.code), start) if lines else b""
            if not table:
                return b""
            tables.append(table)
        return b"".join(tables)


def _source(
    records: Optional[BtfExt], btf: Btf, linked: LinkedProgram, instruction: int
) -> Optional[str]:
    """Return the line of the source that an instruction is of, as "file.c:12: text"."""
    offset = instruction * INSN_BYTES
    if records is None or offset >= len(linked.code):
        return None
    origin = linked.origin(offset)
    lines = records.lines.get(origin.section)
    line = lines.last_at(origin.offset) if lines else None
    if line is None:
        return None
    return f"{btf.string(line.file)}:{line.line}: {btf.string(line.text).strip()}"
