from __future__ import annotations

import pytest
from kernels import Kernel

from pybpfthrottle.backends.ebpf import registry
from pybpfthrottle.backends.ebpf.registry import Unsettled
from pybpfthrottle.bpf import maps, privileges, programs, syscall
from pybpfthrottle.bpf.features import forget
from pybpfthrottle.linux import cgroup
from pybpfthrottle.linux.cgroup import Cgroup, Mount


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    """No test sees what another has found out of its kernel."""
    forget()
    yield
    forget()


@pytest.fixture
def boot(monkeypatch, tmp_path):
    """Puts the kernel of a release in place, with a root's privileges and cgroup v2."""
    started = []

    def booted(release):
        kernel = Kernel(release)
        started.append(kernel)
        monkeypatch.setattr(syscall, "bpf", kernel)
        # Of another kernel's objects nothing is known.
        monkeypatch.setattr(registry, "_maybe_records", Unsettled(maps.all_ids))
        monkeypatch.setattr(registry, "_maybe_alone", Unsettled(programs.all_ids))
        return kernel

    mount = Mount("0:1", "/", str(tmp_path), "cgroup2")
    monkeypatch.setattr(cgroup, "mounts", lambda: [mount])
    monkeypatch.setattr(privileges, "effective_capabilities", lambda: (1 << 64) - 1)
    maps.possible_cpus()
    yield booted
    for kernel in started:
        kernel.close_all()


@pytest.fixture
def target(tmp_path):
    """A directory in place of a cgroup, below the one in place of the root."""
    path = tmp_path / "limited"
    path.mkdir()
    return Cgroup(str(path))
