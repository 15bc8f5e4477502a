from __future__ import annotations

import functools
import struct
import sys
from pathlib import Path

import pytest
from elf_builder import (
    ALLOC,
    EM_X86_64,
    EXECUTABLE,
    LOCAL,
    NOBITS,
    NOTYPE,
    OBJECT,
    R_BPF_64_32,
    R_BPF_64_64,
    SECTION,
    UNDEFINED,
    BtfBuilder,
    ObjectBuilder,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybpfthrottle.bpf.abi import BPF_F_MMAPABLE, BPF_F_RDONLY_PROG, AttachType, MapType, ProgType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import elf, relocate
from pybpfthrottle.bpf.obj.btf import Kind
from pybpfthrottle.bpf.obj.specs import CallReference, FunctionKey, MapReference, MapSpec

ROOT = Path(__file__).resolve().parents[3]
INGRESS = "cgroup_skb/ingress"


def read(builder, **options):
    """The spec of what was built."""
    return elf.read_object(builder.build(**options), name="test")


def refused(builder):
    """The error for an object that cannot be read."""
    with pytest.raises(ObjectFileError) as caught:
        read(builder)
    return caught.value


def with_everything(byteorder="little"):
    """An object with maps, data, calls, and several programs."""
    builder = ObjectBuilder(byteorder)
    text = builder.code(".text", builder.returns(5), "helper")
    maps = builder.section("maps", struct.pack(builder.order + "5I", 2, 4, 8, 1, 0))
    map_symbol = builder.symbol("counts", maps, size=20, type=OBJECT)
    data = builder.section(".data", b"\1\2\3\4")
    variable = builder.symbol("variable", data, size=4, type=OBJECT)
    code = builder.load() + builder.load() + builder.call() + builder.returns()
    ingress = builder.code(INGRESS, code, "first")
    builder.relocation(ingress, 0, map_symbol, R_BPF_64_64)
    builder.relocation(ingress, 16, variable, R_BPF_64_64)
    builder.relocation(ingress, 32, builder.symbol("", text, type=SECTION, bind=LOCAL), R_BPF_64_32)
    builder.code("cgroup_skb/egress", builder.returns(), "second")
    builder.section("license", b"Dual MIT/GPL\0")
    return builder


def test_an_empty_file_is_refused():
    """No bytes at all are told apart from bytes that are no object."""
    with pytest.raises(ObjectFileError, match="empty"):
        elf.read_object(b"")


@pytest.mark.parametrize("data", [b"\x7f", b"\x7fEL", b"MZ\x90\0" * 64, b"#!/bin/sh\n"])
def test_what_is_no_elf_file_is_refused(data):
    """Data without ELF's magic number is refused as such."""
    with pytest.raises(ObjectFileError, match="not an ELF file"):
        elf.read_object(data)


def test_an_object_for_another_machine_is_refused():
    """An object for the machine's own processor is refused with what to do."""
    error = refused(ObjectBuilder(machine=EM_X86_64))
    assert "EM_X86_64" in str(error)
    assert "clang -target bpf" in str(error)


def test_a_program_of_this_machine_is_refused():
    """The Python that runs this test is an ELF file, but no BPF object."""
    with pytest.raises(ObjectFileError, match="not for BPF"):
        elf.read_file(sys.executable)


def test_a_32_bit_object_is_refused():
    """A 32-bit file is refused, also if it says BPF."""
    header = struct.pack("<4sBBBB8xHHI", b"\x7fELF", 1, 1, 1, 0, 1, 247, 1)
    header += struct.pack("<IIIIHHHHHH", 0, 0, 0, 0, 52, 0, 0, 40, 0, 0)
    with pytest.raises(ObjectFileError, match="32 bit"):
        elf.read_object(header)


def test_an_unknown_class_is_refused():
    """A file that is neither 32 nor 64 bit wide is refused."""
    data = bytearray(with_everything().build())
    data[4] = 7
    with pytest.raises(ObjectFileError):
        elf.read_object(bytes(data))


@pytest.mark.parametrize("table_first", [False, True])
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_each_truncation_is_refused(byteorder, table_first):
    """Wherever a small object ends too early, the answer is ObjectFileError and nothing else."""
    whole = with_everything(byteorder).build(table_first=table_first)
    assert elf.read_object(whole).programs
    for length in range(len(whole) - 1):
        with pytest.raises(ObjectFileError):
            elf.read_object(whole[:length])


@pytest.mark.parametrize("name", ["throttle.bpfel.o", "throttle-direct.bpfeb.o"])
def test_each_truncation_of_a_shipped_object_is_refused(name):
    """Cut at each 64th byte, a shipped object is an ObjectFileError and nothing else."""
    whole = (ROOT / "prebuilt" / name).read_bytes()
    for length in range(0, len(whole), 64):
        with pytest.raises(ObjectFileError):
            elf.read_object(whole[:length])


def test_the_path_is_in_front_of_the_error(tmp_path):
    """read_file says which file is at fault."""
    path = tmp_path / "broken.o"
    path.write_bytes(b"nothing")
    with pytest.raises(ObjectFileError) as caught:
        elf.read_file(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    """read_file lets Python's own error for a missing file through."""
    with pytest.raises(FileNotFoundError):
        elf.read_file(tmp_path / "none.o")


def test_the_name_of_the_spec_is_that_of_the_file(tmp_path):
    """A spec that is read from a file has the file's name up to the first dot."""
    path = tmp_path / "filter.bpfel.o"
    path.write_bytes(with_everything().build())
    assert elf.read_file(path).name == "filter"


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_the_same_bytes_give_the_same_spec(byteorder):
    """Reading is pure: two readings are equal."""
    data = with_everything(byteorder).build()
    assert elf.read_object(data) == elf.read_object(data)


@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_the_byte_order_is_that_of_the_object(byteorder):
    """A spec says for which byte order it was built."""
    assert read(with_everything(byteorder)).byteorder == byteorder


def test_where_the_section_table_lies_makes_no_difference():
    """An object with its section table in front gives the same spec."""
    builder = with_everything()
    data, other = builder.build(), with_everything().build(table_first=True)
    assert data != other
    assert elf.read_object(data) == elf.read_object(other)


@pytest.mark.parametrize(
    ("section", "type", "attach_type"),
    [
        (INGRESS, ProgType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS),
        ("cgroup_skb/egress", ProgType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS),
        ("cgroup/skb", ProgType.CGROUP_SKB, None),
        ("cgroup/sock_create", ProgType.CGROUP_SOCK, AttachType.CGROUP_INET_SOCK_CREATE),
        ("cgroup/post_bind6", ProgType.CGROUP_SOCK, AttachType.CGROUP_INET6_POST_BIND),
        ("cgroup/dev", ProgType.CGROUP_DEVICE, AttachType.CGROUP_DEVICE),
        ("sockops", ProgType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS),
        ("socket", ProgType.SOCKET_FILTER, None),
        ("socket/filter", ProgType.SOCKET_FILTER, None),
        ("tc", ProgType.SCHED_CLS, None),
        ("classifier/egress", ProgType.SCHED_CLS, None),
        ("xdp", ProgType.XDP, AttachType.XDP),
        ("kprobe/tcp_connect", ProgType.KPROBE, None),
        ("tracepoint/sched/sched_switch", ProgType.TRACEPOINT, None),
        ("raw_tp/sched_switch", ProgType.RAW_TRACEPOINT, None),
    ],
)
def test_the_section_says_what_a_program_is(builder, section, type, attach_type):
    """The section's name gives the program type, and the attach type where it says one."""
    builder.code(section, builder.returns(), "main")
    program = read(builder).programs["main"]
    assert (program.section, program.type, program.expected_attach_type) == (
        section,
        type,
        attach_type,
    )


@pytest.mark.parametrize("section", ["nonsense", "cgroup_skb/sideways", "tptp", "cgroup"])
def test_a_section_that_says_nothing_has_programs_without_a_type(builder, section):
    """The programs of a section whose name tells no type are there, for the caller to give one."""
    builder.code(section, builder.returns(), "main")
    assert read(builder).programs["main"].type == ProgType.UNSPEC


def test_several_programs_in_one_section(builder):
    """Each global function of a section is a program with its own code."""
    code = builder.returns(1) + builder.returns(2) + builder.returns(3)
    builder.code(INGRESS, code, "one", "two", "three")
    programs = read(builder).programs
    assert list(programs) == ["one", "two", "three"]
    assert programs["two"].function.code == builder.returns(2)
    assert programs["two"].function.key == FunctionKey(INGRESS, 16)


def test_a_static_function_is_no_program(builder):
    """A local function beside a program that calls it is no program itself."""
    index = builder.code(INGRESS, builder.call(imm=1) + builder.insn(0x95) + builder.returns())
    builder.symbol("main", index, size=16)
    builder.symbol("static", index, value=16, size=16, bind=LOCAL)
    spec = read(builder)
    assert list(spec.programs) == ["main"]
    assert spec.functions[FunctionKey(INGRESS, 16)].name == "static"


def test_a_static_function_that_nothing_calls_is_a_program(builder):
    """A local function outside of .text is an entry if no other function calls it."""
    index = builder.code(INGRESS, builder.returns() * 2)
    builder.symbol("main", index, size=16)
    builder.symbol("static", index, value=16, size=16, bind=LOCAL)
    assert list(read(builder).programs) == ["main", "static"]


def test_functions_without_sizes_reach_to_the_next(builder):
    """Symbols without type and size, as clang before 7 has them, are functions."""
    index = builder.code(INGRESS, builder.returns(1) + builder.returns(2))
    builder.symbol("one", index, type=NOTYPE)
    builder.symbol("LBB0_1", index, value=8, type=NOTYPE, bind=LOCAL)
    builder.symbol("two", index, value=16, type=NOTYPE)
    programs = read(builder).programs
    assert {name: found.function.code for name, found in programs.items()} == {
        "one": builder.returns(1),
        "two": builder.returns(2),
    }


def test_functions_that_overlap_are_refused(builder):
    """A function that reaches into the next is refused: such can ask for any amount of memory."""
    index = builder.code(INGRESS, builder.returns() * 2)
    builder.symbol("one", index, size=24)
    builder.symbol("two", index, value=16, size=16)
    error = refused(builder)
    assert (error.section, error.offset) == (INGRESS, 0)


def test_a_function_under_two_names_is_two_programs(builder):
    """Two names of one function are two programs with the same code."""
    builder.symbol("alias", builder.code(INGRESS, builder.returns(), "main"), size=16)
    programs = read(builder).programs
    assert sorted(programs) == ["alias", "main"]
    assert programs["alias"].function is programs["main"].function


def test_functions_of_text_are_no_programs(builder):
    """Functions of section .text can be called, but are no programs."""
    builder.code(".text", builder.returns(), "helper")
    spec = read(builder)
    assert spec.programs == {}
    assert spec.functions[FunctionKey(".text", 0)].name == "helper"


def test_code_without_a_function_is_refused(builder):
    """An executable section without a function is refused by name."""
    builder.code(INGRESS, builder.returns())
    assert refused(builder).section == INGRESS


def test_an_empty_executable_section_is_no_error(builder):
    """The empty .text of every object is passed over."""
    builder.code(".text", b"")
    assert read(builder).functions == {}


@pytest.mark.parametrize(
    ("value", "size"), [(0, 24), (8, 16), (4, 8), (0, 12), (16, 0), (1 << 63, 8)]
)
def test_a_function_outside_of_its_section_is_refused(builder, value, size):
    """A function that does not fit into its section is refused with its place."""
    index = builder.code(INGRESS, builder.returns())
    builder.symbol("main", index, value=value, size=size)
    error = refused(builder)
    assert (error.section, error.offset) == (INGRESS, value)
    assert "main" in str(error)


def test_the_license_ends_at_its_nul(builder):
    """The license is the text up to the first NUL."""
    builder.section("license", b"GPL\0garbage")
    assert read(builder).license == "GPL"


def test_without_a_license_section_it_is_empty(builder):
    """An object without a license has an empty one."""
    assert read(builder).license == ""


def add_maps(builder, *definitions, size=None):
    """Add a legacy maps section with a symbol for each definition."""
    index = builder.section("maps", b"".join(definitions))
    at = 0
    for number, definition in enumerate(definitions):
        length = len(definition) if size is None else size
        builder.symbol(f"map{number}", index, value=at, size=length, type=OBJECT)
        at += len(definition)
    return index


def definition(builder, *fields, extra=b""):
    """One struct bpf_map_def."""
    return struct.pack(builder.order + "5I", *fields) + extra


def test_legacy_maps(builder):
    """Each symbol of section maps is a map with the sizes that its bytes say."""
    add_maps(builder, definition(builder, 1, 4, 8, 16, 1), definition(builder, 2, 4, 24, 3, 0))
    assert read(builder).maps == {
        "map0": MapSpec("map0", MapType.HASH, 4, 8, 16, flags=1),
        "map1": MapSpec("map1", MapType.ARRAY, 4, 24, 3),
    }


def test_a_legacy_map_may_have_more_zeros(builder):
    """Fields after those that are known are tolerated while they are zero."""
    add_maps(builder, definition(builder, 1, 4, 8, 16, 1, extra=bytes(16)))
    assert read(builder).maps["map0"] == MapSpec("map0", MapType.HASH, 4, 8, 16, flags=1)


def test_a_legacy_map_with_unknown_fields_is_refused(builder):
    """A field that is not known and not zero is refused with the map's name and place."""
    first = definition(builder, 1, 4, 8, 16, 1)
    add_maps(builder, first, definition(builder, 1, 4, 8, 16, 1, extra=b"\0\0\0\1"))
    error = refused(builder)
    assert (error.section, error.offset) == ("maps", 40)
    assert "map1" in str(error)


def test_a_legacy_map_that_is_too_short_is_refused(builder):
    """A map of fewer bytes than struct bpf_map_def is refused by name."""
    add_maps(builder, definition(builder, 1, 4, 8, 16, 1)[:16])
    error = refused(builder)
    assert "map0" in str(error)
    assert (error.section, error.offset) == ("maps", 0)


def test_a_legacy_map_symbol_past_the_section_is_refused(builder):
    """A map's symbol that points past its section is refused."""
    index = builder.section("maps", definition(builder, 1, 4, 8, 16, 1))
    builder.symbol("map", index, value=64, size=20, type=OBJECT)
    assert refused(builder).offset == 64


def test_two_symbols_of_one_legacy_map_do_not_matter(builder):
    """Symbols that differ in nothing but their kind are read like any others."""
    index = add_maps(builder, definition(builder, 1, 4, 8, 16, 1))
    builder.symbol("map0", index, size=20, type=11)
    assert list(read(builder).maps) == ["map0"]


def add_btf_map(builder, members, *, btf=None):
    """Add a .maps section with one map, ``members`` being name -> (number) or type."""
    types = btf or BtfBuilder(builder.byteorder)
    number = types.add(Kind.INT, "int", size=4, tail=(32,))
    tail = []
    for name, value in members.items():
        target = number if value is None else types.add(Kind.ARRAY, tail=(number, number, value))
        tail += [name, types.add(Kind.PTR, size=target), 0]
    define = types.add(Kind.STRUCT, size=8 * len(members), vlen=len(members), tail=tail)
    var = types.add(Kind.VAR, "events", size=define, tail=(1,))
    types.add(Kind.DATASEC, ".maps", size=8, vlen=1, tail=(var, 0, 8))
    index = builder.section(".maps", bytes(8))
    builder.symbol("events", index, size=8, type=OBJECT)
    builder.section(".BTF", types.build(), flags=0)
    return index


def test_maps_by_their_types(builder):
    """A map of section .maps has the numbers that its BTF says."""
    add_btf_map(builder, {"type": 1, "key": None, "value_size": 16, "max_entries": 9})
    events = MapSpec("events", MapType.HASH, 4, 16, 9, key_type=1)
    assert read(builder).maps == {"events": events}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"max_entries": 9}, "no type"),
        ({"type": 1, "pinning": 2}, "pinning 2 is not supported"),
        ({"type": 1, "colour": 1}, "'colour' is not supported"),
        ({"type": 1, "key": None, "key_size": 8}, "its key has two sizes: 4 and 8 bytes"),
        ({"type": None}, "'type' is not a number"),
    ],
)
def test_a_map_that_is_not_understood_is_named(builder, members, reason):
    """A map whose type says what is not known is refused with its name and the reason."""
    add_btf_map(builder, members)
    error = refused(builder)
    assert error.section == ".maps"
    assert "'events'" in str(error)
    assert reason in str(error)


