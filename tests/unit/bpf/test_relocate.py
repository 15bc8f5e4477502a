from __future__ import annotations

import struct
import sys

import pytest
from elf_builder import R_BPF_64_64, ObjectBuilder

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import asm, elf, relocate
from pybpfthrottle.bpf.obj.insn import (
    BPF_PSEUDO_CALL,
    BPF_PSEUDO_FUNC,
    BPF_PSEUDO_MAP_FD,
    BPF_PSEUDO_MAP_VALUE,
    CALL,
    LD_IMM64,
)
from pybpfthrottle.bpf.obj.specs import (
    CallReference,
    ExternReference,
    FunctionKey,
    FunctionSpec,
    MapReference,
    ObjectSpec,
    ProgramSpec,
)

RETURN = 16  # bytes of a function that only returns


class Functions:
    """A spec with functions that call each other, all of them in one section."""

    def __init__(self, byteorder="little"):
        self.make = ObjectBuilder(byteorder)
        self.spec = ObjectSpec("test", byteorder)

    def add(self, name, *callees, maps=()):
        """A function that refers to maps, then calls the others by name, then returns."""
        code, calls, references = b"", [], []
        for map_name, value_offset in maps:
            references.append(MapReference(len(code), map_name, value_offset))
            code += self.make.load()
        for callee in callees:
            calls.append(CallReference(len(code), FunctionKey(callee, 0)))
            code += self.make.call()
        key = FunctionKey(name, 0)
        self.spec.functions[key] = FunctionSpec(
            name, key, code + self.make.returns(), tuple(references), tuple(calls)
        )
        return self.spec.functions[key]

    def link(self, name):
        """The function of this name as a linked program."""
        function = self.spec.functions[FunctionKey(name, 0)]
        return relocate.link(self.spec, ProgramSpec(name, "xdp", abi.ProgType.XDP, None, function))


@pytest.fixture(params=["little", "big"])
def functions(request):
    """An empty spec of either byte order."""
    return Functions(request.param)


def at(functions, code, index):
    """The opcode, source register, offset and immediate value of an instruction."""
    opcode, registers, offset, imm = struct.unpack_from(
        functions.make.order + "BBhi", code, index * 8
    )
    source = registers >> 4 if functions.spec.byteorder == "little" else registers & 0xF
    return opcode, source, offset, imm


def test_a_program_without_references_stays_as_it_is(functions):
    """What refers to nothing is not changed."""
    function = functions.add("main")
    linked = functions.link("main")
    assert relocate.resolve(linked, {}) == function.code
    assert linked.maps == frozenset()


def test_a_callee_is_appended_and_its_distance_set(functions):
    """A called function follows, and the call has the distance from the instruction after it."""
    functions.add("main", "helper")
    functions.add("helper")
    code = functions.link("main").code
    # main: call, mov, exit; helper: mov, exit
    assert len(code) == 5 * 8
    assert at(functions, code, 0) == (CALL, BPF_PSEUDO_CALL, 0, 2)


def test_the_destination_register_of_a_call_stays(functions):
    """Only the half byte of the source register is written."""
    functions.add("main", "helper")
    functions.add("helper")
    code = bytearray(functions.link("main").code)
    assert code[1] == (0x10 if functions.spec.byteorder == "little" else 0x01)


def test_a_function_is_appended_once(functions):
    """A function that is called three times follows once, and each call reaches it."""
    functions.add("main", "helper", "helper", "other")
    functions.add("other", "helper")
    functions.add("helper")
    code = functions.link("main").code
    # main: 0 call, 1 call, 2 call, 3-4; helper: 5-6; other: 7 call, 8-9
    assert len(code) == 10 * 8
    targets = [index + 1 + at(functions, code, index)[3] for index in (0, 1, 2, 7)]
    assert targets == [5, 5, 7, 5]


def test_a_function_that_nobody_calls_is_left_out(functions):
    """Only what the program reaches is in it."""
    functions.add("unused")
    functions.add("main")
    assert len(functions.link("main").code) == RETURN


def test_recursion_ends(functions):
    """A program that calls itself is linked once, with a call back to its start."""
    functions.add("main", "main")
    code = functions.link("main").code
    assert len(code) == 3 * 8
    assert at(functions, code, 0)[3] == -1


