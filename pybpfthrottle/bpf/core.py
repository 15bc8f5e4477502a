"""CO-RE: what an object wants to know of a type, and what the kernel's types answer. Pure.

Source: Documentation/bpf/llvm_reloc.rst of the kernel, and enum bpf_core_relo_kind of linux/bpf.h.
"""

from __future__ import annotations

from typing import Callable, Iterable, Iterator, NamedTuple, Optional

from pybpfthrottle.bpf.abi import CoreRelocationKind
from pybpfthrottle.bpf.btf import COMPOSITES, ENUMS, Btf, Kind, Type
from pybpfthrottle.bpf.btf_ext import CoreRelocation
from pybpfthrottle.bpf.flavours import (
    Matcher,
    essential,
    fields_compatible,
    same_kind,
    types_compatible,
)
from pybpfthrottle.errors import AmbiguousTypeError, ObjectFileError

_K = CoreRelocationKind
_FIELDS = frozenset(
    (
        *(_K.FIELD_BYTE_OFFSET, _K.FIELD_BYTE_SIZE, _K.FIELD_EXISTS),
        *(_K.FIELD_SIGNED, _K.FIELD_LSHIFT_U64, _K.FIELD_RSHIFT_U64),
    )
)
_ENUM_VALUES = frozenset((_K.ENUMVAL_EXISTS, _K.ENUMVAL_VALUE))
# What is asked of something that is not there and has the answer 0; all else has no answer.
_ZERO_IF_MISSING = frozenset(
    (
        *(_K.FIELD_EXISTS, _K.ENUMVAL_EXISTS, _K.TYPE_EXISTS, _K.TYPE_MATCHES),
        *(_K.TYPE_ID_TARGET, _K.TYPE_SIZE),
    )
)
_MAX_STEPS = 64
_U64 = (1 << 64) - 1


class Kernel(NamedTuple):
    """The types to look in: the kernel's, and where it lacks one those of its modules."""

    types: Btf
    modules: Callable[[], Iterable[Btf]] = tuple


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


class Load(NamedTuple):
    """How many bytes a load or store of a field moves, here and there.

    ``resizable`` tells whether an instruction may move the other number and mean the same.
    """

    local_bytes: int
    target_bytes: int
    resizable: bool


class Answer(NamedTuple):
    """What stands in the instruction, and what belongs there; None: there is no answer.

    ``checked`` tells whether the compiler promises that ``local`` stands there.
    """

    local: int
    target: Optional[int]
    checked: bool
    load: Optional[Load] = None


