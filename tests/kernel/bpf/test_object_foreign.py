"""Objects as other loaders and linkers have them: each does here what it does there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from compiled import FIXTURES, compiled
from since import needs_command, needs_machine, since

from pybpfthrottle import bpf
from pybpfthrottle.bpf import descriptors, loader, maps, syscall
from pybpfthrottle.bpf.abi import Cmd, MapInfo
from pybpfthrottle.bpf.errors import MapCreateError, ObjectFileError, VerifierError
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.running import RunningKernel

PACKET = bytes(64)


def read(name, *flags):
    """The spec of a fixture."""
    return elf.read_object(compiled(name, *flags), name=name)


@pytest.fixture
def foreign():
    """What other loaders' objects have."""
    return read("object_foreign")


def answer(spec, name, packet=PACKET, **options):
    """What one program of an object returns."""
    with loader.load(spec, [name], **options) as loaded:
        return loaded.programs[name].test_run(packet).retval


@pytest.mark.parametrize(("number", "returned"), [(None, 64), (5, 69), (-1, 63)])
def test_a_constant_of_inline_assembly_is_0_until_it_is_set(foreign, number, returned):
    """A symbol that only inline assembly knows is loaded as the number that the spec has for it."""
    assert foreign.constants == {"OPEN_NUMBER": 0}
    if number is not None:
        foreign.constants["OPEN_NUMBER"] = number
    assert answer(foreign, "adds_constant") == returned


def test_perf_events_may_have_a_type(foreign):
    """A perf event array whose values have a type is one of descriptors all the same."""
    with loader.load(foreign, ["reports"]) as loaded:
        info = descriptors.fill_info(loaded.maps["events"].fd, MapInfo())
        assert (info.key_size, info.value_size, info.max_entries) == (4, 4, maps.possible_cpus())
    assert foreign.btf.size(foreign.maps["events"].value_type) == 16


def test_ayas_wrapped_definition_is_a_map(foreign):
    """A definition that is wrapped in structs, as aya's is in a cell, is what it wraps."""
    with loader.load(foreign, ["counts_in_wrapped"]) as loaded:
        assert loaded.programs["counts_in_wrapped"].test_run(PACKET).retval == 0
        assert dict(loaded.maps["wrapped"].typed(int, int)) == {3: 64}
        assert loaded.maps["wrapped"].info().max_entries == 8


@pytest.mark.parametrize("selected", [None, ["entry"]])
@pytest.mark.parametrize(("length", "returned"), [(64, 42), (66, 43)])
def test_iproute2s_sections_are_places_in_program_arrays(selected, length, returned):
    """SEC("ID/KEY") puts a program into the array with this id, of the type of its users."""
    with loader.load(read("object_iproute2"), selected) as loaded:
        assert loaded.programs["entry"].test_run(bytes(length)).retval == returned
        assert sorted(loaded.programs) == ["entry", "last", "tail"]


@pytest.mark.parametrize(
    ("program", "section"), [("spells", ".rodata"), ("spells_changing", ".data")]
)
def test_pointers_in_data_are_refused_where_a_program_uses_them(foreign, program, section):
    """Nothing fills in a pointer in data, so that a program that reads one is refused in words."""
    with pytest.raises(ObjectFileError, match=f"uses pointers in section '{section}'"):
        loader.load(foreign, [program])
    assert answer(foreign, "counts") == 1


@since("6.7")
def test_an_exception_callback_is_called(foreign):
    """The function that a tag names is called with what the program throws."""
    assert answer(foreign, "throws") == 42


@since("6.2")
def test_a_weak_function_of_another_signature_is_lacking(foreign):
    """Of a function's flavours the one with the kernel's signature is there, the other is 0."""
    assert answer(foreign, "prefers_two", b"") == 11


@since("6.2")
def test_other_types_answer_core_alone(foreign, tmp_path):
    """With types that have CO-RE's answers only, functions and targets are the kernel's own."""
    needs_command("bpftool")
    built, few = tmp_path / "built.o", tmp_path / "few.btf"
    built.write_bytes(compiled("object_foreign"))
    command = ["bpftool", "gen", "min_core_btf", "/sys/kernel/btf/vmlinux", str(few), str(built)]
    subprocess.run(command, check=True)
    kernel = RunningKernel(types_path=str(few))
    assert answer(foreign, "who", b"", kernel=kernel) == os.getpid()
    loader.load(foreign, ["newtask"], kernel=kernel).close()