def test_mutual_calls_end(functions):
    """Functions that call each other are linked once each."""
    functions.add("main", "ping")
    functions.add("ping", "pong")
    functions.add("pong", "ping", "main")
    code = functions.link("main").code
    # main: 0 call, 1-2; ping: 3 call, 4-5; pong: 6 call, 7 call, 8-9
    assert len(code) == 10 * 8
    assert [index + 1 + at(functions, code, index)[3] for index in (0, 3, 6, 7)] == [3, 6, 3, 0]


def test_a_call_of_no_function_is_refused(functions):
    """A call into the middle of nowhere is refused with its place."""
    functions.add("main", "missing")
    with pytest.raises(ObjectFileError, match="which is not a function") as caught:
        functions.link("main")
    assert (caught.value.section, caught.value.offset) == ("main", 0)


def test_map_descriptors_are_put_in(functions):
    """A load of a map gets the map's descriptor."""
    functions.add("main", maps=[("first", None), ("second", None)])
    linked = functions.link("main")
    code = relocate.resolve(linked, {"first": 17, "second": 4711})
    assert linked.maps == {"first", "second"}
    assert at(functions, code, 0) == (LD_IMM64, BPF_PSEUDO_MAP_FD, 0, 17)
    assert at(functions, code, 2) == (LD_IMM64, BPF_PSEUDO_MAP_FD, 0, 4711)
    assert at(functions, code, 3) == (0, 0, 0, 0)


def test_addresses_in_maps_are_put_in(functions):
    """A load of a variable gets the map's descriptor, and the offset in its second half."""
    functions.add("main", maps=[("data", 24)])
    code = relocate.resolve(functions.link("main"), {"data": 9})
    assert at(functions, code, 0) == (LD_IMM64, BPF_PSEUDO_MAP_VALUE, 0, 9)
    assert at(functions, code, 1) == (0, 0, 0, 24)


def test_maps_of_called_functions_are_the_programs(functions):
    """The maps of all functions that a program calls are its maps, at their place behind it."""
    functions.add("main", "helper", maps=[("own", None)])
    functions.add("helper", maps=[("other", None)])
    linked = functions.link("main")
    assert linked.maps == {"own", "other"}
    code = relocate.resolve(linked, {"own": 5, "other": 6})
    # main: 0-1 load, 2 call, 3-4; helper: 5-6 load
    assert at(functions, code, 0)[3] == 5
    assert at(functions, code, 5)[3] == 6


def test_resolving_twice_gives_the_same(functions):
    """Resolving changes nothing of the linked program."""
    functions.add("main", maps=[("first", None)])
    linked = functions.link("main")
    assert relocate.resolve(linked, {"first": 3}) == relocate.resolve(linked, {"first": 3})


def test_the_order_of_this_machine_is_that_of_asm():
    """What is resolved for this machine equals what asm makes for it."""
    functions = Functions(sys.byteorder)
    functions.add("main", maps=[("data", 8), ("counts", None)])
    code = relocate.resolve(functions.link("main"), {"data": 7, "counts": 8})
    assert code == asm.load_map_value(1, 7, 8) + asm.load_map(1, 8) + asm.return_imm(1)


def read_and_resolve(data):
    """The code of the one program of an object, with descriptors for its maps."""
    spec = elf.read_object(data)
    return relocate.resolve(relocate.link(spec, spec.programs["main"]), {"object.data": 3})


def test_half_of_a_load_at_the_end_is_refused(builder):
    """A 64-bit load whose second half is past its function's end is an ObjectFileError."""
    data = builder.section(".data", bytes(8))
    symbol = builder.symbol("variable", data, size=8, type=1)
    index = builder.code("xdp", builder.returns() + builder.load()[:8], "main")
    builder.relocation(index, 16, symbol, R_BPF_64_64)
    with pytest.raises(ObjectFileError):
        read_and_resolve(builder.build())