def test_maps_by_their_types_need_btf(builder):
    """Section .maps without .BTF is refused with what to do."""
    builder.section(".maps", bytes(8))
    assert "compile with -g" in str(refused(builder))


def test_btf_that_does_not_describe_the_maps_is_refused(builder):
    """Section .maps that the .BTF does not know is refused."""
    builder.section(".maps", bytes(8))
    builder.section(".BTF", BtfBuilder(builder.byteorder).build(), flags=0)
    assert refused(builder).section == ".maps"


def test_a_load_of_a_map_is_a_reference(builder):
    """A relocation against a map refers to it, at the load's offset in its function."""
    maps = add_maps(builder, definition(builder, 1, 4, 8, 16, 0))
    symbol = builder.symbol("map0", maps, size=20, type=OBJECT)
    index = builder.code("xdp", (builder.returns() + builder.load()) * 2, "one", "two")
    builder.relocation(index, 48, symbol, R_BPF_64_64)
    assert read(builder).programs["two"].function.map_references == (MapReference(16, "map0"),)


@pytest.mark.parametrize(
    ("name", "flags", "frozen"),
    [
        (".rodata", BPF_F_MMAPABLE | BPF_F_RDONLY_PROG, True),
        (".rodata.str1.1", BPF_F_MMAPABLE | BPF_F_RDONLY_PROG, True),
        (".data", BPF_F_MMAPABLE, False),
        (".data.hot", BPF_F_MMAPABLE, False),
    ],
)
def test_a_data_section_is_a_map(builder, name, flags, frozen):
    """A data section is an array of one element with its bytes; constants are read-only."""
    builder.section(name, b"abcdefgh")
    (found,) = read(builder).maps.values()
    assert found.name.endswith(name)
    assert (found.type, found.key_size, found.value_size) == (MapType.ARRAY, 4, 8)
    assert (found.max_entries, found.flags, found.frozen) == (1, flags, frozen)
    assert found.contents == b"abcdefgh"


