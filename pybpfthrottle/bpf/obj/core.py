"""CO-RE: what an object wants to know of a type, and what the kernel's types answer. Pure.

Source: enum bpf_core_relo_kind of linux/bpf.h, and tools/lib/bpf/relo_core.c of the kernel, by
which compilers and loaders agree on what is meant.
"""

from __future__ import annotations

from typing import Callable, Iterable, Iterator, Optional

from pybpfthrottle.bpf.abi import CoreRelocationKind
from pybpfthrottle.bpf.errors import AmbiguousTypeError
from pybpfthrottle.bpf.obj.accesses import (
    ENUM_VALUES,
    FIELDS,
    Access,
    bad,
    describe,
    find_enumerator,
    find_field,
    parse,
)
from pybpfthrottle.bpf.obj.btf import ENUMS, Btf, Kind, Type
from pybpfthrottle.bpf.obj.btf_ext import CoreRelocation
from pybpfthrottle.bpf.obj.flavours import Matcher, essential, same_kind, types_compatible
from pybpfthrottle.bpf.obj.plain import NamedTuple

_K = CoreRelocationKind
# What is asked of something that is not there and has the answer 0; all else has no answer.
_ZERO_IF_MISSING = frozenset(
    (
        *(_K.FIELD_EXISTS, _K.ENUMVAL_EXISTS, _K.TYPE_EXISTS, _K.TYPE_MATCHES),
        *(_K.TYPE_ID_TARGET, _K.TYPE_SIZE),
    )
)
_U64 = (1 << 64) - 1


class Kernel(NamedTuple):
    """The types to look in: the kernel's, and where it lacks one those of its modules."""

    types: Btf
    modules: Callable[[], Iterable[Btf]] = tuple

    def find(self, kind: Kind, name: str) -> Iterator[tuple[Btf, Type]]:
        """Return the kernel's type of a kind and name; if it has none, those of its modules."""
        btf_type = self.types.find(kind, name)
        if btf_type is not None:
            yield self.types, btf_type
            return
        for module in self.modules():
            btf_type = module.find(kind, name)
            if btf_type is not None:
                yield module, btf_type


class Load(NamedTuple):
    """How many bytes a load or store of a field moves, here and there.

    ``resizable`` tells whether an instruction may move the other number and mean the same.
    """

    local_bytes: int
    target_bytes: int
    resizable: bool


class Answer(NamedTuple):
    """The value that stands in an instruction, and the one that belongs there, or None.

    ``checked`` tells whether the compiler promises that ``local`` stands there.
    """

    local: int
    target: Optional[int]
    checked: bool
    load: Optional[Load] = None


class _Place(NamedTuple):
    """The place and width of the load of a field; a bit field is loaded as an integer."""

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
            raise bad(f"a bit field cannot have {size} bytes")
        offset = access.bit_offset // 8 // size * size
        while access.bit_offset + last.bits - offset * 8 > size * 8:
            if size >= 8:
                raise bad("a bit field does not fit in a load of eight bytes")
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
    btf_type = btf.resolve(type_id)
    if btf_type.kind in ENUMS:
        return btf_type.flag
    return btf_type.kind == Kind.INT and btf.integer(btf_type).signed


def _enum_value(access: Access) -> int:
    enum = access.btf.resolve(access.root)
    return list(access.btf.enumerators(enum))[access.last.number].value & _U64


def _value(access: Access, kind: CoreRelocationKind) -> int:
    if kind in FIELDS:
        return _field_value(access, kind)
    if kind == _K.ENUMVAL_VALUE:
        return _enum_value(access)
    if kind in (_K.TYPE_ID_LOCAL, _K.TYPE_ID_TARGET):
        return access.root
    if kind == _K.TYPE_SIZE:
        return access.btf.size(access.root)
    return 1


def _is_checked(local: Access, kind: CoreRelocationKind) -> bool:
    """Return whether the compiler promises the old value, as most records do."""
    if kind in (_K.FIELD_BYTE_OFFSET, _K.FIELD_BYTE_SIZE, _K.FIELD_LSHIFT_U64):
        return not local.last.bits
    # Linkers that merge types renumber them; clang 15 was the first to tell the signs of enums.
    return kind not in (_K.TYPE_ID_LOCAL, _K.TYPE_ID_TARGET, _K.FIELD_SIGNED, _K.ENUMVAL_VALUE)


def _load(local: Access, target: Access) -> Optional[Load]:
    """Return how a load of a field changes; a bit field's does not, since its size is asked for."""
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
        """Return what a relocation comes to with the kernel's types."""
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
        if kind in FIELDS:
            return find_field(local, target, root)
        if kind in ENUM_VALUES:
            return find_enumerator(local, target, root)
        if kind == _K.TYPE_MATCHES:
            matcher = self._matchers.setdefault(target, Matcher(self._local, target))
            same = matcher.match(local.root, root)
        else:
            same = types_compatible(self._local, local.root, target, root)
        return Access(target, root, ()) if same else None

    def _candidates_of(self, root: int) -> list[tuple[Btf, int]]:
        """Return the kernel's types of the same kind and name, else those of its modules."""
        if root not in self._candidates:
            local = self._local.type(root)
            if not local.name:
                raise bad(f"type {root} has no name to look for")
            kernel = self._kernel()
            self._candidates[root] = list(_candidates(local, [kernel.types])) or list(
                _candidates(local, kernel.modules())
            )
        return self._candidates[root]


def _candidates(local: Type, targets: Iterable[Btf]) -> Iterator[tuple[Btf, int]]:
    for btf in targets:
        for btf_type in btf.named(essential(local.name), flavours=True):
            if same_kind(local, btf_type):
                yield btf, btf_type.id
