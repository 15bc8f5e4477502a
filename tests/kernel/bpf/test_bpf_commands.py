"""The bpf commands tell what bpftool tells of the same objects, as JSON and as tables."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compiled import compiled
from lab import ENVIRONMENT, TOOL
from pinned import bpftool, load_by_bpftool
from since import since

from pybpfthrottle.bpf import links, maps, programs
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.linux.cgroup import Cgroup

REFUSING = [sys.executable, str(Path(__file__).parents[1].joinpath("refusing.py"))]
EPERM_FOR_NEXT_ID = "12=1"
NUMBERS = re.compile(r"^0x[0-9a-f]+$")


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A bpf file system of the test's own."""
    directory = tmp_path / "bpffs"
    directory.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(directory)], check=True)
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture
def values(bpffs: Path) -> Path:
    """A bpf file system with the programs and maps of values.bpf.c, with BTF, and some elements."""
    load_by_bpftool("values", bpffs)
    with programs.open_pinned(bpffs / "programs" / "longer") as program:
        program.test_run(bytes(64), context=struct.pack("=3I", 0, 0, 7))
    with programs.open_pinned(bpffs / "programs" / "count") as program:
        program.test_run(bytes(64), repeat=3)
    return bpffs


def run(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Our command."""
    return subprocess.run(
        [*before, *TOOL, "bpf", *arguments],
        capture_output=True,
        env=ENVIRONMENT,
        text=True,
    )


def ours(*arguments: str) -> Any:
    """What our command prints as JSON."""
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that says what was wrong."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Each field that bpftool tells is ours; times may be a second apart, holders it cannot see."""
    theirs = {key: value for key, value in theirs.items() if key not in ("pids", "pinned")}
    assert abs(ours.get("loaded_at", 0) - theirs.pop("loaded_at", 0)) <= 1
    assert {key: ours.get(key) for key in theirs} == theirs


@pytest.mark.parametrize("name", ["count", "longer"])
def test_a_program_is_shown_as_bpftool_shows_it(values: Path, name: str) -> None:
    """A program, by its path and by its id, has bpftool's keys and values."""
    path = str(values / "programs" / name)
    theirs = bpftool("prog", "show", "pinned", path)
    found = ours("prog", "show", path)
    same(found, theirs)
    assert ours("prog", "show", str(found["id"])) == found
    assert found in ours("prog", "show", "--name", name)


@pytest.mark.parametrize("name", ["values", "counts", "per_cpu", "values_bss"])
def test_a_map_is_shown_as_bpftool_shows_it(values: Path, name: str) -> None:
    """A map, by its path and by its id, has bpftool's keys and values."""
    path = next(str(p) for p in (values / "maps").iterdir() if p.name.endswith(name[-4:]))
    found = ours("map", "show", path)
    same(found, bpftool("map", "show", "pinned", path))
    assert ours("map", "show", str(found["id"])) == found


def test_the_lists_have_what_bpftool_lists(values: Path) -> None:
    """All programs and maps are listed; other tests may load and close theirs meanwhile."""
    for what in ("prog", "map"):
        theirs = {row["id"]: row for row in bpftool(what, "list")}
        listed = {row["id"]: row for row in ours(what, "list")}
        still = {row["id"] for row in bpftool(what, "list")} & set(theirs)
        assert still - set(listed) == set()
        for number in still:  # its memory and its runs may change between the two
            for key in ("type", "name"):
                assert listed[number].get(key) == theirs[number].get(key)


@since("5.8")
def test_a_link_is_shown_as_bpftool_shows_it(scratch: Cgroup) -> None:
    """A link to a cgroup, with its hook and who holds it; the list has it as well."""
    hook = AttachType.CGROUP_INET_EGRESS
    fd = scratch.open()
    with programs.load(
        asm.return_imm(1), type=ProgType.CGROUP_SKB, license="GPL", expected_attach_type=hook
    ) as program:
        with links.create_link(program, fd, hook) as link:
            os.close(fd)
            number = link.info().id
            theirs = next(row for row in bpftool("link", "list") if row["id"] == number)
            found = ours("link", "show", str(number))
            same(found, theirs)
            assert found["pids"] == [os.getpid()]
            assert found in ours("link", "list")


def normal(value: Any) -> Any:
    """What bpftool prints of a typed value, as ours: bit fields and pointers are numbers."""
    if isinstance(value, dict):
        flat = {key: normal(item) for key, item in value.items() if key}
        nameless = value.get("", {})
        return {**flat, **{key: normal(item) for key, item in nameless.items()}}
    if isinstance(value, list):
        return [normal(item) for item in value]
    if isinstance(value, str) and NUMBERS.match(value):
        return int(value, 16)
    return 0 if value == "(nil)" else value


FULL = {
    "packets": (1 << 64) - 1,
    "delta": -5,
    "flag": True,
    "name": "fifteen letters",
    "raw": [1, 2, 255],
    "state": "BROKEN",
    "three": 5,
    "thirty": (1 << 30) - 1,
    "minus": 7,
    "nameless": 9,
    "deep": 4,
    "either": {"word": 0x04030201},
    "list": [{"low": 1, "high": 2}, {"low": 3, "high": 4}],
    "pointer": 0xFFFF888000000000,
}


def test_a_hash_is_dumped_as_bpftool_dumps_it(values: Path) -> None:
    """A value of all kinds of types has the same fields and values."""
    path = str(values / "maps" / "values")
    with maps.open_pinned(path) as found:
        found.typed_by_btf()[{"id": 1, "port": 2}] = FULL
    theirs = [normal(row["formatted"]) for row in bpftool("map", "dump", "pinned", path)]
    found_rows = ours("map", "dump", path)
    assert found_rows == theirs
    full = next(row["value"] for row in found_rows if row["key"] == {"id": 1, "port": 2})
    assert full == {**FULL, "either": {"word": 0x04030201, "bytes": [1, 2, 3, 4]}}


def test_a_per_cpu_array_is_dumped_as_bpftool_dumps_it(values: Path) -> None:
    """Each element has a list with one value for each CPU."""
    path = str(values / "maps" / "per_cpu")
    with maps.open_pinned(path) as found:
        wanted = [{"low": n, "high": n} for n in range(maps.possible_cpus())]
        found.typed_by_btf()[1] = wanted
    theirs = bpftool("map", "dump", "pinned", path)
    rows = ours("map", "dump", path)
    assert rows[1] == {"key": 1, "value": wanted}
    assert rows == [
        {
            "key": row["formatted"]["key"],
            "value": [cpu["value"] for cpu in row["formatted"]["values"]],
        }
        for row in theirs
    ]


def test_a_data_section_is_dumped_by_its_variables(values: Path) -> None:
    """The map of .bss has the variables' names; bpftool has them in a list of its own."""
    path = str(next(p for p in (values / "maps").iterdir() if "bss" in p.name))
    (theirs,) = bpftool("map", "dump", "pinned", path)
    (row,) = ours("map", "dump", path)
    assert row == {"key": 0, "value": {"runs": 3}}
    assert theirs["formatted"]["value"] == {".bss": [{"runs": 3}]}


def test_a_map_without_btf_is_dumped_in_hex() -> None:
    """Bytes are two digits each, as bpftool has them."""
    from pybpfthrottle.bpf.abi import MapType
    from pybpfthrottle.bpf.obj.specs import MapSpec

    with maps.create(MapSpec("plain", MapType.HASH, 2, 3, 4)) as found:
        found[b"ab"] = b"\x00\x01\xff"
        number = str(found.info().id)
        (row,) = ours("map", "dump", number)
        assert row == {"key": "61 62", "value": "00 01 ff"}
        (theirs,) = bpftool("map", "dump", "id", number)
        assert [int(n, 16) for n in theirs["value"]] == list(bytes.fromhex(row["value"]))
        assert run("map", "dump", number).stdout == "61 62: 00 01 ff\n1 element\n"


def test_a_program_is_dumped_as_bpftool_dumps_it(values: Path) -> None:
    """The instructions and the lines of the source are the same, one a line and as JSON."""
    path = str(values / "programs" / "count")
    shown = bpftool("prog", "dump", "xlated", "pinned", path)
    theirs = [row["disasm"] for row in shown if "disasm" in row]
    rows = ours("prog", "dump", path)
    assert [row["disasm"] for row in rows] == theirs
    assert [row["src"] for row in rows if row.get("src")] == [
        row["src"].strip() for row in shown if row.get("src")
    ]
    lines = run("prog", "dump", path).stdout.splitlines()
    assert lines[0].startswith("; int count(")
    assert lines[1] == "   0: (bf) r6 = r1"
    assert len([line for line in lines if not line.startswith(";")]) == len(rows)


@pytest.fixture
def object_file(tmp_path: Path) -> Path:
    """Values.bpf.c, compiled."""
    path = tmp_path / "values.bpf.o"
    path.write_bytes(compiled("values"))
    return path


def test_load_pins_what_it_loads(object_file: Path, bpffs: Path) -> None:
    """Programs and maps are there at the paths that are told, for bpftool as well."""
    loaded = ours("load", str(object_file), "--pin", str(bpffs / "own"))
    assert {row["name"] for row in loaded["programs"]} == {"count", "longer"}
    assert {row["name"] for row in loaded["maps"]} == {"values", "counts", "per_cpu", "values.bss"}
    for row in loaded["programs"]:
        assert bpftool("prog", "show", "pinned", row["pinned"])["id"] == row["id"]
    for row in loaded["maps"]:
        assert bpftool("map", "show", "pinned", row["pinned"])["id"] == row["id"]


def test_load_takes_only_the_programs_that_are_asked_for(object_file: Path) -> None:
    """One program, with only the maps that it uses; nothing of it is left without --pin."""
    loaded = ours("load", str(object_file), "--program", "count")
    assert [row["name"] for row in loaded["programs"]] == ["count"]
    assert {row["name"] for row in loaded["maps"]} == {"counts", "values.bss"}
    number = loaded["programs"][0]["id"]
    assert f"no program with id {number}" in complaint(run("prog", "show", str(number)))


def test_load_pins_all_or_nothing(object_file: Path, bpffs: Path) -> None:
    """If one path is taken, nothing is pinned, and directories that were made are gone."""
    own = bpffs / "own"
    own.mkdir()
    (own / "longer").mkdir()
    assert "longer: File exists (EEXIST" in complaint(
        run("load", str(object_file), "--pin", str(own))
    )
    assert [path.name for path in own.iterdir()] == ["longer"]


def test_load_says_that_a_directory_is_elsewhere(object_file: Path, tmp_path: Path) -> None:
    """Pinning into another file system tells what is missing, and leaves no directory."""
    other = tmp_path / "other"
    assert "must be in a bpf file system" in complaint(
        run("load", str(object_file), "--pin", str(other))
    )
    assert not other.exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("prog", "show", "2147483647"), "there is no program with id 2147483647"),
        (("map", "dump", "/nowhere"), "there is no object pinned at /nowhere"),
        (("map", "show", "--name", "no-such-map"), "there is no map named 'no-such-map'"),
    ],
)
def test_what_is_not_there_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    """An object that does not exist is one clear line and status 1."""
    assert line in complaint(run(*arguments))


