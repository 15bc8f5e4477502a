"""Classes of plain data, as dataclasses and typing make them, without their time at each start.

To import dataclasses imports the parser of Python, which takes 9 ms. A ``Data`` has the same
constructor, equality and text, and is a dataclass to all that asks (``dataclasses.replace``,
``fields``, ``asdict``).

typing compiles the constructor of each ``NamedTuple`` as it is defined, in 0.1 ms, and a start
defines a hundred of which it makes a few. The ``NamedTuple`` here is the same, but its methods are
made when its first tuple is. A ``Protocol`` is an ordinary class at run time: only type checkers
look at it.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any, Callable, Iterable, TypeVar

if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
    from typing import Protocol as Protocol

    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[type], type]:
        """Tell type checkers what is a dataclass; at run time nothing."""
        return lambda cls: cls

    class _Definition(type):
        """Makes of what derives from ``NamedTuple`` an ordinary subclass of tuple."""

        def __new__(
            cls, name: str, _: tuple[type, ...], namespace: dict[str, Any]
        ) -> type[tuple[Any, ...]]:
            fields = tuple(namespace.get("__annotations__", ()))
            described = {
                "__slots__": (),
                "__match_args__": fields,
                "_fields": fields,
                "_field_defaults": {n: namespace[n] for n in fields if n in namespace},
                "__new__": _new,
                "_make": _make,
            }
            getters = {n: collections._tuplegetter(at, n) for at, n in enumerate(fields)}
            return type(name, (tuple,), {**described, **namespace, **getters})

    def _completed(cls: type) -> type:
        """Return the class that has the fields of ``cls``, with all methods of a named tuple."""
        owner = next(base for base in cls.__mro__ if "_fields" in vars(base))
        defaults = tuple(owner._field_defaults.values())
        made = collections.namedtuple(owner.__name__, owner._fields, defaults=defaults)
        for name, value in vars(made).items():
            if vars(owner).get(name, _new) in (_new, _make):
                setattr(owner, name, value)
        return owner

    @staticmethod
    def _new(cls: type, *args: Any, **given: Any) -> Any:
        return _completed(cls).__new__(cls, *args, **given)

    @classmethod
    def _make(cls: type, values: Iterable[Any]) -> Any:
        _completed(cls)
        return cls._make(values)

    NamedTuple = type.__new__(_Definition, "NamedTuple", (), {})

    class Protocol:
        """What a type has to have, told by its methods."""


D = TypeVar("D", bound="Data")


class _Made(NamedTuple):
    """A value that each instance has its own of."""

    make: Callable[[], Any]


def made(*, default_factory: Callable[[], Any]) -> Any:
    """Return the default of a field whose value is made for each instance, such as a list."""
    return _Made(default_factory)


class _Fields:
    """What dataclasses knows a dataclass by, made when it asks first."""

    def __init__(self) -> None:
        self._made: dict[type[Data], Any] = {}

    def __get__(self, _: object, owner: type[Data]) -> Any:
        if owner not in self._made:
            self._made[owner] = self._make(owner)
        return self._made[owner]

    def _make(self, owner: type[Data]) -> Any:
        import dataclasses

        def described(name: str) -> Any:
            default = owner._defaults.get(name, dataclasses.MISSING)
            if isinstance(default, _Made):
                return dataclasses.field(default_factory=default.make)
            return dataclasses.field(default=default)

        fields = [(name, Any, described(name)) for name in owner._names]
        return vars(dataclasses.make_dataclass(owner.__name__, fields))["__dataclass_fields__"]


@dataclass_transform(field_specifiers=(made,))
class Data:
    """The base of classes whose annotations are their fields; ``frozen`` ones can be hashed."""

    __dataclass_fields__ = _Fields()
    _names: tuple[str, ...]
    _defaults: dict[str, Any]

    def __init_subclass__(cls, *, frozen: bool = False) -> None:
        cls._names = tuple(cls.__annotations__)
        cls._defaults = {name: vars(cls)[name] for name in cls._names if name in vars(cls)}
        if frozen:
            cls.__setattr__ = cls.__delattr__ = _refuse  # type: ignore[assignment]
        else:
            cls.__hash__ = None  # type: ignore[assignment]

    def __init__(self, *args: Any, **given: Any) -> None:
        cls = type(self)
        values = dict(zip(cls._names, args))
        for name in cls._names[len(args) :]:
            if name in given:
                values[name] = given.pop(name)
            elif name in cls._defaults:
                default = cls._defaults[name]
                values[name] = default.make() if type(default) is _Made else default
            else:
                raise TypeError(f"{cls.__name__} needs {name!r}")
        if given or len(args) > len(cls._names):
            raise TypeError(f"{cls.__name__} has no {', '.join(given) or 'so many fields'}")
        self.__dict__.update(values)

    def changed(self: D, **changes: Any) -> D:
        """Return a copy with other values of some fields."""
        return type(self)(**{**{name: self.__dict__[name] for name in self._names}, **changes})

    def _values(self) -> tuple[Any, ...]:
        return tuple(map(self.__dict__.__getitem__, self._names))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        fields = (f"{name}={self.__dict__[name]!r}" for name in self._names)
        return f"{type(self).__qualname__}({', '.join(fields)})"


def _refuse(self: Data, name: str, *_: Any) -> None:
    raise AttributeError(f"{type(self).__name__} is constant: cannot change {name!r}")
