"""Objects at the limits of the kernel's verifier."""

from __future__ import annotations

import errno
import time

import pytest
from compiled import compiled

from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.errors import ProgramLoadError
from pybpfthrottle.bpf.obj import asm, elf
from pybpfthrottle.bpf.obj.specs import FunctionKey, FunctionSpec

LIMIT = 1_000_000  # BPF_COMPLEXITY_LIMIT_INSNS
SECONDS = 60  # 0.4 s is measured, and 27 in an emulated machine


def spec_of(instructions):
    """A program of so many instructions, in place of one of a fixture."""
    spec = elf.read_object(compiled("object_calls"), name="object_calls")
    program = spec.programs["calls_nothing"]
    code = asm.mov_imm(0, 1) * (instructions - 1) + asm.exit_()
    program.function = FunctionSpec("calls_nothing", FunctionKey("tc", 0), code)
    return spec


def test_the_largest_program_is_loaded_within_seconds():
    """A program of as many instructions as the verifier looks at is loaded and run."""
    begin = time.process_time()
    with loader.load(spec_of(LIMIT), ["calls_nothing"]) as loaded:
        assert loaded.programs["calls_nothing"].test_run(bytes(64)).retval == 1
    assert time.process_time() - begin < SECONDS


def test_a_larger_program_is_refused_within_seconds():
    """A program of more instructions is a ProgramLoadError with E2BIG."""
    begin = time.process_time()
    with pytest.raises(ProgramLoadError) as caught:
        loader.load(spec_of(LIMIT + 1), ["calls_nothing"])
    assert caught.value.errno == errno.E2BIG
    assert time.process_time() - begin < SECONDS