def test_zeros_are_a_map_without_contents(builder):
    """Section .bss is an array of one element that need not be written."""
    builder.section(".bss", size=24, type=NOBITS)
    found = read(builder).maps["test.bss"]
    assert (found.value_size, found.contents, found.frozen) == (24, None, False)


@pytest.mark.parametrize("name", [".database", ".debug_info", ".rodata_x", ".llvm_addrsig"])
def test_other_sections_are_no_maps(builder, name):
    """A section whose name only begins like a data section's is passed over."""
    builder.section(name, b"abcdefgh")
    assert read(builder).maps == {}


def test_a_data_map_has_a_name_that_the_kernel_takes(builder):
    """The object's name is shortened so that the section's name stays whole in 15 characters."""
    builder.section(".rodata", b"x")
    spec = elf.read_object(builder.build(), name="a_rather_long_name")
    assert list(spec.maps) == ["a_rather.rodata"]


def test_a_huge_data_section_is_refused(builder):
    """A data section that no map can hold is refused by name."""
    builder.section(".bss", size=1 << 40, type=NOBITS)
    assert refused(builder).section == ".bss"


def test_a_load_of_a_variable_is_an_address_in_its_map(builder):
    """The symbol's value and the number in the instruction add up to the offset in the map."""
    data = builder.section(".data", bytes(32))
    variable = builder.symbol("variable", data, value=8, size=8, type=OBJECT)
    whole = builder.symbol("", data, type=SECTION, bind=LOCAL)
    index = builder.code("xdp", builder.load(imm=4) + builder.load(imm=16), "main")
    builder.relocation(index, 0, variable, R_BPF_64_64)
    builder.relocation(index, 16, whole, R_BPF_64_64)
    assert read(builder).programs["main"].function.map_references == (
        MapReference(0, "test.data", 12),
        MapReference(16, "test.data", 16),
    )


