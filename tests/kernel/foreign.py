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
def other(
    cgroup: Cgroup,
    how: str,
    *,
    hook: AttachType = EGRESS,
    kind: ProgType = ProgType.CGROUP_SKB,
    verdict: int = 1,
) -> Iterator[Program]:
    """Another tool's program at a cgroup, by link or in one of the legacy modes.

    It lets all packets pass; with ``verdict`` 0 none.
    """
    fd = cgroup.open()
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        expected = None if kind is ProgType.CGROUP_SKB else hook
        program = stack.enter_context(
            programs.load(
                return_imm(verdict),
                type=kind,
                license="MIT",
                name="theirs",
                expected_attach_type=expected,
            )
        )
        if how == "link":
            attachment = links.create_link(program, fd, hook)
        else:
            attachment = links.attach_legacy(program, fd, hook, AttachMode[how])
        stack.callback(attachment.detach)
        yield program
