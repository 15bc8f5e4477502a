"""Structs of functions that the kernel calls (struct_ops), such as a congestion control. Pure.

An object has them as variables in sections .struct_ops and .struct_ops.link, whose pointers are
programs. Source: Documentation/bpf/libbpf/program_types.rst and kernel/bpf/bpf_struct_ops.c of the
kernel.
"""

from __future__ import annotations

import struct
from typing import Any, Mapping, Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType, ProgType
from pybpfthrottle.bpf.errors import ExternError, ObjectFileError
from pybpfthrottle.bpf.obj.btf import Btf, Kind, Member
from pybpfthrottle.bpf.obj.core import Kernel
from pybpfthrottle.bpf.obj.elffile import Elf, Relocation, Section
from pybpfthrottle.bpf.obj.flavours import essential
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import FunctionKey, MapSpec, ObjectSpec, ProgramSpec

_SECTIONS = (".struct_ops", ".struct_ops.link")
# The kernel's struct around such a struct, which has its state in front.
_VALUE = "bpf_struct_ops_"
_DATA = "data"
_POINTER_BYTES = 8


class StructOpsMaps:
    """The struct_ops of an object, by the number of their section and their offset in it."""

    def __init__(self, elf: Elf, btf: Optional[Btf]) -> None:
        self._elf = elf
        self._btf = btf
        self.maps: dict[tuple[int, int], MapSpec] = {}
        for section in elf.sections.values():
            if section.name.lstrip("?") in _SECTIONS and section.size and not section.executable:
                self._read(section)

    def _read(self, section: Section) -> None:
        datasec = self._btf.find(Kind.DATASEC, section.name) if self._btf else None
        if self._btf is None or datasec is None or section.data is None:
            raise ObjectFileError("needs a .BTF section; compile with -g", section=section.name)
        types = {
            var.name: var.size_or_type
            for variable in self._btf.variables(datasec)
            if (var := self._btf.type(variable.type)).kind == Kind.VAR
        }
        for symbol in self._elf.symbols_of(section):
            type_id = types.get(symbol.name)
            if type_id is None:
                continue
            struct = self._btf.resolve(type_id)
            contents = section.data[symbol.value : symbol.value + self._btf.size(struct.id)]
            self.maps[section.number, symbol.value] = MapSpec(
                symbol.name,
                MapType.STRUCT_OPS,
                key_size=4,
                value_size=len(contents),
                max_entries=1,
                flags=abi.BPF_F_LINK if section.name.endswith(".link") else 0,
                contents=contents,
                value_type=struct.id,
                autoload=not section.name.startswith("?"),
            )

    def fill(self, spec: ObjectSpec) -> None:
        """Put the programs in, by the places of their pointers.

        Programs that no struct has are not loaded: the kernel could not tell what they are.
        """
        names = {program.function.key: program.name for program in spec.programs.values()}
        for (number, start), struct_map in self.maps.items():
            section = self._elf.sections[number]
            end = start + struct_map.value_size
            for relocation in section.relocations:
                if start <= relocation.offset < end:
                    name = names.get(self._pointed(section, relocation))
                    if name is None:
                        raise ObjectFileError(
                            f"{struct_map.name!r} points to"
                            f" {relocation.symbol.name or 'a section'!r}, which is no program",
                            section=section.name,
                            offset=relocation.offset,
                        )
                    struct_map.initial[relocation.offset - start] = name
        wanted = {
            name for one in self.maps.values() if one.autoload for name in one.initial.values()
        }
        for program in spec.programs.values():
            if program.type == ProgType.STRUCT_OPS:
                program.autoload = program.name in wanted

    def _pointed(self, section: Section, relocation: Relocation) -> FunctionKey:
        """Return what a pointer points to, if that is a function."""
        number, at = relocation.symbol.section, relocation.offset
        target = self._elf.sections.get(number) if isinstance(number, int) else None
        order: Any = self._elf.byteorder
        added = int.from_bytes((section.data or b"")[at : at + _POINTER_BYTES], order)
        return FunctionKey(target.name if target else "", relocation.symbol.value + added)