def test_a_symbol_that_is_not_defined_is_named(builder):
    """A relocation against an undefined symbol is refused with symbol, section and offset."""
    symbol = builder.symbol("elsewhere", UNDEFINED, type=NOTYPE)
    index = builder.code(INGRESS, builder.returns() + builder.load(), "main")
    builder.relocation(index, 16, symbol, R_BPF_64_64)
    error = refused(builder)
    assert (error.section, error.offset) == (INGRESS, 16)
    assert "'elsewhere', which is not defined in this object" in str(error)


def test_a_call_that_is_not_defined_is_named(builder):
    """A call of an undefined function is refused with its name and place."""
    symbol = builder.symbol("kfunc", UNDEFINED, type=NOTYPE)
    index = builder.code(INGRESS, builder.call() + builder.returns(), "main")
    builder.relocation(index, 0, symbol, R_BPF_64_32)
    error = refused(builder)
    assert (error.section, error.offset) == (INGRESS, 0)
    assert "kfunc" in str(error)


@pytest.mark.parametrize("offset", [4, 12])
def test_a_relocation_inside_of_an_instruction_is_refused(builder, offset):
    """A relocation that is not at the start of an instruction is refused with its place."""
    data = builder.section(".data", bytes(8))
    symbol = builder.symbol("variable", data, size=8, type=OBJECT)
    index = builder.code(INGRESS, builder.load() + builder.returns(), "main")
    builder.relocation(index, offset, symbol, R_BPF_64_64)
    assert refused(builder).offset == offset


