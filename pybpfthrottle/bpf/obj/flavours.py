"""Whether a type of an object and a type of the kernel stand for the same thing. Pure.

A *flavour* of a type is called NAME___anything and stands for NAME. Source: what bpf(2) and every
loader agree on, tools/lib/bpf/relo_core.c of the kernel.
"""

from __future__ import annotations

from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import COMPOSITES, ENUMS, Btf, Kind, Type

# Types that are nested deeper than this refer to themselves.
_MAX_DEPTH = 32


def essential(name: str) -> str:
    """Return a name without its flavour."""
    # "___" at the very start is no flavour of the empty name.
    at = name.find("___", 1)
    return name[:at] if at > 0 else name


def same_kind(local: Type, target: Type) -> bool:
    """Return whether the kinds go together: equal, or both of them enums."""
    return local.kind == target.kind or (local.kind in ENUMS and target.kind in ENUMS)


def _deeper(depth: int) -> int:
    if depth >= _MAX_DEPTH:
        raise ObjectFileError("types are nested too deeply", section=".BTF")
    return depth + 1


def fields_compatible(local: Btf, local_id: int, target: Btf, target_id: int) -> bool:
    """Return whether a field of one type may be read as one of the other: what has the same shape.

    All structs and unions go together, as do all integers, all pointers and all floats; enums do
    by their names, arrays by their elements.
    """
    for _ in range(_MAX_DEPTH):
        ours, theirs = local.resolve(local_id), target.resolve(target_id)
        if ours.kind in COMPOSITES and theirs.kind in COMPOSITES:
            return True
        if not same_kind(ours, theirs):
            return False
        if ours.kind == Kind.ARRAY:
            local_id, target_id = local.array(ours)[0], target.array(theirs)[0]
            continue
        if ours.kind == Kind.INT:
            # An integer that does not begin at its first bit is an old form of bit field.
            return not (local.integer(ours).bit_offset or target.integer(theirs).bit_offset)
        if ours.kind == Kind.FWD or ours.kind in ENUMS:
            names = essential(ours.name), essential(theirs.name)
            return names[0] == names[1] or not all(names)
        return ours.kind in (Kind.PTR, Kind.FLOAT)
    raise ObjectFileError("types are nested too deeply", section=".BTF")


def types_compatible(
    local: Btf, local_id: int, target: Btf, target_id: int, depth: int = 0
) -> bool:
    """Return whether types of the same name are of one kind, as are those that they point to."""
    depth = _deeper(depth)
    ours, theirs = local.resolve(local_id), target.resolve(target_id)
    if {ours.kind, theirs.kind} <= COMPOSITES | {Kind.FWD}:
        return _struct_or_union(ours) == _struct_or_union(theirs)
    if not same_kind(ours, theirs):
        return False
    if ours.kind == Kind.INT:
        return not (local.integer(ours).bit_offset or target.integer(theirs).bit_offset)
    if ours.kind == Kind.PTR:
        return types_compatible(local, ours.size_or_type, target, theirs.size_or_type, depth)
    if ours.kind == Kind.ARRAY:
        return types_compatible(local, local.array(ours)[0], target, target.array(theirs)[0], depth)
    if ours.kind == Kind.FUNC_PROTO:
        return ours.vlen == theirs.vlen and all(
            types_compatible(local, a, target, b, depth)
            for a, b in _signatures(local, ours, target, theirs)
        )
    return ours.kind in ENUMS | {Kind.VOID, Kind.FLOAT}


def _signatures(local: Btf, ours: Type, target: Btf, theirs: Type) -> list[tuple[int, int]]:
    """Return the types of two prototypes' results and parameters in pairs."""
    return [
        (ours.size_or_type, theirs.size_or_type),
        *zip(
            (parameter.type for parameter in local.parameters(ours)),
            (parameter.type for parameter in target.parameters(theirs)),
        ),
    ]


class Matcher:
    """Whether types match: the strictest of the three comparisons, for TYPE_MATCHES."""

    def __init__(self, local: Btf, target: Btf) -> None:
        self._local = local
        self._target = target
        self._known: dict[tuple[int, int, bool], bool] = {}

    def match(
        self, local_id: int, target_id: int, *, pointed_to: bool = False, depth: int = 0
    ) -> bool:
        """Return whether the other type has all members, enumerators, sizes and signs of the local.

        Behind a pointer, names and kinds of structs and unions are enough.
        """
        key = local_id, target_id, pointed_to
        if key not in self._known:
            self._known[key] = self._match(*key, _deeper(depth))
        return self._known[key]

    def _match(self, local_id: int, target_id: int, pointed_to: bool, depth: int) -> bool:
        local, target = self._local, self._target
        ours, theirs = local.resolve(local_id), target.resolve(target_id)
        if essential(ours.name) != essential(theirs.name):
            return False
        if ours.kind == Kind.FWD:
            return _struct_or_union(ours) == _struct_or_union(theirs)
        if ours.kind in COMPOSITES and pointed_to:
            return _struct_or_union(ours) == _struct_or_union(theirs)
        if not same_kind(ours, theirs):
            return False
        if ours.kind in COMPOSITES:
            return self._composites(ours, theirs, depth)
        if ours.kind in ENUMS:
            names = {essential(item.name) for item in target.enumerators(theirs)}
            return all(essential(item.name) in names for item in local.enumerators(ours))
        if ours.kind == Kind.INT:
            signs = local.integer(ours).signed, target.integer(theirs).signed
            return ours.size_or_type == theirs.size_or_type and signs[0] == signs[1]
        if ours.kind == Kind.PTR:
            return self.match(ours.size_or_type, theirs.size_or_type, pointed_to=True, depth=depth)
        if ours.kind == Kind.ARRAY:
            (element, count), (other, other_count) = local.array(ours), target.array(theirs)
            return count == other_count and self.match(
                element, other, pointed_to=pointed_to, depth=depth
            )
        if ours.kind == Kind.FUNC_PROTO:
            return ours.vlen == theirs.vlen and all(
                self.match(a, b, pointed_to=pointed_to, depth=depth)
                for a, b in _signatures(local, ours, target, theirs)
            )
        return ours.kind in (Kind.VOID, Kind.FLOAT)

    def _composites(self, ours: Type, theirs: Type, depth: int) -> bool:
        if ours.vlen > theirs.vlen:
            return False
        members: dict[str, list[int]] = {}
        for member in self._target.members(theirs):
            members.setdefault(essential(member.name), []).append(member.type)
        return all(
            any(
                self.match(member.type, other, depth=depth)
                for other in members.get(essential(member.name), ())
            )
            for member in self._local.members(ours)
        )


def _struct_or_union(btf_type: Type) -> Kind:
    """Return what a struct, union or forward declaration of one is; else its own kind."""
    if btf_type.kind == Kind.FWD:
        return Kind.UNION if btf_type.flag else Kind.STRUCT
    return btf_type.kind
