"""An object's spec -> the text of a module that has its maps, programs and types by name. Pure.

The text is a module, and a stub of itself: ``typed`` is what it builds upon.
"""

from __future__ import annotations

from typing import Iterable, Iterator, Optional

from pybpfthrottle.bpf.abi import MAPS_OF_MAPS, MapType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj.btf import COMPOSITES, ENUMS, Btf
from pybpfthrottle.bpf.obj.btf_classes import Classes, Names, python_name
from pybpfthrottle.bpf.obj.specs import MapSpec, ObjectSpec, VariableSpec

U32_BYTES = 4
_PER_CPU = (
    *(MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH),
    MapType.PERCPU_CGROUP_STORAGE,
)
# Their keys and values, as far as they have any, are descriptors or of no use as a dict.
_OBJECTS = (
    *(MapType.PROG_ARRAY, MapType.PERF_EVENT_ARRAY, MapType.CGROUP_ARRAY, MapType.XSKMAP),
    *(MapType.SOCKMAP, MapType.SOCKHASH, *MAPS_OF_MAPS),
)
_WITHOUT_KEYS = (
    *(MapType.RINGBUF, MapType.USER_RINGBUF, MapType.QUEUE, MapType.STACK),
    *(MapType.BLOOM_FILTER, MapType.ARENA),
)
# What the text defines or imports besides the classes of the object's types.
_TAKEN = (
    *("IntEnum", "Any", "Union", "Maps", "Programs", "Variables", "Object", "load", "bpf"),
    *("typed", "dataclass", "field", "list", "int", "str", "bool", "float", "bytes", "dict"),
)
_HEADER = '''\
"""The maps, programs, variables and types of {file}.

Made by: pybpfthrottle bpf stubs {file}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Union

from pybpfthrottle import bpf
from pybpfthrottle.bpf import typed'''
_FOOTER = '''

class Object(typed.Object[Maps, Programs, Variables]):
    """The loaded object: ``close`` or ``with`` ends it."""


def load(source: typed.Source = {file!r}, **options: Any) -> Object:
    """Load the object, as ``bpf.load`` does, which takes the same options."""
    return Object(bpf.load(source, **options), Maps, Programs, Variables, globals())'''


def classes_of(spec: ObjectSpec, more: Iterable[str] = ()) -> Optional[Classes]:
    """Return the classes of a spec's types, and of the structs that ``more`` names."""
    if spec.btf is None:
        return None
    roots = [type_id for item in spec.maps.values() for type_id in (item.key_type, item.value_type)]
    roots += [variable.type for variable in spec.variables.values()]
    roots += [_named(spec.btf, name) for name in more]
    return Classes(spec.btf, filter(None, roots), _TAKEN)


def _named(btf: Btf, name: str) -> int:
    for found in btf.named(name):
        if btf.resolve(found.id).kind in COMPOSITES | ENUMS:
            return found.id
    raise ObjectFileError(
        f"there is no struct, union or enum {name!r}; compilers leave out what no map, variable or"
        f" function has: declare one in the source, such as struct {name} *unused_{name};",
        section=".BTF",
    )


def module(spec: ObjectSpec, file: str, more: Iterable[str] = ()) -> str:
    """Return the text of a module for the object in a file."""
    more = tuple(more)
    classes = classes_of(spec, more)
    lines = [_HEADER.format(file=file)]
    lines += ["", f"TYPES = {list(more)!r}"] if more else []
    lines += classes.definitions() if classes else ()
    maps = {name: _map_hint(spec.maps[name], classes) for name in own_maps(spec)}
    variables = {item.name: _variable_hint(item, classes) for item in spec.variables.values()}
    lines += _attributes("Maps", "maps, typed", maps)
    lines += _attributes("Programs", "programs", dict.fromkeys(spec.programs, "bpf.Program"))
    lines += _attributes("Variables", "variables, typed", variables)
    lines.append(_FOOTER.format(file=file))
    return "\n".join(lines) + "\n"


def own_maps(spec: ObjectSpec) -> list[str]:
    """Return the names of the maps that are no sections of data, which are the variables'."""
    return [name for name, item in spec.maps.items() if item.section is None]


def attributes(names: Iterable[str]) -> dict[str, str]:
    """Return names by the attributes that stand for them."""
    taken = Names()
    return {taken.take(python_name(name)): name for name in names}


def _attributes(name: str, what: str, hints: dict[str, str]) -> Iterator[str]:
    yield from ("", "", f"class {name}(typed.{name}):", f'    """The object\'s {what}."""')
    yield from [""] if hints else []
    for attribute, own in attributes(hints).items():
        yield f"    {attribute}: {hints[own]}"


def _map_hint(spec: MapSpec, classes: Optional[Classes]) -> str:
    key, value = hint(spec.key_type, classes), hint(spec.value_type, classes)
    if spec.type in _WITHOUT_KEYS:
        return "bpf.Map[Any, Any]"
    if spec.type in _OBJECTS:
        return "bpf.Map[int, int]" if spec.key_size == U32_BYTES else "bpf.Map[bytes, int]"
    return f"bpf.Map[{key}, {f'list[{value}]' if spec.type in _PER_CPU else value}]"


def hint(type_id: int, classes: Optional[Classes]) -> str:
    """Return the annotation of a key or value; bytes where it has no type."""
    return classes.hint(type_id) if type_id and classes else "bytes"


def _variable_hint(variable: VariableSpec, classes: Optional[Classes]) -> str:
    return f"typed.Variable[{hint(variable.type, classes)}]"


def is_of_objects(spec: MapSpec) -> bool:
    """Return whether a map holds descriptors, whatever its definition says."""
    return spec.type in _OBJECTS


def has_no_keys(spec: MapSpec) -> bool:
    """Return whether a map is not used as a dict."""
    return spec.type in _WITHOUT_KEYS
