"""What inspect tells of an object: compared with readelf and bpftool, and checked by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess

import pytest
from compiled import compiled
from since import needs_command

from pybpfthrottle.bpf.abi import AttachType, MapType, ProgType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import asm, elf, releases
from pybpfthrottle.bpf.obj.btf import Kind
from pybpfthrottle.bpf.obj.btf_text import declaration, definitions
from pybpfthrottle.bpf.obj.helper_names import helper_name
from pybpfthrottle.bpf.obj.inspection import Inspection, inspect

FIXTURES = ("object_maps", "object_data", "object_calls", "core_reads", "externs", "ring")


def needed(name: str, *flags: str) -> dict[str, str]:
    """The names of what a fixture needs, and the first release of each."""
    found = Inspection(compiled(name, *flags)).describe()
    return {need["name"]: need["since"] for need in found["needs"]}


@pytest.mark.parametrize("name", FIXTURES)
def test_sections_are_those_of_readelf(name: str, tmp_path) -> None:
    """The names, sizes and flags of all sections are readelf's."""
    needs_command("readelf")
    path = tmp_path / "built.o"
    path.write_bytes(compiled(name))
    text = subprocess.run(
        ["readelf", "-SW", str(path)], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    line = re.compile(r"^ +\[ *[1-9]\d*\] (\S+) +\S+ +\w+ \w+ (\w+) \w+ +([A-Z]*) ", re.MULTILINE)
    theirs = [(found[1], int(found[2], 16), found[3]) for found in line.finditer(text)]
    ours = Inspection(path.read_bytes()).sections()
    # readelf shows the flag E, for what linkers leave out, of one section of clang's.
    theirs = [(where, size, flags.replace("E", "")) for where, size, flags in theirs]
    assert [(one["name"], one["size"], one["flags"]) for one in ours] == theirs


@pytest.mark.parametrize("name", FIXTURES)
def test_types_are_as_many_as_bpftool_finds(name: str, tmp_path) -> None:
    """The number of types of each kind is bpftool's."""
    needs_command("bpftool")
    path = tmp_path / "built.o"
    path.write_bytes(compiled(name))
    done = subprocess.run(
        ["bpftool", "--json", "btf", "dump", "file", str(path)],
        stdout=subprocess.PIPE,
        check=True,
    )
    theirs: dict[str, int] = {}
    for found in json.loads(done.stdout)["types"]:
        kind = found["kind"].lower()
        theirs[kind] = theirs.get(kind, 0) + 1
    assert Inspection(path.read_bytes()).type_counts() == theirs


def test_core_relocations_are_words() -> None:
    """A CO-RE relocation is told as what it asks for."""
    found = Inspection(compiled("core_reads")).core_relocations()
    texts = {row["text"] for row in found}
    assert "field offset of struct task_struct___mine.tgid" in texts
    assert "field existence of struct task_struct___mine.not_in_any_kernel" in texts


def test_programs_name_what_they_use() -> None:
    """The functions that a program calls are named, and their instructions counted."""
    found = {row["name"]: row for row in Inspection(compiled("object_calls")).programs()}
    calling = [row for row in found.values() if row["functions"]]
    assert calling
    assert all(row["linked_instructions"] > row["instructions"] for row in calling)


def test_variables_have_types_and_values() -> None:
    """Each variable has its section, its type, and the value that it begins with."""
    inspection = Inspection(compiled("object_data"))
    found = {row["name"]: row for row in inspection.variables()}
    assert set(found) == set(inspection.spec.variables)
    for name, row in found.items():
        value = inspection.spec.variables[name].get()
        assert row["type"]
        if isinstance(value, int) and isinstance(row["value"], int):
            assert row["value"] == value


def test_what_instructions_need_is_seen() -> None:
    """The version of the instructions follows -mcpu."""
    assert "32-bit jumps (cpu v3)" in needed("core_reads", "-mcpu=v3")
    v1 = needed("core_reads", "-mcpu=v1")
    assert not any("cpu" in name for name in v1)


@pytest.mark.parametrize(
    ("code", "need"),
    [
        (asm.insn(0xBF, dst=1, src=2, off=8), "instructions of cpu v4"),
        (asm.insn(0x3F, dst=1, src=2, off=1), "instructions of cpu v4"),
        (asm.insn(0xD7, dst=1, imm=16), "instructions of cpu v4"),
        (asm.insn(0x91, dst=1, src=2), "instructions of cpu v4"),
        (asm.insn(0x06, imm=1), "instructions of cpu v4"),
        (asm.insn(0xAD, dst=1, src=2, off=1), "jumps if lower (cpu v2)"),
        (asm.insn(0x05, off=-1), "jumps backwards (loops)"),
        (asm.insn(0xE5, off=1), "may_goto"),
        (asm.insn(0xBF, dst=1, src=2, off=1, imm=1), "address spaces"),
        (asm.insn(0xDB, dst=1, src=2, imm=0xF1), "atomic instructions (cpu v3)"),
        (asm.insn(0xDB, dst=1, src=2, imm=0x100), "load-acquire and store-release"),
        (asm.insn(0xDB, dst=1, src=2), None),
        (asm.insn(0xBF, dst=1, src=2), None),
        (asm.call(130), "bpf_ringbuf_output"),
        (asm.call(9999), None),
    ],
)
def test_each_kind_of_instruction_is_known(code: bytes, need) -> None:
    """What is newer than the first kernels is told of each instruction."""
    from elf_builder import ObjectBuilder

    builder = ObjectBuilder()
    builder.code("socket", code + asm.return_imm(0), "program")
    found = [one["name"] for one in Inspection(builder.build()).describe()["needs"]]
    assert [name for name in found if name != "socket_filter programs"] == ([need] if need else [])


def test_each_program_and_map_type_has_its_release() -> None:
    """No type that this package knows is without its first release."""
    assert set(releases.PROGRAM_TYPES) == set(ProgType) - {ProgType.UNSPEC}
    assert set(releases.MAP_TYPES) == set(MapType) - {MapType.UNSPEC}
    assert set(releases.ATTACH_TYPES) <= set(AttachType)


@pytest.mark.parametrize(
    ("helper", "release"),
    [
        *(("bpf_map_lookup_elem", "3.19"), ("bpf_ktime_get_ns", "4.1"), ("bpf_redirect", "4.4")),
        *(("bpf_skb_load_bytes", "4.5"), ("bpf_skb_cgroup_id", "4.18")),
        *(("bpf_spin_lock", "5.1"), ("bpf_sk_storage_get", "5.2"), ("bpf_ringbuf_output", "5.8")),
        *(("bpf_timer_init", "5.15"), ("bpf_loop", "5.17"), ("bpf_cgrp_storage_delete", "6.2")),
    ],
)
def test_helpers_have_their_release(helper: str, release: str) -> None:
    """The first release with a helper is what the kernel's history says."""
    number = next(number for number in range(1, 212) if helper_name(number) == helper)
    assert releases.of_helper(number) == release


def test_weak_externs_are_optional() -> None:
    """What is declared __weak does not make a kernel too old."""
    found = Inspection(compiled("externs")).describe()
    assert found["oldest_kernel"] == "5.14"
    assert {row["name"]: row["weak"] for row in found["externs"]}["not_a_symbol"]


def test_types_are_as_c_spells_them() -> None:
    """Pointers, arrays, functions and qualifiers stand where C wants them."""
    btf = Inspection(compiled("externs")).spec.btf
    acquire = btf.find(Kind.FUNC, "bpf_task_acquire")
    assert declaration(btf, acquire.size_or_type, "f").startswith("struct task_struct *f(struct")
    lines = list(definitions(btf))
    assert "typedef unsigned long long u64;" in lines or "typedef unsigned long u64;" in lines


def test_only_regular_files_are_read(tmp_path) -> None:
    """What has no end, or would block, or is made up when it is read, is refused at once."""
    fifo, sparse = tmp_path / "fifo", tmp_path / "sparse"
    os.mkfifo(fifo)
    with open(sparse, "wb") as file:
        file.truncate(10 << 30)
    for path in (fifo, sparse, "/dev/zero", "/proc/self/mem", "/proc/self/maps", tmp_path):
        with pytest.raises(ObjectFileError, match=r"regular file|not an ELF|is empty"):
            elf.read_file(path)
    with open(sparse, "r+b") as file:
        file.write(b"\x7fELF")
    with pytest.raises(ObjectFileError, match="10240 MB are too many"):
        elf.read_file(sparse)


def test_a_file_and_bytes_are_inspected_alike(tmp_path):
    """The path of an object tells the same as its bytes."""
    data = compiled("object_data")
    path = tmp_path / "object.o"
    path.write_bytes(data)
    assert inspect(path).describe() == inspect(data).describe()
    path.write_bytes(b"no object")
    with pytest.raises(ObjectFileError, match=str(path)):
        inspect(path)
