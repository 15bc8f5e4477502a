"""A program of another tool."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import Iterator

from pybpfthrottle.bpf import links, programs
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.bpf.obj.asm import return_imm
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.linux.cgroup import Cgroup

EGRESS = AttachType.CGROUP_INET_EGRESS


@contextmanager
def other(cgroup: Cgroup, how: str) -> Iterator[Program]:
    """Another tool's program at a cgroup, by link or in one of the legacy modes."""
    fd = cgroup.open()
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        program = stack.enter_context(
            programs.load(return_imm(1), type=ProgType.CGROUP_SKB, license="MIT", name="theirs")
        )
        if how == "link":
            attachment = links.create_link(program, fd, EGRESS)
        else:
            attachment = links.attach_legacy(program, fd, EGRESS, AttachMode[how])
        stack.callback(attachment.detach)
        yield program