@pytest.mark.parametrize("type", [0, 2, 3, 4, R_BPF_64_32])
def test_a_relocation_of_another_kind_is_refused(builder, type):
    """A relocation that does not fit its instruction is refused with its number."""
    data = builder.section(".data", bytes(8))
    symbol = builder.symbol("variable", data, size=8, type=OBJECT)
    index = builder.code(INGRESS, builder.load() + builder.returns(), "main")
    builder.relocation(index, 0, symbol, type)
    assert f"type {type}" in str(refused(builder))


def test_a_relocation_against_no_symbol_is_refused(builder):
    """A relocation whose symbol does not exist is an ObjectFileError."""
    index = builder.code(INGRESS, builder.load() + builder.returns(), "main")
    builder.relocation(index, 0, 99, R_BPF_64_64)
    assert refused(builder)


def test_a_call_by_section_symbol_counts_from_the_sections_start(builder):
    """Against a section's symbol the callee is at the number in the call, plus one."""
    text = builder.code(".text", builder.returns() * 3, "a", "b", "c")
    index = builder.code(INGRESS, builder.call(imm=3) + builder.returns(), "main")
    symbol = builder.symbol("", text, type=SECTION, bind=LOCAL)
    builder.relocation(index, 0, symbol, R_BPF_64_32)
    assert read(builder).programs["main"].function.call_references == (
        CallReference(0, FunctionKey(".text", 32)),
    )


