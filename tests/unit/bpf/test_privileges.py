from __future__ import annotations

import errno
import os
import resource

import pytest

from pybpfthrottle.bpf import privileges, syscall
from pybpfthrottle.bpf.abi import ProgType

NET_ADMIN, SYS_ADMIN, SYS_RESOURCE, BPF = 1 << 12, 1 << 21, 1 << 24, 1 << 39
INFINITY = resource.RLIM_INFINITY


@pytest.fixture
def held(monkeypatch):
    """Sets the capabilities that this process seems to have."""
    return lambda bits: monkeypatch.setattr(privileges, "effective_capabilities", lambda: bits)


def test_capabilities_are_those_that_the_kernel_shows():
    """The capabilities are the number in this process's status."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("CapEff:"))
    assert privileges.effective_capabilities() == int(line.split()[1], 16)


@pytest.mark.parametrize(
    ("held_bits", "program_type", "missing"),
    [
        (0, ProgType.SOCKET_FILTER, ["CAP_BPF"]),
        (0, ProgType.XDP, ["CAP_BPF", "CAP_NET_ADMIN"]),
        (0, ProgType.CGROUP_SKB, ["CAP_BPF", "CAP_NET_ADMIN"]),
        (BPF, ProgType.TRACING, ["CAP_PERFMON"]),
        (NET_ADMIN, ProgType.EXT, ["CAP_BPF", "CAP_PERFMON"]),
        (SYS_ADMIN, ProgType.EXT, []),
        (BPF, 1000, []),
    ],
)
def test_a_type_of_program_needs_its_capabilities(held, held_bits, program_type, missing):
    """Networks need CAP_NET_ADMIN and tracing CAP_PERFMON, beside CAP_BPF or CAP_SYS_ADMIN."""
    held(held_bits)
    needed = privileges.capabilities_for(program_type)
    assert privileges.missing_capabilities(needed) == missing


@pytest.mark.parametrize(
    ("command", "named"),
    [("BPF_MAP_CREATE", "CAP_BPF"), ("BPF_PROG_GET_NEXT_ID", "CAP_SYS_ADMIN")],
)
def test_a_command_needs_its_capability(held, command, named):
    """To look for what others have loaded CAP_BPF is not enough."""
    held(0)
    assert f"lacks {named};" in privileges.why_not_permitted(command)


def test_without_capabilities_the_remedy_is_root(held):
    """Who lacks capabilities is told which, and how to get them."""
    held(NET_ADMIN)
    text = privileges.why_not_permitted("BPF_PROG_LOAD")
    assert "lacks CAP_BPF;" in text
    assert "sudo" in text


def test_with_capabilities_the_causes_are_others(held, monkeypatch):
    """Who has the capabilities is told of filters and modules that refuse the command."""
    held(SYS_ADMIN | NET_ADMIN)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (INFINITY, INFINITY))
    text = privileges.why_not_permitted("BPF_PROG_LOAD")
    assert "seccomp" in text
    assert "lockdown" in text
    assert "refuses BPF_PROG_LOAD" in text
    assert "locked memory" not in text
    assert "root" not in text


@pytest.mark.parametrize(
    ("capabilities", "charged", "named"),
    [
        (SYS_ADMIN | NET_ADMIN, True, True),
        (SYS_ADMIN | NET_ADMIN, False, False),
        (SYS_ADMIN | NET_ADMIN | SYS_RESOURCE, True, False),
    ],
)
def test_a_limit_on_locked_memory_is_named_where_it_is_a_cause(
    held, monkeypatch, capabilities, charged, named
):
    """With its size and remedy, where maps are charged to it and it could not be raised."""
    held(capabilities)
    limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.append(wanted))
    monkeypatch.setattr(syscall, "bpf", charging if charged else lambda *_: os.open(os.devnull, 0))
    text = privileges.why_not_permitted("BPF_MAP_CREATE")
    assert ("64 KiB" in text) is named
    assert ("ulimit -l unlimited" in text) is named
    assert limits in ([], [(0, 65536), (65536, 65536)])


def charging(_, attr):
    """A kernel before 5.11 that has no memory for a map."""
    number = errno.EPERM if attr.map_create.map_type else errno.EINVAL
    raise OSError(number, os.strerror(number))


def test_a_filter_is_not_taken_for_a_limit_on_locked_memory(monkeypatch):
    """What refuses a map of no type as well does not count memory."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(syscall, "bpf", refuse)
    assert not privileges.memlock_is_charged()


def test_what_succeeds_is_done_once(monkeypatch):
    """What is permitted is done once, and the limit is not looked at."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: pytest.fail("looked at"))
    done = []
    assert privileges.with_memlock(lambda: done.append(1) or 7) == 7
    assert done == [1]


def test_other_errors_pass_through(monkeypatch):
    """An error that is no EPERM is not about the limit."""
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("changed"))

    def fails():
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with pytest.raises(OSError, match="Invalid argument"):
        privileges.with_memlock(fails)
