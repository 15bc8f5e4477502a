"""Programs of compiled objects, fitted to hand-made kernels."""

from __future__ import annotations

import dataclasses
import struct
from contextlib import suppress

import pytest
from compiled import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from made_types import SplitTypes, Types

from pybpfthrottle.bpf.errors import Error, ExternError
from pybpfthrottle.bpf.obj import elf, relocate
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.core import Kernel
from pybpfthrottle.bpf.obj.externs import encode_setting
from pybpfthrottle.bpf.obj.fitting import Fitting
from pybpfthrottle.bpf.obj.insn import BPF_PSEUDO_BTF_ID, CALL
from pybpfthrottle.bpf.obj.patch import POISON

SPECS = [elf.read_object(compiled(name)) for name in ("core_fields", "core_reads", "externs")]
MODULE_FD = 77


class Facts:
    """A kernel that has these types, and all settings and symbols."""

    def __init__(self, types, *modules):
        self.types = self.core_types = Kernel(types, lambda: modules)

    def setting(self, name):
        """Whatever is asked for is on."""
        return "y"

    def symbol(self, name):
        """Where all symbols are."""
        return 1 << 32 | 2

    def has_symbol(self, name):
        """There is each symbol."""
        return True


def fitted(spec, name, facts):
    """One program of an object, for a kernel."""
    program = spec.programs[name]
    fitting = Fitting(spec, facts, lambda module: MODULE_FD)
    return fitting.fit(program, relocate.link(spec, program))


def instructions(found):
    """The opcode, source register, offset and immediate value of each instruction."""
    return [
        (code, registers >> 4, off, imm)
        for code, registers, off, imm in struct.iter_unpack("<BBhi", found.linked.code)
    ]


def kernel_of_tasks():
    """A kernel with the functions that externs.bpf.c calls."""
    types = Types()
    task = types.ptr(types.struct("task_struct", 64))
    types.func("bpf_task_acquire", types.proto(task, task))
    return types, task


def test_functions_of_modules_are_called_by_their_place():
    """A module's function is called with its id and the place of its types in fd_array."""
    types, task = kernel_of_tasks()
    module = SplitTypes(types.btf())
    release = module.func("bpf_task_release", module.proto(0, task))
    found = fitted(SPECS[2], "functions", Facts(types.btf(), module.btf()))
    assert found.modules == (MODULE_FD,)
    calls = [row for row in instructions(found) if row[:2] == (CALL, 2)]
    assert [row[2:] for row in calls] == [(0, 4), (1, release)]


def test_addresses_in_modules_name_their_types():
    """The address of a module's function is loaded by its id and the descriptor of its types."""
    types, task = kernel_of_tasks()
    module = SplitTypes(types.btf())
    release = module.func("bpf_task_release", module.proto(0, task))
    found = instructions(fitted(SPECS[2], "functions", Facts(types.btf(), module.btf())))
    at = next(i for i, row in enumerate(found) if row[:2] == (0x18, BPF_PSEUDO_BTF_ID))
    assert (found[at][3], found[at + 1][3]) == (release, MODULE_FD)


def test_a_typed_variable_is_loaded_by_its_id():
    """A variable of the kernel that the object knows the type of is loaded by its id."""
    types = Types()
    variable = types.var("not_a_variable", types.int(signed=True))
    found = instructions(fitted(SPECS[2], "symbols", Facts(types.btf())))
    assert (0x18, BPF_PSEUDO_BTF_ID, 0, variable) in found


def test_an_address_fills_both_halves():
    """The address of a symbol without a type is put into both halves of a load."""
    found = instructions(fitted(SPECS[2], "symbols", Facts(Types().btf())))
    at = found.index((0x18, 0, 0, 2))
    assert found[at + 1][3] == 1


