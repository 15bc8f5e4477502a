"""What the fuzzers found, and hostile types, each as the smallest object that shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from broken import use
from elf_builder import OBJECT, BtfBuilder, ObjectBuilder

from pybpfthrottle.bpf.btf_objects import ObjectTypes
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.btf_text import declaration
from pybpfthrottle.bpf.obj.btf_values import BtfCodec
from pybpfthrottle.bpf.obj.fitting import Fitting
from pybpfthrottle.bpf.running import RunningKernel

INT, PTR, ARRAY, UNION, FLOAT, PROTO, VAR, DATASEC = 1, 2, 3, 5, 16, 13, 14, 15


def nested_unions(depth: int) -> bytes:
    """A union of two unions of two unions ...: four bytes that are 2 ** depth things."""
    types = BtfBuilder()
    inner = types.add(INT, "int", size=4, tail=(32,))
    for _ in range(depth):
        zero = 0
        inner = types.add(UNION, size=4, vlen=2, tail=(zero, inner, 0, zero, inner, 0))
    return types.build()


def test_a_variable_that_lies_outside_of_its_section_is_none() -> None:
    """An offset of more than 32 bits did not go into the types for the kernel (OverflowError)."""
    types = BtfBuilder()
    number = types.add(INT, "int", size=4, tail=(32,))
    variable = types.add(VAR, "far", size=number, tail=(1,))
    types.add(DATASEC, ".data", size=8, vlen=1, tail=(variable, 0, 4))
    builder = ObjectBuilder()
    data = builder.section(".data", bytes(8), flags=3)
    builder.symbol("far", data, type=OBJECT, value=1 << 40, size=4)
    builder.section(".BTF", types.build(), flags=0)
    spec = elf.read_object(builder.build())
    assert spec.layouts[".data"].places == {}
    with ObjectTypes() as kernel:
        assert Fitting(spec, RunningKernel(), kernel.descriptor).loadable_types()
    use(builder.build())


def test_unions_of_unions_are_not_decoded_for_ever() -> None:
    """What would take 2 ** 40 steps is refused before the first."""
    with pytest.raises(ObjectFileError, match="too many members in one place"):
        BtfCodec(Btf(nested_unions(40)), 41)
    assert BtfCodec(Btf(nested_unions(3)), 4).decode(bytes(4)) == {}


def test_an_array_that_is_larger_than_its_structure_is_not_read() -> None:
    """Four thousand million elements in four bytes."""
    types = BtfBuilder()
    number = types.add(INT, "int", size=4, tail=(32,))
    array = types.add(ARRAY, tail=(number, number, 0xFFFFFFFF))
    union = types.add(UNION, "u", size=4, vlen=1, tail=(0, array, 0))
    with pytest.raises(ObjectFileError, match="too many members"):
        BtfCodec(Btf(types.build()), union)


def test_a_float_outside_of_its_structure_is_refused() -> None:
    """It was an error of struct's."""
    types = BtfBuilder()
    number = types.add(FLOAT, "float", size=8)
    union = types.add(UNION, "u", size=4, vlen=1, tail=(0, number, 0))
    with pytest.raises(ObjectFileError, match="lies outside of its value"):
        BtfCodec(Btf(types.build()), union).decode(bytes(4))


def test_functions_that_take_functions_are_short_texts() -> None:
    """Each prototype takes the one before it twice; written out they would have 2 ** 30 parts."""
    types = BtfBuilder()
    inner = types.add(INT, "int", size=4, tail=(32,))
    for _ in range(30):
        taken = types.add(PTR, size=inner)
        inner = types.add(PROTO, vlen=2, tail=(0, taken, 0, taken))
    text = declaration(Btf(types.build()), inner, "f")
    assert text == "void f(void (*)(...), void (*)(...))"


def test_a_pointer_to_itself_has_no_text() -> None:
    """A chain that never ends is refused."""
    types = BtfBuilder()
    types.add(PTR, size=1)
    with pytest.raises(ObjectFileError, match="refers to itself"):
        declaration(Btf(types.build()), 1)


def test_the_fuzzer_tells_what_it_needs() -> None:
    """Without atheris it is one line, and status 1."""
    tool = Path(__file__).resolve().parents[3] / "tools" / "fuzz"
    hidden = "import sys, runpy; sys.modules['atheris'] = None; sys.argv = sys.argv[1:];"
    code = f"{hidden} runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tool)], stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "pip install pybpfthrottle[fuzz]" in done.stderr
