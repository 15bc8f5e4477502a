"""The first door to the kernel: bpf(2). The other one is ``perf``.

Call it through this module (``syscall.bpf(...)``), so that a test can put a whole fake kernel in
its place.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
import sys
from contextvars import ContextVar
from functools import cache
from typing import Callable, Iterator, Mapping, Optional

from pybpfthrottle.bpf.abi import BPF_F_TOKEN_FD, Attr, Cmd
from pybpfthrottle.bpf.errors import UnsupportedMachineError

# arch/*/entry/syscalls/syscall.tbl and include/uapi/asm-generic/unistd.h.
_NUMBERS = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "arm": 386,
    "i386": 357,
    "ppc64le": 361,
    "s390x": 351,
}
# A 32-bit Python speaks the 32-bit system calls, also on a 64-bit kernel.
_COMPAT = {"x86_64": "i386", "aarch64": "arm"}

# The kernel has it and lets it out; C libraries do not know it.
ENOTSUPP = 524


def number(machine: Optional[str] = None, *, bits: Optional[int] = None) -> int:
    """Return the number of bpf(2) for a machine of uname(2), and a Python of ``bits`` bits.

    Raises UnsupportedMachineError for one that is not known.
    """
    return number_of("bpf", _NUMBERS, machine, bits=bits)


def number_of(
    call: str, numbers: Mapping[str, int], machine: Optional[str] = None, bits: Optional[int] = None
) -> int:
    """Return the number of a system call, by those of the machines that are known.

    Raises UnsupportedMachineError.
    """
    machine = machine or os.uname().machine
    bits = bits or (64 if sys.maxsize > 1 << 32 else 32)
    name = machine
    if machine in ("i486", "i586", "i686"):
        name = "i386"
    elif machine.startswith("armv"):
        name = "arm"
    if bits == 32:
        name = _COMPAT.get(name, name)
    try:
        return numbers[name]
    except KeyError:
        raise UnsupportedMachineError(
            f"the number of the {call} system call is not known for the machine {machine!r}"
            f" (known: {', '.join(sorted(numbers))})"
        ) from None


def is_compatible_mode() -> bool:
    """Whether this Python has 32 bits, and the kernel 64, which serves it in compatibility."""
    return sys.maxsize < 1 << 32 and os.uname().machine in _COMPAT


# Asking uname(2) each time costs a fifth of a short command.
_own_number = cache(number)

# The token that allows what is done, or -1: see token.py.
token_fd: ContextVar[int] = ContextVar("token_fd", default=-1)

_libc_syscall: Optional[Callable[..., int]] = None


def prepare() -> Callable[..., int]:
    """Find syscall(2) of the C library. Raises UnsupportedMachineError where Python has no way."""
    global _libc_syscall
    if _libc_syscall is None:
        try:
            function = ctypes.CDLL(None, use_errno=True).syscall
        except (OSError, AttributeError) as error:  # a static Python
            raise UnsupportedMachineError(
                f"this Python cannot call the C library's syscall() through ctypes: {error}"
            ) from error
        function.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint)
        function.restype = ctypes.c_long
        _libc_syscall = function
    return _libc_syscall


def bpf(cmd: Cmd, attr: Attr) -> int:
    """Do one command; the kernel may write into ``attr``. Linux 4.10; source: man 2 bpf.

    Raises OSError with the command's name as its ``filename``.
    """
    if token_fd.get() >= 0:
        _allow(cmd, attr, token_fd.get())
    result = prepare()(_own_number(), cmd, ctypes.addressof(attr), ctypes.sizeof(attr))
    if result < 0:
        raise error(ctypes.get_errno(), cmd)
    return result


def _allow(cmd: Cmd, attr: Attr, fd: int) -> None:
    """Have a command allowed by a token. Linux 6.9."""
    if cmd == Cmd.MAP_CREATE:
        attr.map_create.map_token_fd = fd
        attr.map_create.map_flags |= BPF_F_TOKEN_FD
    elif cmd == Cmd.PROG_LOAD:
        attr.prog_load.prog_token_fd = fd
        attr.prog_load.prog_flags |= BPF_F_TOKEN_FD
    elif cmd == Cmd.BTF_LOAD:
        attr.btf_load.btf_token_fd = fd
        attr.btf_load.btf_flags |= BPF_F_TOKEN_FD


def all_ids(cmd: Cmd, after: int = 0) -> Iterator[int]:
    """Return the ids that a GET_NEXT_ID command lists, in ascending order.

    Linux 4.13; needs CAP_SYS_ADMIN. Raises OSError.
    """
    following = after
    while True:
        attr = Attr()
        attr.get_id.id = following
        try:
            bpf(cmd, attr)
        except FileNotFoundError:
            return
        # A kernel, or a filter, that does not fill it in would be asked for ever.
        if attr.get_id.next_id <= following:
            return
        following = attr.get_id.next_id
        yield following


def error(errno: int, cmd: Cmd) -> OSError:
    """Return the OSError for a command that failed with ``errno``."""
    text = "Operation not supported (ENOTSUPP)" if errno == ENOTSUPP else os.strerror(errno)
    return OSError(errno, text, f"BPF_{cmd.name}")


def errno_name(errno: int) -> str:
    """Return the name of an errno, ``EINVAL`` for 22; also ENOTSUPP, which Python lacks."""
    return "ENOTSUPP" if errno == ENOTSUPP else errnos.errorcode.get(errno, str(errno))