def test_a_call_by_function_symbol_is_to_that_function(builder):
    """Against a function's symbol the number in the call does not matter."""
    text = builder.code(".text", builder.returns() * 2)
    builder.symbol("a", text, size=16)
    symbol = builder.symbol("b", text, value=16, size=16)
    index = builder.code(INGRESS, builder.returns() + builder.call(), "main")
    builder.relocation(index, 16, symbol, R_BPF_64_32)
    assert read(builder).programs["main"].function.call_references == (
        CallReference(16, FunctionKey(".text", 16)),
    )


def test_a_call_inside_of_a_section_needs_no_relocation(builder):
    """A call without a relocation goes as far as its number says, forwards or backwards."""
    builder.code(
        INGRESS,
        (builder.call(imm=2) + builder.insn(0x95)) + (builder.call(imm=-3) + builder.insn(0x95)),
        "one",
        "two",
    )
    builder.code("xdp", builder.call(imm=1) + builder.insn(0x95) + builder.returns(), "a", "b")
    functions = read(builder).functions
    assert functions[FunctionKey("xdp", 0)].call_references == (
        CallReference(0, FunctionKey("xdp", 16)),
    )
    assert functions[FunctionKey(INGRESS, 16)].call_references == (
        CallReference(0, FunctionKey(INGRESS, 0)),
    )


def test_a_helper_call_is_no_reference(builder):
    """A call of one of the kernel's helpers refers to nothing in the object."""
    builder.code(INGRESS, builder.insn(0x85, imm=5) + builder.returns(), "main")
    assert read(builder).programs["main"].function.call_references == ()


