"""What modules that ``pybpfthrottle bpf stubs`` writes build upon: a loaded object by names.

::

    import flows  # pybpfthrottle bpf stubs flows.o > flows.py

    with flows.load("flows.o") as loaded:
        with loaded.programs.count.attach(cgroup="/sys/fs/cgroup/demo"):
            loaded.variables.seen.set(0)
            print(loaded.maps.flows[0].packets)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Generic, Mapping, TypeVar, Union

from pybpfthrottle.bpf.codecs import RAW, U32, Codec
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj import stubs
from pybpfthrottle.bpf.obj.btf_classes import ClassCodec
from pybpfthrottle.bpf.obj.specs import MapSpec, ObjectSpec

if TYPE_CHECKING:
    from pybpfthrottle.bpf import loader, variables

T = TypeVar("T")
Source = Union[ObjectSpec, bytes, str, "os.PathLike[str]"]


class _ByName:
    """Things of a loaded object as attributes; the annotations of a subclass tell which.

    Those that were not loaded are missing.
    """

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.__dict__.update(found)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {', '.join(vars(self))}>"


class Maps(_ByName):
    """Maps with keys and values of the types that they have in the object."""


class Programs(_ByName):
    """Programs."""


class Variables(_ByName):
    """Variables."""


M = TypeVar("M", bound=Maps)
P = TypeVar("P", bound=Programs)
V = TypeVar("V", bound=Variables)
Self = TypeVar("Self", bound="Object[Any, Any, Any]")


class Variable(Generic[T]):
    """A variable with values of its type; ``set`` replaces what programs wrote meanwhile."""

    def __init__(self, variable: variables.Variable, codec: Codec[T]) -> None:
        self._variable = variable
        self._codec = codec

    def get(self) -> T:
        """Return the present value. Raises OSError."""
        value = self._variable.get()
        data = self._variable.spec.encode(value) if isinstance(value, int) else value
        return self._codec.decode(data)

    def set(self, value: T) -> None:
        """Set the value. Raises ValueError for one that does not fit, OSError for a constant."""
        self._variable.set(self._codec.encode(value))

    def __repr__(self) -> str:
        return f"<Variable {self._variable.spec.name!r}>"


class Object(Generic[M, P, V]):
    """A loaded object, with what it has by name; ``close`` or ``with`` ends it.

    ``untyped`` is the same as ``bpf.load`` returns it.
    """

    def __init__(
        self,
        untyped: loader.Object,
        maps: type[M],
        programs: type[P],
        variables: type[V],
        names: Mapping[str, Any],
    ) -> None:
        """``names`` has the classes of the object's types, by the names that ``stubs`` gives."""
        self.untyped = untyped
        self._classes = stubs.classes_of(untyped.spec, names.get("TYPES", ()))
        self._made = (
            {type_id: names[name] for type_id, name in self._classes.names.items()}
            if self._classes
            else {}
        )
        spec, found = untyped.spec, untyped.variables
        self.maps = maps(
            {
                attribute: self._map(untyped.maps[name])
                for attribute, name in stubs.attributes(stubs.own_maps(spec)).items()
                if name in untyped.maps
            }
        )
        self.programs = programs(
            {
                attribute: untyped.programs[name]
                for attribute, name in stubs.attributes(spec.programs).items()
                if name in untyped.programs
            }
        )
        self.variables = variables(
            {
                attribute: self._variable(found[name])
                for attribute, name in stubs.attributes(spec.variables).items()
                if name in found
            }
        )

    def codec(self, of: type[T]) -> Codec[T]:
        """Return the codec of one of the module's classes, such as for ``bpf.RingBuffer``."""
        type_id = next(number for number, made in self._made.items() if made is of)
        return self._codec(type_id, 0)

    def _codec(self, type_id: int, size: int) -> Codec[Any]:
        btf = self.untyped.spec.btf
        if not type_id or btf is None or (size and btf.size(type_id) != size):
            return RAW
        return ClassCodec(btf, type_id, self._made)

    def _map(self, live: Map[Any, Any]) -> Map[Any, Any]:
        spec: MapSpec = live.spec
        if stubs.has_no_keys(spec):
            return live
        if stubs.is_of_objects(spec):
            return live.typed(U32 if spec.key_size == stubs.U32_BYTES else RAW, U32)
        value = self._codec(spec.value_type, spec.value_size)
        return live.typed(self._codec(spec.key_type, spec.key_size), value)

    def _variable(self, variable: variables.Variable) -> Variable[Any]:
        return Variable(variable, self._codec(variable.spec.type, variable.spec.size))

    def close(self) -> None:
        """Close all descriptors. What is attached stays with its link."""
        self.untyped.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
