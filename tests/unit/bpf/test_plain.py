"""Data is what a dataclass is, to its users and to the module of that name."""

from __future__ import annotations

import dataclasses

import pytest

from pybpfthrottle.bpf.obj.plain import Data, made


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
