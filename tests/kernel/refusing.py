"""Make bpf(2) refuse some commands: ``python refusing.py CMD=ERRNO ... -- COMMAND``.

A seccomp filter, on the real kernel, for the command and what it starts. It makes an older kernel,
a security module or a container of this one. CMD is a number of enum bpf_cmd, or ``all``; or the
name of another system call, of OTHERS, that is refused.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pybpfthrottle.bpf import syscall

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LD_W_ABS, JEQ_K, RET_K = 0x20, 0x15, 0x06
RET_ALLOW, RET_ERRNO = 0x7FFF0000, 0x00050000
NUMBER_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 16
BPF = syscall.number()
OTHERS = {"pidfd_open": 434, "pidfd_getfd": 438}


def instruction(code: int, k: int, *, if_true: int = 0, if_false: int = 0) -> bytes:
    """Struct sock_filter."""
    return struct.pack("=HBBI", code, if_true, if_false, k)


def refuse(rules: list[tuple[str, int]]) -> None:
    """Put the filter in force on this process."""
    tests = b""
    others = b""
    for command, errno in rules:
        if command in OTHERS:
            others += instruction(JEQ_K, OTHERS[command], if_false=1)
            others += instruction(RET_K, RET_ERRNO | errno)
        elif command == "all":
            tests += instruction(RET_K, RET_ERRNO | errno)
        else:
            tests += instruction(JEQ_K, int(command), if_false=1)
            tests += instruction(RET_K, RET_ERRNO | errno)
    code = (
        instruction(LD_W_ABS, NUMBER_OFFSET)
        + others
        + instruction(JEQ_K, BPF, if_false=1 + len(tests) // 8)
        + instruction(LD_W_ABS, FIRST_ARGUMENT_OFFSET)
        + tests
        + instruction(RET_K, RET_ALLOW)
    )
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    holder = ctypes.create_string_buffer(program, len(program))
    for option, value, pointer in (
        (PR_SET_NO_NEW_PRIVS, 1, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(holder)),
    ):
        if libc.prctl(option, value, pointer, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    end = sys.argv.index("--")
    refuse([(rule.split("=")[0], int(rule.split("=")[1])) for rule in sys.argv[1:end]])
    os.execvp(sys.argv[end + 1], sys.argv[end + 1 :])
