"""Data is what a dataclass is, and NamedTuple what typing's is, to users and to modules."""

from __future__ import annotations

import copy
import dataclasses
import typing

import pytest

from pybpfthrottle.bpf.obj.plain import Data, NamedTuple, Protocol, made


class Point(Data):
    """A point with a list of its own."""

    x: int
    y: int = 2
    names: list[str] = made(default_factory=list)


class Constant(Data, frozen=True):
    """A constant point."""

    x: int
    y: int = 2


def test_fields_are_given_by_place_or_name():
    """Fields come by place or by name, what is left out has its default."""
    point = Point(1, names=["a"])
    assert (point.x, point.y, point.names) == (1, 2, ["a"])
    assert repr(point) == "Point(x=1, y=2, names=['a'])"


def test_what_is_made_is_each_ones_own():
    """A list that is a default is not shared."""
    first, second = Point(1), Point(1)
    first.names.append("a")
    assert second.names == []
    assert (first == second, second == Point(1), second == 1) == (False, True, False)


@pytest.mark.parametrize(
    ("args", "given", "match"),
    [
        ((), {}, "Point needs 'x'"),
        ((1,), {"z": 3}, "Point has no z"),
        ((1,), {"x": 3}, "Point has no x"),
        ((1, 2, [], 4), {}, "has no so many fields"),
    ],
)
def test_wrong_fields_are_named(args, given, match):
    """Fields that are missing, unknown or given twice are a TypeError."""
    with pytest.raises(TypeError, match=match):
        Point(*args, **given)


def test_frozen_ones_are_constant_and_hashed():
    """Frozen ones cannot be changed, and are equal keys; others are no keys."""
    with pytest.raises(AttributeError, match="cannot change 'x'"):
        Constant(1).x = 2
    assert {Constant(1): "a"}[Constant(1, 2)] == "a"
    with pytest.raises(TypeError, match="unhashable"):
        hash(Point(1))


def test_dataclasses_takes_them_for_its_own():
    """replace, fields and asdict work as with a dataclass."""
    assert dataclasses.is_dataclass(Point)
    assert dataclasses.replace(Point(1), x=5) == Point(5)
    assert [field.name for field in dataclasses.fields(Point)] == ["x", "y", "names"]
    assert dataclasses.asdict(Constant(1)) == {"x": 1, "y": 2}


def test_a_copy_has_other_values_of_some_fields():
    """A changed copy is equal but for the fields that were given, and the first stays as it was."""
    first = Constant(1)
    assert (first.changed(y=3), first) == (Constant(1, 3), Constant(1, 2))
    with pytest.raises(TypeError, match="z"):
        first.changed(z=1)


class Row(NamedTuple):
    """A row with a method of its own."""

    x: int
    y: int = 2

    def sum(self):
        """Return the sum; ``__class__`` is known as in any class."""
        return self.x + self.y if type(self) is __class__ else 0


class Typed(typing.NamedTuple):
    """The like by typing."""

    x: int
    y: int = 2


class Narrow(Row):
    """A row whose y is given."""

    def __new__(cls, x):
        """Take x only."""
        return super().__new__(cls, x, 5)


def test_a_named_tuple_is_an_ordinary_tuple():
    """Its class is a tuple's, has no instance dictionary, and fields by name and place."""
    row = Row(1)
    assert (type(Row), Row.__mro__) == (type, (Row, tuple, object))
    assert (row, row.x, row.y, row.sum()) == ((1, 2), 1, 2, 3)
    assert not hasattr(row, "__dict__")
    with pytest.raises(AttributeError):
        row.x = 5


def test_a_named_tuple_has_all_that_typings_has():
    """Nothing that typing's has is missing, before the first tuple or after it."""
    fresh = type(NamedTuple)("Fresh", (NamedTuple,), {"__annotations__": {"x": int, "y": int}})
    assert fresh._make([3, 4])._asdict() == {"x": 3, "y": 4}
    row = Row(1)
    assert repr(row) == "Row(x=1, y=2)"
    assert row._replace(y=7) == (1, 7)
    assert copy.copy(row) == row
    assert set(dir(Typed(1))) - set(dir(row)) <= {"__orig_bases__"}
    assert (Row._fields, Row._field_defaults) == (Typed._fields, Typed._field_defaults)


@pytest.mark.parametrize("arguments", [{}, {"x": 1, "z": 2}])
def test_a_named_tuple_refuses_what_does_not_fit(arguments):
    """Too few and unknown fields are a TypeError, for the first tuple as for the later ones."""
    for _ in range(2):
        with pytest.raises(TypeError, match=r"x|z"):
            Row(**arguments)


def test_subclasses_of_named_tuples():
    """A subclass has its own constructor, which calls that of the row."""
    assert (Narrow(1), type(Narrow(1))) == ((1, 5), Narrow)
    assert type(Narrow._make([1, 2])) is Narrow


def test_a_protocol_costs_a_class():
    """At run time it is an ordinary class, which others may derive from."""

    class Counts(Protocol):
        def count(self) -> int:
            """Return how many there are."""

    class Three(Counts):
        def count(self) -> int:
            return 3

    assert type(Counts) is type
    assert Three().count() == 3