def test_what_is_pinned_must_be_of_the_kind(values: Path) -> None:
    """A map where a program is asked for is refused with what it is."""
    path = str(values / "maps" / "counts")
    assert "it is a bpf-map, not a bpf-prog" in complaint(run("prog", "show", path))


def test_a_name_of_several_is_not_dumped() -> None:
    """Of two maps with one name the ids are told."""
    from pybpfthrottle.bpf.abi import MapType
    from pybpfthrottle.bpf.obj.specs import MapSpec

    spec = MapSpec(f"t{os.getpid()}", MapType.HASH, 4, 4, 4)
    with maps.create(spec) as first, maps.create(spec) as second:
        line = complaint(run("map", "dump", "--name", spec.name))
        assert f"{first.info().id}, {second.info().id}" in line


@pytest.mark.parametrize("arguments", [("prog", "dump"), ("map", "show", "1", "--name", "x")])
def test_it_must_be_said_which_object_is_meant(arguments: tuple[str, ...]) -> None:
    """Nothing, or an id and a name, is wrong usage, where show without anything lists all."""
    assert run(*arguments).returncode == 2


def test_a_refusal_of_the_kernel_is_one_line() -> None:
    """Where bpf(2) refuses to list, it says so, and does not show an empty list."""
    done = run("map", "list", before=(*REFUSING, EPERM_FOR_NEXT_ID, "--"))
    assert "BPF_MAP_GET_NEXT_ID" in complaint(done)


def test_tables_have_a_line_for_each_object(values: Path) -> None:
    """The table of a map has its keys above its values."""
    header, row = run("map", "show", str(values / "maps" / "counts")).stdout.splitlines()
    assert header.split()[:3] == ["id", "type", "name"]
    assert row.split()[1:3] == ["array", "counts"]