def test_each_function_and_line_is_told():
    """There is a record for each function, and one for the first instruction of each."""
    spec = SPECS[1]
    found = fitted(spec, "read", Facts(spec.btf))
    functions = list(struct.iter_unpack("=II", found.functions))
    assert [spec.btf.type(type_id).name for _, type_id in functions] == ["read"]
    offsets = [row[0] for row in struct.iter_unpack("=IIII", found.lines)]
    assert offsets[0] == 0
    assert offsets == sorted(set(offsets))
    assert found.source(0).endswith("bpf_get_current_task_btf();")


def test_poisoned_instructions_are_numbered():
    """Each poisoned instruction has a number of its own, which tells what it asked for."""
    found = fitted(SPECS[1], "read", Facts(Types().btf()))
    assert found.poisoned[0].access == "struct task_struct___mine.pid"
    numbers = {row[3] for row in instructions(found) if row[0] == CALL}
    assert numbers >= {POISON + number for number in range(len(found.poisoned))}


def test_an_object_without_types_is_left_as_it_is():
    """Without .BTF there is nothing to be fitted."""
    spec = dataclasses.replace(SPECS[1], btf=None)
    program = spec.programs["read"]
    linked = relocate.link(spec, program)
    fitting = Fitting(spec, Facts(Types().btf()), lambda module: MODULE_FD)
    assert fitting.fit(program, linked).linked is linked
    assert fitting.loadable_types() is None


@pytest.mark.parametrize(
    ("make", "text", "wanted"),
    [
        (lambda t: t.int("int", 4), "0x10", b"\x10\0\0\0"),
        (lambda t: t.int("int", 4, signed=True), "-2", b"\xfe\xff\xff\xff"),
        (lambda t: t.int("long", 8), "5", b"\x05" + bytes(7)),
        (lambda t: t.int("char", 1), "m", b"m"),
        (lambda t: t.enum("libbpf_tristate", N=0, Y=1, M=2), "m", b"\x02\0\0\0"),
        (lambda t: t.array(t.int("char", 1), 4), '"a\\"bcd"', b'a"b\0'),
    ],
)
def test_settings_as_bytes(make, text, wanted):
    """A setting is encoded by the type that it is declared with."""
    types = Types()
    type_id = make(types)
    assert encode_setting(types.btf(), type_id, "X", text) == wanted


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda t: t.int("char", 1), "256"),
        (lambda t: t.int("int", 4), "-1"),
        (lambda t: t.int("int", 4), "m"),
        (lambda t: t.int("int", 4), '"text"'),
        (lambda t: t.int("int", 4), "junk"),
        (lambda t: t.array(t.int("char", 1), 4), "5"),
        (lambda t: t.array(t.int("int", 4), 4), '"text"'),
        (lambda t: t.enum("e", N=0), "5"),
    ],
)
def test_a_setting_of_another_type_is_refused(make, text):
    """A setting that does not go into its declared type is an ExternError."""
    types = Types()
    type_id = make(types)
    with pytest.raises(ExternError, match="X is"):
        encode_setting(types.btf(), type_id, "X", text)


@settings(max_examples=400, deadline=2000)
@given(
    st.sampled_from(SPECS),
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 1 << 14), st.integers(0, (1 << 32) - 1)),
        min_size=1,
        max_size=5,
    ),
)
def test_any_types_are_fitted_or_refused(spec, changes):
    """Whatever is in .BTF and .BTF.ext, the answer is a program or an error of ours."""
    parts = {"btf": bytearray(bytes(spec.btf)), "btf_ext": bytearray(spec.btf_ext)}
    for in_types, word, value in changes:
        part = parts["btf" if in_types else "btf_ext"]
        struct.pack_into("<I", part, word % (len(part) // 4) * 4, value)
    with suppress(Error):
        types = Btf(bytes(parts["btf"]))
        broken = dataclasses.replace(spec, btf=types, btf_ext=bytes(parts["btf_ext"]))
        fitting = Fitting(broken, Facts(spec.btf), lambda module: MODULE_FD)
        fitting.loadable_types()
        for program in broken.programs.values():
            found = fitting.fit(program, relocate.link(broken, program))
            for number in range(len(found.linked.code) // 8):
                found.source(number)
        fitting.settings_map()
