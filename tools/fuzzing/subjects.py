"""What is fuzzed: where inputs come from, and what is done with each.

A refusal is one of our errors; everything else that is raised is a defect.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Callable, NamedTuple

from fuzzing import proc
from fuzzing.mutation import changed
from pybpfthrottle import settings
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import btf_c
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.btf_text import declaration
from pybpfthrottle.bpf.obj.btf_values import BtfCodec
from pybpfthrottle.errors import RulesError
from pybpfthrottle.rules import reading

ROOT = Path(__file__).resolve().parents[2]
_MAX_VALUE_BYTES = 1 << 12
# Those that are shipped have ten times as much to be read as the small ones.
_ONE_OF = 20

_KEYS = (b"name", b"match", b"download", b"upload", b"when", b"quota", b"group", b"traffic", b"x")
_TEXTS: tuple[bytes, ...] = (b"0", b"-1", b"1M", b"1e9M", b"nan", b"*", b"(", b"[[", b"/", b"..")
_TEXTS += (b"24:00-00:00", b"mon-xyz", b"99:99", b"10.0.0.0/33", b"::/129", b"::ffff:1.2.3.4")
_TEXTS += (b"\\u0000", b"\\u202e", b"\xc3\xa4", b"\xf0\x9f\x98\x80", b"a" * 5000, b"9" * 400, b"0K")
_VALUES: tuple[bytes, ...] = (
    b"0",
    b"-1",
    b"9" * 30,
    b"1e999",
    b"nan",
    b"inf",
    b"true",
    b'""',
    b"[]",
)
_VALUES += (b"{}", b"[[]]", b'[""]', b"{x = 1}", b"1979-05-27", b"07:32:00", b"0x_1", b'"\\u0007"')
_VALUES += (b"[1, 'a']", b"1979-05-27T07:32:00Z", b'{name = "a", user = []}', b'"8mbit"', b"1.5")


class Subject(NamedTuple):
    """One kind of input."""

    about: str
    make: Callable[[Random], bytes]
    use: Callable[[bytes], None]


def _object(random: Random) -> bytes:
    """Return an object of which one section was changed, or anything."""
    small, shipped = _small_objects(), _shipped_objects()
    data = random.choice(_mostly(random, small, shipped))
    if random.randrange(4) == 0:
        return changed(random, data, small)
    extents = import_module("broken").extents
    _, begin, end = random.choice([one for one in extents(data) if one.begin < one.end])
    section = changed(random, data[begin:end], small)
    # It keeps its place and size.
    return data[:begin] + section[: end - begin].ljust(end - begin, b"\0") + data[end:]


def _mostly(random: Random, small: list[bytes], shipped: list[bytes]) -> list[bytes]:
    return shipped if random.randrange(_ONE_OF) == 0 else small


def _types(random: Random) -> bytes:
    small, shipped = _small_types(), _shipped_types()
    return changed(random, random.choice(_mostly(random, small, shipped)), small)


def _use_types(data: bytes) -> None:
    """Read all of it, write it as C, and values of it there and back."""
    try:
        btf = Btf(data)
        found = btf.types
    except ObjectFileError:
        return
    with suppress(ObjectFileError):
        btf_c.header(btf)
    for type_id in range(1, min(len(found), 50) + 1):
        with suppress(ObjectFileError):
            declaration(btf, type_id, "name")
        with suppress(ObjectFileError, ValueError):
            if btf.size(type_id) <= _MAX_VALUE_BYTES:
                codec = BtfCodec(btf, type_id)
                codec.encode(codec.decode(bytes(btf.size(type_id))))


def _rules(random: Random) -> bytes:
    """Return a file that most often is TOML still: values, and what is within quotes, change."""
    known = _written_rules()
    data = random.choice(known)
    if random.randrange(8) == 0:
        return changed(random, data, known)
    for _ in range(random.randint(1, 3)):
        found = random.choice(
            list(re.finditer(rb"(?<== ).+$|(?<=\")[^\"\n]+(?=\")|^\w+", data, re.M))
        )
        inside = data[found.start() - 1 : found.start()] == b'"'
        new = random.choice(_TEXTS if inside else _KEYS if found[0].isalnum() else _VALUES)
        data = data[: found.start()] + new + data[found.end() :]
    return data


def _use_rules(data: bytes) -> None:
    """Read them as a file that root has written; what they are as JSON is JSON."""
    settings.read_trusted = lambda path: data.decode(errors="replace")
    try:
        for rule in reading.read(["fuzzed.toml"]).rules:
            json.dumps(rule.to_json())
    except RulesError as error:
        str(error)


@cache
def _shipped_objects() -> list[bytes]:
    paths = sorted((ROOT / "prebuilt").glob("*.bpfel.o"), key=lambda path: path.stat().st_size)
    return [path.read_bytes() for path in paths[:2]]


@cache
def _small_objects() -> list[bytes]:
    builder = import_module("elf_builder")
    objects = []
    for with_maps in (True, False):
        one = builder.ObjectBuilder()
        code = one.code("cgroup_skb/egress", one.load() + one.returns(), "program")
        one.code("socket", one.call() + one.returns(), "other")
        one.code(".text", one.returns(), "helper")
        data = one.section(".data", bytes(16), flags=3)
        one.section(".rodata", b"constant\0\0\0\0\0\0\0\0")
        one.section("license", b"GPL\0", flags=3)
        number = one.symbol("number", data, size=4, type=builder.OBJECT)
        if with_maps:
            maps = one.section(".maps", bytes(32), flags=3)
            one.section(".BTF", _small_types()[0], flags=0)
            number = one.symbol("counters", maps, size=32, type=builder.OBJECT)
        one.relocation(code, 0, number, builder.R_BPF_64_64)
        objects.append(one.build())
    return objects


@cache
def _small_types() -> list[bytes]:
    """Return types of all kinds, with those of a map, and the fewest."""
    elf_builder = import_module("elf_builder")
    builder, empty = elf_builder.BtfBuilder(), elf_builder.BtfBuilder()
    kinds = {"int": 1, "ptr": 2, "array": 3, "struct": 4, "union": 5, "enum": 6, "typedef": 8}
    number = builder.add(kinds["int"], "int", size=4, tail=(32,))
    array = builder.add(kinds["array"], tail=(number, number, 8))
    pointer = builder.add(kinds["ptr"], size=array)
    pair = ("a", number, 0, "b", number, 32)
    value = builder.add(kinds["struct"], "value", size=8, vlen=2, tail=pair)
    union = builder.add(kinds["union"], "u", size=8, vlen=2, tail=("v", value, 0, "n", number, 0))
    builder.add(kinds["enum"], "color", size=4, vlen=2, tail=("RED", 0, "BLUE", 1))
    builder.add(kinds["typedef"], "alias", size=union)
    to_value = builder.add(kinds["ptr"], size=value)
    fields = ("type", pointer, 0, "key", to_value, 64, "value", to_value, 128)
    table = builder.add(kinds["struct"], size=32, vlen=3, tail=fields)
    variable = builder.add(14, "counters", size=table, tail=(1,))
    builder.add(15, ".maps", size=32, vlen=1, tail=(variable, 0, 32))
    prototype = builder.add(13, size=number, vlen=1, tail=("arg", pointer))
    builder.add(12, "program", size=prototype, vlen=1)
    empty.add(1, "int", size=4, tail=(32,))
    return [builder.build(), empty.build()]


@cache
def _shipped_types() -> list[bytes]:
    extents = import_module("broken").extents
    return [
        data[begin:end]
        for data in _shipped_objects()
        for name, begin, end in extents(data)
        if name == ".BTF"
    ]


@cache
def _written_rules() -> list[bytes]:
    """Return the rules that the guides show."""
    pages = sorted((ROOT / "docs/guides").glob("*.md"))
    blocks = [re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.M | re.S) for page in pages]
    return [block.encode() for found in blocks for block in found]


def subjects() -> dict[str, Subject]:
    """Return all kinds by their names."""
    return {
        "elf": Subject("objects", _object, import_module("broken").use),
        "btf": Subject("types", _types, _use_types),
        "rules": Subject("rules files", _rules, _use_rules),
        "proc": Subject("files of /proc with hostile names", proc.make, proc.use),
    }
