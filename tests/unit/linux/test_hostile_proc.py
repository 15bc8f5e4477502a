"""Names that somebody has chosen to look like something else in the kernel's files."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import contextmanager

import pytest

from pybpfthrottle import targets
from pybpfthrottle.linux import cgroup, endpoints, process, tables

_PR_SET_NAME, _PR_GET_NAME = 15, 16
UNIX = b"Num RefCount Protocol Flags Type St Inode Path\n"


@contextmanager
def named(name: bytes):
    """Give this thread another name."""
    libc = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(16)
    libc.prctl(_PR_GET_NAME, before)
    libc.prctl(_PR_SET_NAME, name)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_NAME, before)


@pytest.fixture
def proc(monkeypatch):
    """Files of /proc that are made up."""
    files: dict[str, bytes] = {}
    monkeypatch.setattr(tables, "contents", files.__getitem__)
    return files


def test_nobody_takes_another_user_by_a_name():
    """A carriage return in a process's name does not begin a line with another user."""
    with named(b"\rUid:\t4711 4711"):
        assert targets.effective_user(os.getpid()) == os.geteuid()


def test_nobody_takes_another_process_s_cgroup_by_a_name():
    """Nor one with another thread group; a name that is no UTF-8 is read like others."""
    for name in (b"\rTgid:\t1", b"\xff\xfe"):
        with named(name):
            assert cgroup._leader(os.getpid()) == os.getpid()
            assert process.own_status()["Tgid"] == str(os.getpid())


def test_a_unix_socket_s_name_hides_no_other_socket():
    """Its name may look like lines of the table, whole ones or none."""
    with socket.socket(socket.AF_INET) as tcp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        inode = os.fstat(tcp.fileno()).st_ino
        unix.bind(f"\0\nx\n0: 2 0 10000 1 1 {inode} @y\r\n".encode())
        found = endpoints.listed_in_proc(os.getpid())
        assert found[inode].state == "listen"
        assert os.fstat(unix.fileno()).st_ino in found


@pytest.mark.parametrize("name", ["a\rb", "a\x0cb", "a\u2028b", "a\x85b", "a\x0b0::"])
def test_a_cgroup_is_not_taken_for_one_of_a_shorter_name(proc, name):
    """What ends a line for Python may be in its name: /a is somebody else's."""
    proc["/proc/7/cgroup"] = f"0::/user/{name}\n".encode()
    mounted = cgroup.Mount("0:28", "/", "/sys/fs/cgroup", "cgroup2")
    assert cgroup.from_pid(7, mounted).path == f"/sys/fs/cgroup/user/{name}"


def test_a_mount_point_with_a_carriage_return(proc):
    """Users can mount with FUSE wherever they can write."""
    proc["/proc/self/mountinfo"] = (
        b"30 25 0:27 / /home/a\rb rw - fuse.x x rw\n"
        b"31 25 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    )
    assert [one.path for one in cgroup.mounts()] == ["/home/a\rb", "/sys/fs/cgroup"]
