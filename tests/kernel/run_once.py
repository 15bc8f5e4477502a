"""Runs programs once that see no packet."""

from __future__ import annotations

import ctypes

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.bpf.programs import Program


def run(program: Program, context: bytes = b"") -> int:
    """Run a program on a context of its own; the answer is what it returns."""
    buffer = ctypes.create_string_buffer(context, len(context))
    attr = Attr()
    attr.test_run.prog_fd = program.fd
    attr.test_run.ctx_in = ctypes.addressof(buffer) if context else 0
    attr.test_run.ctx_size_in = len(context)
    syscall.bpf(Cmd.PROG_TEST_RUN, attr)
    return attr.test_run.retval