def test_a_number_that_looks_like_a_call_is_none(builder):
    """The second half of a 64-bit load is no call, whatever it holds."""
    fake = builder.insn(0x18, dst=1) + b"\x85" + builder.call()[1:]
    builder.code(INGRESS, fake + builder.returns(), "main")
    assert read(builder).programs["main"].function.call_references == ()


def test_relocations_with_addends_are_not_passed_over(builder):
    """Code with relocations of the other kind (RELA) is resolved or refused, not left as is."""
    add_maps(builder, definition(builder, 1, 4, 8, 16, 0))
    index = builder.code(INGRESS, builder.load() + builder.returns(), "main")
    entry = struct.pack(builder.order + "QQq", 0, 1 << 32 | R_BPF_64_64, 0)
    symtab = index + 2  # after the relocations
    builder._add(".rela", 4, 0, entry, link=symtab, info=index, entry=24)
    try:
        references = read(builder).programs["main"].function.map_references
    except ObjectFileError:
        return
    assert references == (MapReference(0, "map0"),)


def byte_flips():
    """Places in a file of some size, and what to put there."""
    return st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)


@functools.cache
def shipped():
    """The bytes of a shipped object."""
    return (ROOT / "prebuilt" / "throttle.bpfel.o").read_bytes()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(byte_flips())
def test_broken_bytes_of_a_shipped_object_raise_nothing_else(flips):
    """Whatever bytes are wrong, reading gives a spec or raises ObjectFileError."""
    data = bytearray(shipped())
    for at, value in flips:
        data[at % len(data)] = value
    try:
        elf.read_object(bytes(data))
    except ObjectFileError:
        return


@settings(max_examples=300, deadline=None)
@given(byte_flips(), st.sampled_from(["little", "big"]))
def test_broken_bytes_of_a_small_object_raise_nothing_else(flips, byteorder):
    """In an object where each byte means something, wrong bytes raise only ObjectFileError."""
    data = bytearray(with_everything(byteorder).build(table_first=True))
    for at, value in flips:
        data[at % len(data)] = value
    try:
        spec = elf.read_object(bytes(data))
        for program in spec.programs.values():
            linked = relocate.link(spec, program)
            relocate.resolve(linked, dict.fromkeys(spec.maps, 3))
    except ObjectFileError:
        return


def test_clangs_maps_by_their_types(compile_fixture):
    """Typed maps of clang have sizes through typedefs, qualifiers and arrays."""
    spec = compile_fixture("btf_maps")
    for found in spec.maps.values():
        found.key_type = found.value_type = 0
    assert spec.maps == {
        "by_type": MapSpec("by_type", MapType.HASH, 20, 24, 1024, flags=1),
        "ring": MapSpec("ring", MapType.RINGBUF, 0, 0, 4096),
        "by_size": MapSpec("by_size", MapType.PERCPU_ARRAY, 4, 12, 2, numa_node=1, extra=3),
    }
    assert spec.license == "GPL"


def test_clangs_programs_need_only_their_own_maps(compile_fixture):
    """A program's maps are those that it looks into."""
    spec = compile_fixture("btf_maps")
    assert relocate.link(spec, spec.programs["counts"]).maps == {"by_size", "by_type"}
    assert relocate.link(spec, spec.programs["needs_none"]).maps == frozenset()


def test_clangs_typed_maps_without_btf_are_refused(compile_fixture):
    """Typed maps that were compiled without -g are refused with what to do."""
    with pytest.raises(ObjectFileError, match="compile with -g"):
        compile_fixture("btf_maps", "-g0")


def test_clangs_legacy_maps(compile_fixture):
    """Maps of clang's section maps need no debug information."""
    spec = compile_fixture("legacy_maps", "-g0")
    assert spec.maps == {
        "first": MapSpec("first", MapType.HASH, 4, 8, 16, flags=1),
        "second": MapSpec("second", MapType.ARRAY, 4, 24, 3),
    }
    program = spec.programs["looks_up"]
    assert [reference.map for reference in program.function.map_references] == ["second"]


