from __future__ import annotations

import uuid
from typing import Iterator

import pytest
from echo import Far, Near
from lab import Lab, attached, lab
from shells import Shell

from pybpfthrottle.backends.ebpf.programs import HOOKS
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Rate


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


@pytest.fixture(scope="module")
def shells_lab() -> Iterator[Lab]:
    """Two namespaces with a server at the far end."""
    with lab(fastest=Rate.parse("10M")) as made:
        yield made


@pytest.fixture
def shell(shells_lab: Lab, scratch: Cgroup) -> Iterator[Shell]:
    """One in a cgroup of its own."""
    made = Shell(shells_lab, scratch)
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def wire() -> Iterator[Wire]:
    """Two namespaces with an echo at the far end."""
    with Wire() as made:
        far = Far(made.server.inside)
        try:
            yield made
        finally:
            far.end()


@pytest.fixture
def near(wire: Wire, scratch: Cgroup) -> Iterator[Near]:
    """A process in the near namespace and in a cgroup of its own."""
    made = Near(wire.client.inside)
    scratch.move_in(made.process.pid)
    try:
        yield made
    finally:
        made.end()
