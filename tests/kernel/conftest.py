from __future__ import annotations

import os
import uuid
from typing import Iterator

import pytest

from pybpfthrottle import cgroup
from pybpfthrottle.bpf import links
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.cgroup import Cgroup


def attached(target: Cgroup) -> list[int]:
    """The programs at both hooks of a cgroup."""
    fd = target.open()
    try:
        return [
            program
            for attach_type in (AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS)
            for program in links.query(fd, attach_type).program_ids
        ]
    finally:
        os.close(fd)


@pytest.fixture
def scratch() -> Iterator[Cgroup]:
    """A cgroup of the test's own; nothing may be attached to it at the end."""
    target = cgroup.root().create_child(f"test-{uuid.uuid4().hex[:12]}")
    try:
        yield target
        if target.exists():
            assert attached(target) == []
    finally:
        target.remove(patience_s=5)
