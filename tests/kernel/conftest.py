from __future__ import annotations

import uuid
from typing import Iterator

import pytest
from lab import attached

from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup


@pytest.fixture
def scratch() -> Iterator[Cgroup]:
    """A cgroup of the test's own; nothing may be attached to it at the end."""
    target = cgroup.root().create_child(f"test-{uuid.uuid4().hex[:12]}")
    try:
        yield target
        if target.exists():
            assert attached(target, HOOKS) == []
    finally:
        target.remove(patience_s=5)