def run(order, code, length, start=0, registers=None):
    """What a function of numbers returns: the few instructions that fixtures/calls.c needs."""
    r = registers or [0] * 11
    mask = (1 << 64) - 1
    index = start
    while True:
        opcode, packed, _, imm = struct.unpack_from(order + "BBhi", code, index * 8)
        low, high = packed & 0xF, packed >> 4
        dst, src = (low, high) if order == "<" else (high, low)
        index += 1
        if opcode == 0x95:
            return r[0]
        if opcode == CALL:
            assert src == BPF_PSEUDO_CALL
            r[0] = run(order, code, length, index + imm, r[:6] + [0] * 5)
        elif opcode == 0x61:  # the only load is of the context's first field, the length
            r[dst] = length
        else:
            value = r[src] if opcode & 0x08 else imm
            operation = {0xB0: lambda a, b: b, 0x00: lambda a, b: a + b, 0x60: lambda a, b: a << b}
            r[dst] = operation[opcode & 0xF0](r[dst], value) & mask


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("calls_text", (100 + 3) * 2),
        ("calls_beside", 105 + 106),
        ("calls_global", (100 + 3) * 2 + 104),
        ("calls_nothing", 1),
    ],
)
def test_clangs_calls_do_what_the_source_says(compile_fixture, name, answer):
    """Run after linking, clang's code gives what its source says for a packet of 100 bytes."""
    spec = compile_fixture("calls")
    order = "<" if spec.byteorder == "little" else ">"
    assert run(order, relocate.link(spec, spec.programs[name]).code, 100) == answer


def test_functions_stand_in_libbpfs_order():
    """What a function calls stands behind it, in the order of the calls, before what is next."""
    functions = Functions()
    functions.add("last")
    functions.add("deep", "last")
    functions.add("second")
    functions.add("first", "deep")
    functions.add("main", "first", "second", "deep")
    placed = functions.link("main").placed
    assert [found.function.name for found in placed] == ["main", "first", "deep", "last", "second"]


def test_each_instruction_knows_where_it_was():
    """The origin of linked code is the section and offset that it had in the object."""
    functions = Functions()
    functions.add("helper")
    functions.add("main", "helper")
    linked = functions.link("main")
    start = linked.placed[1].start
    assert linked.origin(0) == FunctionKey("main", 0)
    assert linked.origin(start - 8) == FunctionKey("main", start - 8)
    assert linked.origin(start + 8) == FunctionKey("helper", 8)


def test_a_deep_chain_of_calls_is_no_recursion():
    """A chain of more calls than Python's stack is deep is linked; the kernel may refuse it."""
    functions = Functions()
    functions.add("f0")
    for number in range(1, 3000):
        functions.add(f"f{number}", f"f{number - 1}")
    assert len(functions.link("f2999").placed) == 3000


def callback(builder, *, by_section=False):
    """An object whose program loads the address of the second function of .text."""
    text = builder.code(".text", builder.returns(1) + builder.returns(2), "other", "callback")
    symbol = builder.symbol("", text, type=3, bind=0)
    if not by_section:
        symbol = builder.symbol("alias", text, value=16, size=16)
    code = builder.load(imm=16 if by_section else 0) + builder.returns()
    index = builder.code("xdp", code, "main")
    builder.relocation(index, 0, symbol, R_BPF_64_64)
    return elf.read_object(builder.build())


@pytest.mark.parametrize("by_section", [False, True])
def test_a_functions_address_is_its_distance(builder, by_section):
    """A load of a function's address, by its own symbol or its section's, becomes its distance."""
    spec = callback(builder, by_section=by_section)
    code = relocate.resolve(relocate.link(spec, spec.programs["main"]), {})
    wanted = builder.insn(0x18, dst=1, src=BPF_PSEUDO_FUNC, imm=3) + builder.insn(0)
    assert code == wanted + builder.returns() + builder.returns(2)


def test_an_address_of_no_function_is_refused(builder):
    """A load of an address inside of a function is refused with its place."""
    text = builder.code(".text", builder.returns(), "other")
    index = builder.code("xdp", builder.load(imm=8) + builder.returns(), "main")
    builder.relocation(index, 0, builder.symbol("", text, type=3, bind=0), R_BPF_64_64)
    spec = elf.read_object(builder.build())
    with pytest.raises(ObjectFileError, match="which is not a function") as caught:
        relocate.link(spec, spec.programs["main"])
    assert (caught.value.section, caught.value.offset) == ("xdp", 0)


def test_what_the_kernel_has_is_not_resolved_here(builder):
    """A reference that is left to the kernel is refused with its place in the object."""
    function = FunctionSpec(
        *("main", FunctionKey("xdp", 32), builder.load() + builder.returns()),
        extern_references=(ExternReference(0, "jiffies"),),
    )
    program = ProgramSpec("main", "xdp", abi.ProgType.XDP, None, function)
    linked = relocate.link(ObjectSpec("test", builder.byteorder), program)
    with pytest.raises(ObjectFileError, match="'jiffies'") as caught:
        relocate.resolve(linked, {})
    assert (caught.value.section, caught.value.offset) == ("xdp", 32)