def test_sections_of_one_name_are_one(foreign):
    """Instances of a template, each in a section of the same name, are programs with their data."""
    spec = read("object_templates")
    names = [f"_Z7programILi{number}EEiP9__sk_buff" for number in (1, 2, 9)]
    assert list(spec.programs) == names
    assert [answer(spec, name) for name in names[:2]] == [71, 135]
    with pytest.raises(VerifierError) as caught:
        loader.load(spec, names[2:])
    assert "the kernel refuses this line" in caught.value.source


@since("5.0")
def test_names_that_c_does_not_have_are_made_legal():
    """A type with a name of C++ or Rust does not cost the object its types."""
    with loader.load(read("object_templates"), ["_Z7programILi1EEiP9__sk_buff"]) as loaded:
        assert loaded.maps[".data.boxes"].typed_by_btf()[0] == {"_ZL5seven": {"value": 7}}


@pytest.fixture
def linked(tmp_path):
    """Two sources with statics of the same names, as bpftool links them."""
    needs_command("bpftool")
    parts = []
    for flags in ((), ("-DSECOND",)):
        parts.append(tmp_path / f"part{len(parts)}.o")
        parts[-1].write_bytes(compiled("object_statics", *flags))
    whole = tmp_path / "whole.o"
    subprocess.run(["bpftool", "gen", "object", str(whole), *map(str, parts)], check=True)
    return elf.read_object(whole.read_bytes())


def test_statics_of_one_name_are_told_apart(linked):
    """After linking, each source's programs have their own static variables and maps."""
    with loader.load(linked) as loaded:
        returned = [program.test_run(PACKET).retval for program in loaded.programs.values()]
        assert returned == [64 + 11, 640 + 20]
        values = {name: variable.get() for name, variable in loaded.variables.items()}
        assert values == {"counter": 2, "limit": 11, "counter.1": 20, "limit.1": 20, "before": 5}
        assert dict(loaded.maps["totals"].typed(int, "i")) == {0: 1}
        assert loaded.maps["totals.1"].typed(int, "q")[9] == 10


def test_types_tell_statics_of_one_name_apart(linked):
    """The types of linked objects, which say where each variable is, are kept as they are."""
    spec = linked.variables["counter.1"]
    assert (spec.offset, spec.size, linked.btf.size(spec.type)) == (8, 8, 8)
    with loader.load(linked) as loaded:
        assert loaded.maps["object.data"].info().value_type_id


@pytest.mark.parametrize("size", [64, 4096])
def test_a_larger_data_section_ends_in_zeros(foreign, size):
    """A data section that a spec makes larger begins as the object has it, and ends in zeros."""
    name = "object_f.data"
    begins = foreign.maps[name].contents
    foreign.maps[name].value_size = size
    with maps.create(foreign.maps[name]) as live:
        assert live.typed(int, bytes)[0] == begins.ljust(size, b"\0")


def test_a_smaller_data_section_is_refused(foreign):
    """A data section that would lose variables is refused, and no descriptor stays open."""
    name = "object_f.data"
    foreign.maps[name].value_size = 8
    before = os.listdir("/proc/self/fd")
    with pytest.raises(MapCreateError, match="its contents have 16 bytes, but its value_size is 8"):
        maps.create(foreign.maps[name])
    assert os.listdir("/proc/self/fd") == before


@since("6.4")  # before, a log keeps its beginning
def test_a_too_complex_program_is_loaded_twice(monkeypatch):
    """What the verifier finds too complex is loaded once more, for a log with the source."""
    verified = []

    def watch(cmd, attr, bpf=syscall.bpf):
        flags = attr.prog_load.prog_flags
        verified.extend([cmd] * (cmd == Cmd.PROG_LOAD and flags != (1 << 32) - 1))
        return bpf(cmd, attr)

    monkeypatch.setattr(syscall, "bpf", watch)
    with pytest.raises(VerifierError, match="program is too large") as caught:
        loader.load(read("object_complex"))
    assert len(verified) == 2
    assert "object_complex.bpf.c:" in caught.value.source
    assert "; sum *= 3;" in caught.value.log


@since("5.8")
@pytest.mark.parametrize(("kind", "name"), [(bpf.PerfBuffer, "array"), (bpf.RingBuffer, "ring")])
def test_an_object_of_pythonbpf_is_one_like_any_other(kind, name):
    """What pythonbpf makes of Python is loaded and attached, and its maps and buffers are read."""
    needs_machine("a little-endian machine", found=sys.byteorder == "little")
    with bpf.load(FIXTURES / "pythonbpf" / "counts.bpfel.o") as loaded:
        with loaded.programs["count"].attach(), kind(loaded.maps[name], "QQ") as buffer:
            os.getpgid(0)
            told = [process for process, _ in buffer.read(timeout_s=0)]
        assert os.getpid() in told
        assert loaded.maps["counts"].typed("Q", "Q")[os.getpid()] >= 1
