"""What programs.load does with the records of the source, where a kernel refuses them."""

from __future__ import annotations

import ctypes
import errno

import pytest

from pybpfthrottle.bpf import abi, programs
from pybpfthrottle.bpf.abi import Cmd, ProgType
from pybpfthrottle.bpf.errors import ProgramLoadError, UnresolvedError, VerifierError
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.bpf.obj.patch import POISON, Poisoned
from pybpfthrottle.bpf.programs import SourceInfo

CODE = asm.return_imm(1)
SOURCE = SourceInfo(5, bytes(8), bytes(16), at=lambda number: f"a.c:{number}: if (x) {{")


def load(**options):
    """Load a program with records of its source."""
    return programs.load(CODE, type=ProgType.XDP, license="MIT", source=SOURCE, **options)


def refuse(kernel, *answers, log=b""):
    """Let the kernel refuse a program; the answers are for with and without the records."""

    def handle(attr):
        number = answers[0] if attr.prog_load.prog_btf_fd else answers[-1]
        if attr.prog_load.log_buf:
            ctypes.memmove(attr.prog_load.log_buf, log + b"\0", len(log) + 1)
        if number:
            raise OSError(number, "no")

    kernel.handlers[Cmd.PROG_LOAD] = handle


@pytest.mark.parametrize("number", [errno.E2BIG, errno.EINVAL])
def test_records_that_are_refused_are_left_out(kernel, number):
    """A kernel that does not take the records of the source loads the program without them."""
    refuse(kernel, number, 0)
    with load():
        assert [call.attr.prog_load.func_info_cnt for call in kernel.calls] == [1, 0]
        assert kernel.calls[-1].attr.prog_load.line_info == 0


def test_an_old_kernels_own_reason_counts(kernel):
    """A kernel that does not know the records has reasons that count without them."""
    refuse(kernel, errno.E2BIG, errno.EACCES, log=b"3: (95) exit\nR0 !read_ok\n")
    with pytest.raises(VerifierError, match="R0 !read_ok") as caught:
        load()
    assert caught.value.errno == errno.EACCES
    assert caught.value.source == "a.c:3: if (x) {"


@pytest.mark.parametrize(
    ("log", "number"),
    [
        ("0: (b7) r0 = 1\n7: (95) exit\nR0 !read_ok\nprocessed 2 insns\n", 7),
        ("unreachable insn 12\n", 12),
        ("back-edge from insn 9 to 4\n", 9),
        ("nothing is told\n", 0),
    ],
)
def test_the_failing_instruction_is_told_by_the_log(log, number):
    """The last instruction that the verifier saw, or the one that it names, is the one."""
    assert programs.failing_instruction(log) == number


def test_the_poisoned_instruction_that_was_reached_is_named(kernel):
    """The number in the verifier's log tells which poisoned instruction it was."""
    poisoned = [Poisoned("struct a.b", "a___x", "FIELD_BYTE_OFFSET"), Poisoned("f()", "", "")]
    line = b"1: (85) call unknown#%d\ninvalid func unknown#%d\n"
    refuse(kernel, errno.EINVAL, log=line % (POISON + 1, POISON + 1))
    with pytest.raises(UnresolvedError, match=r"it calls f\(\), .* \(a.c:1: if \(x\) \{\)"):
        load(poisoned=poisoned)


@pytest.mark.parametrize("number", [7, POISON - 1, POISON + 1])
def test_other_unknown_helpers_are_not_poisoned(kernel, number):
    """A helper that the kernel does not know is the verifier's own reason."""
    refuse(kernel, errno.EINVAL, log=b"1: (85) call unknown#%d\ninvalid func\n" % number)
    with pytest.raises(ProgramLoadError) as caught:
        load(poisoned=[Poisoned("struct a.b", "a", "FIELD_BYTE_OFFSET")])
    assert not isinstance(caught.value, UnresolvedError)


COMPLEX = asm.return_imm(1)[:8] + bytes([0x05, 0, 0xFF, 0xFF, 0, 0, 0, 0]) + asm.return_imm(1)


def refuse_too_complex(kernel, known):
    """A verifier that finds all programs too complex, of a kernel that knows these fields."""

    def handle(attr):
        given = attr.prog_load
        unknown = [field for field, _ in given._fields_ if field not in known]
        if any(getattr(given, field) for field in unknown):
            raise OSError(errno.E2BIG, "unknown fields")
        if given.prog_flags:
            raise OSError(errno.EINVAL, "unknown flags")
        if given.log_buf:
            ctypes.memmove(given.log_buf, TOO_LARGE + b"\0", len(TOO_LARGE) + 1)
        raise OSError(errno.E2BIG, "too large")

    kernel.handlers[Cmd.PROG_LOAD] = handle


TOO_LARGE = b"5: (05) goto pc-1\nBPF program is too large. Processed 1000001 insn\n"
ALL = [field for field, _ in abi.ProgLoad._fields_]
OF_4_17 = ALL[: ALL.index("prog_btf_fd")]


@pytest.mark.parametrize(("known", "with_source"), [(ALL, [1, 1]), (OF_4_17, [1, 0, 0])])
def test_a_too_complex_program_is_no_unknown_field(kernel, known, with_source):
    """E2BIG of the verifier does not cost the program what is known of its source."""
    refuse_too_complex(kernel, known)
    with pytest.raises(VerifierError, match=r"too large.*a.c:5") as caught:
        programs.load(COMPLEX, type=ProgType.XDP, license="MIT", name="big", source=SOURCE)
    assert caught.value.errno == errno.E2BIG
    loads = [call.attr.prog_load for call in kernel.calls if not call.attr.prog_load.prog_flags]
    assert [load.func_info_cnt for load in loads] == with_source
