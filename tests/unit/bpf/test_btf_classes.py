"""Classes of Python for types: names that Python takes, and values that are the same back."""

from __future__ import annotations

import dataclasses
from enum import IntEnum

import pytest
from made_types import Types

from pybpfthrottle.bpf.obj.btf_classes import ClassCodec, Classes, class_name, python_name


@pytest.mark.parametrize(
    ("name", "python", "a_class"),
    [
        ("flow", "flow", "Flow"),
        ("flow_key", "flow_key", "FlowKey"),
        ("from", "from_", "From"),
        ("list", "list_", "List"),
        ("box<u32>", "box_u32_", "BoxU32"),
        ("0", "n0", "N0"),
        ("__0", "n__0", "N0"),
        ("", "_", "T"),
    ],
)
def test_names_are_those_of_python(name, python, a_class):
    """Whatever a compiler calls it, Python has a name for it."""
    assert (python_name(name), class_name(name)) == (python, a_class)
    compile(f"class {a_class}:\n    {python}: int", "", "exec")


def test_a_type_has_one_class_with_a_name_of_its_own():
    """Types of one name, and those without one, have classes of different names."""
    types = Types()
    number = types.int()
    first = types.struct("same", 4, ("a", number, 0))
    second = types.struct("same", 4, ("b", number, 0))
    nameless = types.struct("", 4, ("c", number, 0))
    outer = types.struct("outer", 12, ("x", first, 0), ("y", second, 4), ("z", nameless, 8))
    classes = Classes(types.btf(), [outer], taken=["Outer"])
    assert classes.names == {first: "Same", second: "Same_2", nameless: "OuterZ", outer: "Outer_2"}


class Colour(IntEnum):
    """An enum."""

    RED = 1


@dataclasses.dataclass
class Both:
    """A union."""

    wide: int = 0
    narrow: int = 0


@dataclasses.dataclass
class Whole:
    """A struct."""

    colour: int = 0
    text: str = ""
    both: Both = dataclasses.field(default_factory=Both)
    from_: int = 0


@pytest.fixture
def codec():
    """A codec of a struct with an enum, a text, a union, and an anonymous member."""
    types = Types()
    number, char = types.int(), types.int("char", 1, signed=True)
    short = types.int("short", 2)
    enum = types.enum("colour", RED=1)
    both = types.struct("both", 4, ("wide", number, 0), ("narrow", short, 0), union=True)
    nameless = types.struct("", 4, ("from", number, 0))
    text = types.array(char, 8)
    members = (("colour", enum, 0), ("text", text, 4), ("both", both, 12), ("", nameless, 16))
    whole = types.struct("whole", 20, *members)
    return ClassCodec(types.btf(), whole, {enum: Colour, both: Both, whole: Whole})


@pytest.mark.parametrize("colour", [Colour.RED, 7])
def test_values_are_the_same_back(codec, colour):
    """A value that is encoded and decoded is equal; an enum's unknown number stays one."""
    value = Whole(colour, "abc", Both(wide=0x10002), from_=9)
    back = codec.decode(codec.encode(value))
    assert back == Whole(colour, "abc", Both(0x10002, 2), 9)
    assert type(back.colour) is type(colour)


def test_a_text_ends_at_its_first_zero(codec):
    """What is behind the zero of a text in C does not belong to it."""
    data = bytearray(codec.encode(Whole(text="abc")))
    data[8:12] = b"junk"
    assert codec.decode(bytes(data)).text == "abc"


def test_what_does_not_fit_is_named(codec):
    """A value that does not fit is a ValueError that names the member."""
    with pytest.raises(ValueError, match="text: 9 elements do not fit into 8"):
        codec.encode(Whole(text="too long!"))
    with pytest.raises(ValueError, match=r"both: wide: .* 32 bits"):
        codec.encode(Whole(both=Both(wide=1 << 32)))