def test_clangs_global_data(compile_fixture):
    """Global variables of clang are in maps of their sections, with their first values."""
    spec = compile_fixture("globals")
    order = "<" if spec.byteorder == "little" else ">"
    constants, variables, zeros = (spec.maps[f"globals{s}"] for s in (".rodata", ".data", ".bss"))
    assert constants.contents == struct.pack(order + "II", 0x11223344, 7)
    assert (constants.flags, constants.frozen) == (BPF_F_MMAPABLE | BPF_F_RDONLY_PROG, True)
    assert variables.contents == struct.pack(order + "Q", 42)
    assert (zeros.value_size, zeros.contents) == (16, None)


def test_clangs_loads_of_variables_point_at_them(compile_fixture):
    """Each load of a variable has the variable's own offset in its map."""
    spec = compile_fixture("globals")
    references = spec.programs["reads_constant"].function.map_references
    assert [(found.map, found.value_offset) for found in references] == [("globals.rodata", 4)]
    writes = {
        (found.map, found.value_offset) for found in spec.programs["writes"].function.map_references
    }
    assert {("globals.rodata", 0), ("globals.data", 0)} < writes
    # The variables that are zero lie in an order of clang's own; the third of three is written.
    zeros = {offset for name, offset in writes if name == "globals.bss"}
    assert zeros in ({8, 12}, {0, 12})


def callees(spec, name):
    """The names of the functions that a function calls, in order."""
    (function,) = (found for found in spec.functions.values() if found.name == name)
    calls = sorted(function.call_references)
    return [spec.functions[call.target].name for call in calls]


def test_clangs_calls_reach_their_functions(compile_fixture):
    """Calls of static and global functions, in .text and beside a program, reach them."""
    spec = compile_fixture("calls")
    assert callees(spec, "calls_text") == ["inner"]
    assert callees(spec, "calls_beside") == ["beside", "beside"]
    assert callees(spec, "calls_global") == ["global_function"]
    assert callees(spec, "calls_nothing") == []
    assert sorted(callees(spec, "global_function")) == ["inner", "innermost"]
    assert callees(spec, "inner") == ["innermost"]


def test_clangs_static_functions_are_no_programs(compile_fixture):
    """Only the functions that are not static, outside of .text, are programs."""
    spec = compile_fixture("calls")
    assert sorted(spec.programs) == ["calls_beside", "calls_global", "calls_nothing", "calls_text"]


def test_clangs_extern_function_is_named(compile_fixture):
    """A function that is only declared is refused with its name."""
    with pytest.raises(ObjectFileError, match="'elsewhere', which is not defined"):
        compile_fixture("not_defined")


def test_flags_of_sections_are_what_makes_code(builder):
    """A section is code by its flag, not by its name."""
    builder.section(INGRESS, builder.returns(), flags=ALLOC)
    assert read(builder).functions == {}


def test_sections_of_one_name_are_put_behind_each_other(builder):
    """Code, calls and data of a second section of a name are found behind those of the first."""
    first = builder.code("tc", builder.returns(1) + builder.call(0) + builder.returns(2), "one")
    data = [builder.section(".data", bytes([n] * 6)) for n in (1, 2)]
    variable = builder.symbol("second", data[1], value=2, size=4, type=OBJECT)
    code = builder.load() + builder.returns(3) + builder.returns(4)
    second = builder.section("tc", code, flags=ALLOC | EXECUTABLE)
    builder.symbol("two", second, size=32)
    callee = builder.symbol("callee", second, value=32, size=16, bind=LOCAL)
    builder.relocation(first, 16, callee, R_BPF_64_32)
    builder.relocation(second, 0, variable, R_BPF_64_64)
    spec = read(builder)
    assert list(spec.programs) == ["one", "two"]
    assert spec.programs["one"].function.call_references[0].target == FunctionKey("tc", 40 + 32)
    assert spec.programs["two"].function.map_references == (MapReference(0, "test.data", 8),)
    assert spec.maps["test.data"].contents == bytes([1] * 6 + [2] * 6)
    assert spec.variables["second"].get() == b"\2\2\2\2"


def test_variables_of_an_arena_need_one(builder):
    """Variables in the section of arenas are refused without an arena, with their section."""
    builder.section(".addr_space.1", bytes(8))
    builder.code("tc", builder.returns(1), "main")
    error = refused(builder)
    assert error.section == ".addr_space.1"
    assert "need one map of type ARENA, not 0" in str(error)
