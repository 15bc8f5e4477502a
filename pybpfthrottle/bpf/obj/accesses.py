"""CO-RE accesses: the way of "0:1:2" through an object's types, and the same in a kernel's. Pure.

Source: Documentation/bpf/llvm_reloc.rst of the kernel.
"""

from __future__ import annotations

from typing import Optional

from pybpfthrottle.bpf.abi import CoreRelocationKind
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import COMPOSITES, ENUMS, Btf, Kind, Type
from pybpfthrottle.bpf.obj.btf_ext import CoreRelocation
from pybpfthrottle.bpf.obj.flavours import essential, fields_compatible
from pybpfthrottle.bpf.obj.plain import NamedTuple

_K = CoreRelocationKind
FIELDS = frozenset(
    (
        *(_K.FIELD_BYTE_OFFSET, _K.FIELD_BYTE_SIZE, _K.FIELD_EXISTS),
        *(_K.FIELD_SIGNED, _K.FIELD_LSHIFT_U64, _K.FIELD_RSHIFT_U64),
    )
)
ENUM_VALUES = frozenset((_K.ENUMVAL_EXISTS, _K.ENUMVAL_VALUE))
_MAX_STEPS = 64


class Step(NamedTuple):
    """One step of an access: to a member, or to an element (without a name)."""

    name: str
    number: int
    type: int
    bits: int = 0


class Access(NamedTuple):
    """The way from a type to what is accessed; for an enum, the one step is the enumerator."""

    btf: Btf
    root: int
    steps: tuple[Step, ...]
    bit_offset: int = 0

    @property
    def last(self) -> Step:
        """The step that reaches what is accessed."""
        return self.steps[-1]


def parse(btf: Btf, relocation: CoreRelocation) -> Access:
    """Return the way that an access such as "0:1:2" goes through the object's own types."""
    try:
        numbers = [int(part) for part in relocation.access.split(":")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or len(numbers) > _MAX_STEPS:
        raise bad(f"not a field access: {relocation.access!r}")
    if relocation.kind in FIELDS:
        return _parse_field(btf, relocation.type, numbers)
    if relocation.kind in ENUM_VALUES:
        return _parse_enumerator(btf, relocation.type, numbers)
    if numbers != [0]:
        raise bad(f"a type has no {relocation.access!r}")
    return Access(btf, relocation.type, ())


def bad(reason: str) -> ObjectFileError:
    """Return the error for a relocation that cannot be."""
    return ObjectFileError(f"CO-RE relocation: {reason}", section=".BTF.ext")


def _parse_field(btf: Btf, root: int, numbers: list[int]) -> Access:
    bit_offset = numbers[0] * btf.size(root) * 8
    steps = [Step("", numbers[0], root)]
    for number in numbers[1:]:
        btf_type = btf.resolve(steps[-1].type)
        if btf_type.kind in COMPOSITES and number < btf_type.vlen:
            member = btf.member(btf_type, number)
            bit_offset += member.bit_offset
            steps.append(Step(member.name, number, member.type, member.bits))
        elif btf_type.kind == Kind.ARRAY and _has_element(btf, btf_type, number, steps):
            element, _ = btf.array(btf_type)
            bit_offset += number * btf.size(element) * 8
            steps.append(Step("", number, element))
        else:
            raise bad(f"{btf_type.kind.name} {btf_type.name!r} has no member {number}")
    return Access(btf, root, tuple(steps), bit_offset)


def _has_element(btf: Btf, array: Type, number: int, steps: list[Step]) -> bool:
    """Return whether an element is there; an array without a length in a struct has all."""
    _, count = btf.array(array)
    return number < count or (count == 0 and len(steps) > 1)


def _parse_enumerator(btf: Btf, root: int, numbers: list[int]) -> Access:
    btf_type = btf.resolve(root)
    if btf_type.kind not in ENUMS or len(numbers) != 1 or numbers[0] >= btf_type.vlen:
        raise bad(f"{btf_type.kind.name} {btf_type.name!r} has no enumerator {numbers[0]}")
    return Access(btf, root, (_enumerator(btf, btf_type, numbers[0]),))


def _enumerator(btf: Btf, enum: Type, index: int) -> Step:
    return Step(list(btf.enumerators(enum))[index].name, index, enum.id)


def find_field(local: Access, target: Btf, root: int) -> Optional[Access]:
    """Return the way through a type of the kernel by the same names and indexes, or None."""
    bit_offset = local.steps[0].number * target.size(root) * 8
    access = Access(target, root, (local.steps[0]._replace(type=root),), bit_offset)
    kinds = [local.btf.resolve(step.type).kind for step in local.steps]
    for step, inside in zip(local.steps[1:], kinds):
        if inside == Kind.ARRAY:
            following = _find_element(access, step)
        elif not step.name:
            continue  # into something anonymous, through which names are looked for anyway
        else:
            following = _find_member(access, step, local.btf, access.last.type)
        if following is None:
            return None
        access = following
    return access


def _find_element(access: Access, step: Step) -> Optional[Access]:
    btf = access.btf
    array = btf.resolve(access.last.type)
    if array.kind != Kind.ARRAY or not _has_element(btf, array, step.number, list(access.steps)):
        return None
    element, _ = btf.array(array)
    return access._replace(
        steps=(*access.steps, step._replace(type=element)),
        bit_offset=access.bit_offset + step.number * btf.size(element) * 8,
    )


def _find_member(
    access: Access, step: Step, local: Btf, inside: int, depth: int = 0
) -> Optional[Access]:
    """Look for a member by name, also in anonymous members; its type must be compatible."""
    btf = access.btf
    composite = btf.resolve(inside)
    if composite.kind not in COMPOSITES:
        return None
    if depth >= _MAX_STEPS:
        raise ObjectFileError(f"{composite.name!r} is nested too deeply", section=".BTF")
    for index, member in enumerate(btf.members(composite)):
        at = access._replace(bit_offset=access.bit_offset + member.bit_offset)
        if not member.name:
            deeper = _find_member(at, step, local, member.type, depth + 1)
            if deeper is not None:
                return deeper
        elif member.name == step.name and fields_compatible(local, step.type, btf, member.type):
            reached = Step(member.name, index, member.type, member.bits)
            return at._replace(steps=(*access.steps, reached))
    return None


def find_enumerator(local: Access, target: Btf, root: int) -> Optional[Access]:
    """Return the enumerator of the same name in an enum of the kernel; None: not there."""
    enum = target.resolve(root)
    wanted = essential(local.last.name)
    if enum.kind in ENUMS:
        for index, (name, _) in enumerate(target.enumerators(enum)):
            if essential(name) == wanted:
                return Access(target, root, (Step(name, index, enum.id),))
    return None


def describe(btf: Btf, relocation: CoreRelocation) -> str:
    """Return what a relocation asks for, as C spells it: ``struct task_struct.comm[3]``."""
    access = parse(btf, relocation)
    root = btf.type(access.root)
    prefix = {Kind.STRUCT: "struct ", Kind.UNION: "union ", Kind.FWD: "struct "}
    text = ("enum " if root.kind in ENUMS else prefix.get(root.kind, "")) + root.name
    first, *rest = access.steps or (Step("", 0, 0),)
    if relocation.kind in ENUM_VALUES:
        return f"{text}.{first.name}"
    text += f"[{first.number}]" if first.number else ""
    for step, before in zip(rest, access.steps):
        if btf.resolve(before.type).kind == Kind.ARRAY:
            text += f"[{step.number}]"
        elif step.name:
            text += f".{step.name}"
    return text