def parse(btf: Btf, relocation: CoreRelocation) -> Access:
    """The way that an access such as "0:1:2" goes through the object's own types."""
    try:
        numbers = [int(part) for part in relocation.access.split(":")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0 or len(numbers) > _MAX_STEPS:
        raise _bad(f"no access: {relocation.access!r}")
    if relocation.kind in _FIELDS:
        return _parse_field(btf, relocation.type, numbers)
    if relocation.kind in _ENUM_VALUES:
        return _parse_enumerator(btf, relocation.type, numbers)
    if numbers != [0]:
        raise _bad(f"a type has no {relocation.access!r}")
    return Access(btf, relocation.type, ())


def _bad(reason: str) -> ObjectFileError:
    return ObjectFileError(f"CO-RE relocation: {reason}", section=".BTF.ext")


def _parse_field(btf: Btf, root: int, numbers: list[int]) -> Access:
    bit_offset = numbers[0] * btf.size(root) * 8
    steps = [Step("", numbers[0], root)]
    for number in numbers[1:]:
        found = btf.resolve(steps[-1].type)
        if found.kind in COMPOSITES and number < found.vlen:
            member = btf.member(found, number)
            bit_offset += member.bit_offset
            steps.append(Step(member.name, number, member.type, member.bits))
        elif found.kind == Kind.ARRAY and _has_element(btf, found, number, steps):
            element, _ = btf.array(found)
            bit_offset += number * btf.size(element) * 8
            steps.append(Step("", number, element))
        else:
            raise _bad(f"{found.kind.name} {found.name!r} has nothing at {number}")
    return Access(btf, root, tuple(steps), bit_offset)


def _has_element(btf: Btf, array: Type, number: int, steps: list[Step]) -> bool:
    """An array in a struct without a length has all elements."""
    _, count = btf.array(array)
    return number < count or (count == 0 and len(steps) > 1)


def _parse_enumerator(btf: Btf, root: int, numbers: list[int]) -> Access:
    found = btf.resolve(root)
    if found.kind not in ENUMS or len(numbers) != 1 or numbers[0] >= found.vlen:
        raise _bad(f"{found.kind.name} {found.name!r} has no enumerator {numbers[0]}")
    return Access(btf, root, (_enumerator(btf, found, numbers[0]),))


def _enumerator(btf: Btf, enum: Type, index: int) -> Step:
    return Step(list(btf.enumerators(enum))[index].name, index, enum.id)


def find_field(local: Access, target: Btf, root: int) -> Optional[Access]:
    """The way through a type of the kernel by the same names and indexes; None: not there."""
    bit_offset = local.steps[0].number * target.size(root) * 8
    found = Access(target, root, (local.steps[0]._replace(type=root),), bit_offset)
    kinds = [local.btf.resolve(step.type).kind for step in local.steps]
    for step, inside in zip(local.steps[1:], kinds):
        if inside == Kind.ARRAY:
            following = _find_element(found, step)
        elif not step.name:
            continue  # into something anonymous, through which names are looked for anyway
        else:
            following = _find_member(found, step, local.btf, found.last.type)
        if following is None:
            return None
        found = following
    return found


def _find_element(found: Access, step: Step) -> Optional[Access]:
    btf = found.btf
    array = btf.resolve(found.last.type)
    if array.kind != Kind.ARRAY or not _has_element(btf, array, step.number, list(found.steps)):
        return None
    element, _ = btf.array(array)
    return found._replace(
        steps=(*found.steps, step._replace(type=element)),
        bit_offset=found.bit_offset + step.number * btf.size(element) * 8,
    )


def _find_member(
    found: Access, step: Step, local: Btf, inside: int, depth: int = 0
) -> Optional[Access]:
    """Look for a member by name, also in anonymous members; its type must be compatible."""
    btf = found.btf
    composite = btf.resolve(inside)
    if composite.kind not in COMPOSITES:
        return None
    if depth >= _MAX_STEPS:
        raise ObjectFileError(f"{composite.name!r} is nested too deeply", section=".BTF")
    for index, member in enumerate(btf.members(composite)):
        at = found._replace(bit_offset=found.bit_offset + member.bit_offset)
        if not member.name:
            deeper = _find_member(at, step, local, member.type, depth + 1)
            if deeper is not None:
                return deeper
        elif member.name == step.name and fields_compatible(local, step.type, btf, member.type):
            reached = Step(member.name, index, member.type, member.bits)
            return at._replace(steps=(*found.steps, reached))
    return None


def _find_enumerator(local: Access, target: Btf, root: int) -> Optional[Access]:
    enum = target.resolve(root)
    wanted = essential(local.last.name)
    if enum.kind in ENUMS:
        for index, (name, _) in enumerate(target.enumerators(enum)):
            if essential(name) == wanted:
                return Access(target, root, (Step(name, index, enum.id),))
    return None


class _Place(NamedTuple):
    """Where a load of a field begins, and its width; a bit field is loaded as an integer."""

    byte_offset: int
    bytes: int
    bit_offset: int
    bits: int

    @classmethod
    def of(cls, access: Access) -> _Place:
        btf, last = access.btf, access.last
        size = btf.size(last.type)
        offset = access.bit_offset // 8
        if not last.bits:
            return cls(offset, size, offset * 8, size * 8)
        if not 1 <= size <= 8:
            raise _bad(f"a bit field of {size} bytes")
        offset = access.bit_offset // 8 // size * size
        while access.bit_offset + last.bits - offset * 8 > size * 8:
            if size >= 8:
                raise _bad("a bit field that no load of eight bytes reaches")
            size *= 2
            offset = access.bit_offset // 8 // size * size
        return cls(offset, size, access.bit_offset, last.bits)


def _field_value(access: Access, kind: CoreRelocationKind) -> int:
    if kind == _K.FIELD_EXISTS:
        return 1
    if kind == _K.FIELD_SIGNED:
        return int(_is_signed(access.btf, access.last.type))
    place = _Place.of(access)
    if kind == _K.FIELD_BYTE_OFFSET:
        return place.byte_offset
    if kind == _K.FIELD_BYTE_SIZE:
        return place.bytes
    if kind == _K.FIELD_RSHIFT_U64:
        return 64 - place.bits
    before = place.bit_offset - place.byte_offset * 8
    if access.btf.byteorder == "little":
        return 64 - before - place.bits
    return 64 - place.bytes * 8 + before


def _is_signed(btf: Btf, type_id: int) -> bool:
    found = btf.resolve(type_id)
    if found.kind in ENUMS:
        return found.flag
    return found.kind == Kind.INT and btf.integer(found).signed


def _enum_value(access: Access) -> int:
    enum = access.btf.resolve(access.root)
    return list(access.btf.enumerators(enum))[access.last.number].value & _U64


def _value(access: Access, kind: CoreRelocationKind) -> int:
    if kind in _FIELDS:
        return _field_value(access, kind)
    if kind == _K.ENUMVAL_VALUE:
        return _enum_value(access)
    if kind in (_K.TYPE_ID_LOCAL, _K.TYPE_ID_TARGET):
        return access.root
    if kind == _K.TYPE_SIZE:
        return access.btf.size(access.root)
    return 1


def _is_checked(local: Access, kind: CoreRelocationKind) -> bool:
    """Compilers keep their promise of the old value but for these."""
    if kind in (_K.FIELD_BYTE_OFFSET, _K.FIELD_BYTE_SIZE, _K.FIELD_LSHIFT_U64):
        return not local.last.bits
    # Linkers that merge types renumber them; enumerators changed their sign with clang 15.
    return kind not in (_K.TYPE_ID_LOCAL, _K.TYPE_ID_TARGET, _K.ENUMVAL_VALUE)


def _load(local: Access, target: Access) -> Optional[Load]:
    """How a load of a field changes; a bit field's does not, since its size is asked for."""
    if local.last.bits or target.last.bits:
        return None
    ours, theirs = local.btf.resolve(local.last.type), target.btf.resolve(target.last.type)
    unsigned = not _is_signed(local.btf, ours.id) and not _is_signed(target.btf, theirs.id)
    # A pointer is an unsigned number too; signed ones would need their sign extended.
    resizable = ours.kind == theirs.kind and ours.kind in (Kind.PTR, Kind.INT) and unsigned
    return Load(local.btf.size(ours.id), target.btf.size(theirs.id), resizable)


class Resolver:
    """Answers the relocations of one object, whose types are ``local``.

    Raises ObjectFileError for those that are wrong, and AmbiguousTypeError. ``kernel`` is called
    when the first type is looked for.
    """

    def __init__(self, local: Btf, kernel: Callable[[], Kernel]) -> None:
        self._local = local
        self._kernel = kernel
        self._candidates: dict[int, list[tuple[Btf, int]]] = {}
        self._matchers: dict[Btf, Matcher] = {}
        self._answers: dict[tuple[int, str, CoreRelocationKind], Answer] = {}

    def answer(self, relocation: CoreRelocation) -> Answer:
        """What a relocation comes to with the kernel's types."""
        key = relocation[1:]
        if key not in self._answers:
            self._answers[key] = self._answer(relocation)
        return self._answers[key]

    def _answer(self, relocation: CoreRelocation) -> Answer:
        local, kind = parse(self._local, relocation), relocation.kind
        value = 0 if kind == _K.TYPE_ID_TARGET else _value(local, kind)
        if kind == _K.TYPE_ID_LOCAL:
            return Answer(value, value, checked=False)
        targets = [
            found
            for btf, type_id in self._candidates_of(local.root)
            if (found := self._find(local, kind, btf, type_id)) is not None
        ]
        checked = _is_checked(local, kind)
        if not targets:
            return Answer(value, 0 if kind in _ZERO_IF_MISSING else None, checked)
        answers = {_value(target, kind) for target in targets}
        if len(answers) > 1 or len({target.bit_offset for target in targets}) > 1:
            raise AmbiguousTypeError(
                f"{describe(self._local, relocation)} is ambiguous: the kernel has"
                f" {len(targets)} such types, and {kind.name} answers {sorted(answers)}"
            )
        load = _load(local, targets[0]) if kind == _K.FIELD_BYTE_OFFSET else None
        return Answer(value, answers.pop(), checked, load)

    def _find(
        self, local: Access, kind: CoreRelocationKind, target: Btf, root: int
    ) -> Optional[Access]:
        if kind in _FIELDS:
            return find_field(local, target, root)
        if kind in _ENUM_VALUES:
            return _find_enumerator(local, target, root)
        if kind == _K.TYPE_MATCHES:
            matcher = self._matchers.setdefault(target, Matcher(self._local, target))
            same = matcher.match(local.root, root)
        else:
            same = types_compatible(self._local, local.root, target, root)
        return Access(target, root, ()) if same else None

    def _candidates_of(self, root: int) -> list[tuple[Btf, int]]:
        """The kernel's types of the same kind and name, flavours aside; else its modules'."""
        if root not in self._candidates:
            local = self._local.type(root)
            if not local.name:
                raise _bad(f"type {root} has no name to look for")
            kernel = self._kernel()
            self._candidates[root] = list(_candidates(local, [kernel.types])) or list(
                _candidates(local, kernel.modules())
            )
        return self._candidates[root]


def _candidates(local: Type, targets: Iterable[Btf]) -> Iterator[tuple[Btf, int]]:
    for btf in targets:
        for found in btf.named(essential(local.name), flavours=True):
            if same_kind(local, found):
                yield btf, found.id


def describe(btf: Btf, relocation: CoreRelocation) -> str:
    """What a relocation asks for, as C spells it: ``struct task_struct.comm[3]``."""
    access = parse(btf, relocation)
    root = btf.type(access.root)
    prefix = {Kind.STRUCT: "struct ", Kind.UNION: "union ", Kind.FWD: "struct "}
    text = ("enum " if root.kind in ENUMS else prefix.get(root.kind, "")) + root.name
    first, *rest = access.steps or (Step("", 0, 0),)
    if relocation.kind in _ENUM_VALUES:
        return f"{text}.{first.name}"
    text += f"[{first.number}]" if first.number else ""
    for step, before in zip(rest, access.steps):
        if btf.resolve(before.type).kind == Kind.ARRAY:
            text += f"[{step.number}]"
        elif step.name:
            text += f".{step.name}"
    return text
