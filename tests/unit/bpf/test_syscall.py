from __future__ import annotations

import ctypes
import errno
import sys

import pytest

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.bpf.errors import BpfError, UnsupportedMachineError


@pytest.mark.parametrize(
    ("machine", "number"),
    [
        ("x86_64", 321),
        ("aarch64", 280),
        ("riscv64", 280),
        ("loongarch64", 280),
        ("ppc64le", 361),
        ("s390x", 351),
    ],
)
def test_each_machine_has_its_number(machine, number):
    """A 64-bit Python uses the machine's own number."""
    assert syscall.number(machine, bits=64) == number


@pytest.mark.parametrize(
    ("machine", "number"),
    [
        ("i386", 357),
        ("i486", 357),
        ("i586", 357),
        ("i686", 357),
        ("arm", 386),
        ("armv6l", 386),
        ("armv7l", 386),
        ("armv8l", 386),
        ("x86_64", 357),
        ("aarch64", 386),
    ],
)
def test_a_32_bit_python_has_the_32_bit_number(machine, number):
    """A 32-bit Python uses the 32-bit number, on a 32-bit and on a 64-bit kernel."""
    assert syscall.number(machine, bits=32) == number


@pytest.mark.parametrize("machine", ["pdp11", "mips64", "sparc64", "armada"])
def test_an_unknown_machine_is_named(machine):
    """For an unknown machine the error names it and the known ones."""
    with pytest.raises(UnsupportedMachineError) as caught:
        syscall.number(machine, bits=64)
    assert machine in str(caught.value)
    assert "x86_64" in str(caught.value)
    assert isinstance(caught.value, BpfError)


def test_this_machine_is_the_default():
    """Without arguments it is the number for this machine and this Python."""
    import os

    bits = 64 if sys.maxsize > 1 << 32 else 32
    assert syscall.number() == syscall.number(os.uname().machine, bits=bits)


def test_the_attribute_is_at_least_128_bytes():
    """The buffer is so large that no kernel writes past it."""
    assert ctypes.sizeof(Attr) >= 128


def test_the_attribute_is_zeroed():
    """A new attribute is all zeros, the padding too."""
    assert not any(bytes(Attr()))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EPERM, PermissionError),
        (errno.EACCES, PermissionError),
        (errno.ENOENT, FileNotFoundError),
        (errno.EAGAIN, BlockingIOError),
        (errno.EINVAL, OSError),
    ],
)
def test_an_error_is_of_pythons_own_kind(number, kind):
    """Python's own subclass is picked by the errno, and the command is the filename."""
    error = syscall.error(number, Cmd.PROG_LOAD)
    assert type(error) is kind
    assert (error.errno, error.filename) == (number, "BPF_PROG_LOAD")


def test_the_real_door_raises_with_the_commands_name():
    """A command that no kernel takes raises OSError with the command's name."""
    attr = Attr()
    attr.map_elem.map_fd = (1 << 31) - 1
    with pytest.raises(OSError, match="BPF_MAP_LOOKUP_ELEM") as caught:
        syscall.bpf(Cmd.MAP_LOOKUP_ELEM, attr)
    # Without privileges the answer may be EPERM before anything is looked at.
    assert caught.value.errno in (errno.EBADF, errno.EPERM, errno.ENOSYS)


def test_errno_524_has_a_text():
    """ENOTSUPP, which C libraries do not know, has a text."""
    assert "ENOTSUPP" in str(syscall.error(524, Cmd.MAP_CREATE))


@pytest.mark.parametrize(("number", "name"), [(524, "ENOTSUPP"), (22, "EINVAL"), (9999, "9999")])
def test_errnos_have_names(number, name):
    """An errno's name is that of errno.h, also for 524, or else its digits."""
    assert syscall.errno_name(number) == name