class Slot(NamedTuple):
    """The member of a kernel's struct that a program is for: its number, and the struct's type."""

    number: int
    struct: int
    btf: Btf


class Fitted(NamedTuple):
    """A struct as the kernel has it, without the programs' descriptors.

    ``value`` are the bytes of the whole value, of the type ``value_type`` in ``btf``; ``slots``
    has the programs by the bytes where their descriptors belong.
    """

    value: bytes
    value_type: int
    btf: Btf
    slots: dict[int, str]
    members: dict[str, Slot]

    def filled(self, descriptors: Mapping[str, int]) -> bytes:
        """Return the value with the programs' descriptors."""
        value = bytearray(self.value)
        for at, program in self.slots.items():
            value[at : at + _POINTER_BYTES] = struct.pack("=Q", descriptors[program])
        return bytes(value)


def fit(spec: ObjectSpec, struct: MapSpec, kernel: Kernel) -> Fitted:
    """Lay a struct out as the kernel has it. Raises ExternError for what the kernel lacks."""
    if spec.btf is None:
        raise ObjectFileError("needs a .BTF section; compile with -g")
    return _Fitting(spec.btf, struct, kernel).fitted()


class _Fitting:
    def __init__(self, local: Btf, struct: MapSpec, kernel: Kernel) -> None:
        self._local = local
        self._spec = struct
        self._ours = local.resolve(struct.value_type)
        self._name = essential(self._ours.name)
        found = next(iter(kernel.find(Kind.STRUCT, _VALUE + self._name)), None)
        if found is None:
            raise ExternError(
                f"this kernel has no struct_ops {self._name!r}, which {struct.name!r} is"
            )
        self._btf, self._value = found
        data = next(m for m in self._btf.members(self._value) if m.name == _DATA)
        self._at = data.bit_offset // 8
        self._theirs = self._btf.resolve(data.type)

    def fitted(self) -> Fitted:
        """Copy each member to where the kernel has it."""
        value = bytearray(self._value.size_or_type)
        theirs = {m.name: (n, m) for n, m in enumerate(self._btf.members(self._theirs))}
        slots: dict[int, str] = {}
        members: dict[str, Slot] = {}
        for member in self._local.members(self._ours):
            number, other = theirs.get(essential(member.name), (0, None))
            begin = member.bit_offset // 8
            program = self._spec.initial.get(begin)
            if other is None:
                self._refuse_what_is_lost(member, program)
            elif program is not None:
                slots[self._at + other.bit_offset // 8] = program
                members[program] = Slot(number, self._theirs.id, self._btf)
            else:
                self._copy(member, other, value)
        return Fitted(bytes(value), self._value.id, self._btf, slots, members)

    def _bytes(self, member: Member) -> bytes:
        begin = member.bit_offset // 8
        size = self._local.size(member.type)
        return (self._spec.contents or b"")[begin : begin + size]

    def _refuse_what_is_lost(self, member: Member, program: Optional[str]) -> None:
        """Refuse what is set and the kernel has no place for; zeros are what it would have."""
        if program is not None or any(self._bytes(member)):
            raise ExternError(
                f"this kernel's {self._name!r} has no {member.name!r}, which"
                f" {self._spec.name!r} sets"
            )

    def _copy(self, member: Member, other: Member, value: bytearray) -> None:
        data = self._bytes(member)
        if not any(data):
            return
        size = self._btf.size(other.type)
        if size != len(data) or member.bits != other.bits or member.bits:
            raise ExternError(
                f"{member.name!r} of {self._spec.name!r} has {len(data)} bytes, but {size} in this"
                " kernel; or it is a bit field"
            )
        begin = self._at + other.bit_offset // 8
        value[begin : begin + size] = data


def slot_of(program: ProgramSpec, fitted: Mapping[str, Fitted]) -> Slot:
    """Return the slot that a program is for. Raises ObjectFileError where none or several are."""
    slots = {one.members[program.name] for one in fitted.values() if program.name in one.members}
    if len(slots) != 1:
        raise ObjectFileError(
            f"{program.name!r} is for {len(slots)} members of structs; it has to be for one of a"
            " variable in section .struct_ops",
            section=program.section,
            offset=program.function.key.offset,
        )
    return slots.pop()
