"""BPF tokens: a user namespace loads what the host's administrator delegates to it."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys

import pytest
from compiled import compiled
from since import since

from pybpfthrottle.bpf import token
from pybpfthrottle.bpf.errors import BpfError

pytestmark = since("6.9")

LIBC = ctypes.CDLL(None, use_errno=True)
# Their numbers are the same on all machines.
FSCONFIG = 431
SET_STRING, CREATE = 1, 6
CHILD = """
import ctypes, os, socket, sys
from pybpfthrottle.bpf import loader, token
from pybpfthrottle.bpf.errors import BpfError
FSOPEN, FSMOUNT, NEWNS, NEWUSER = 430, 432, 0x20000, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "failed")
    return result
parent = socket.socket(fileno=int(sys.argv[1]))
done(libc.unshare(NEWUSER | NEWNS))
parent.send(b"unshared")
parent.recv(10)
fs = done(libc.syscall(FSOPEN, b"bpf", 0))
socket.send_fds(parent, [b"fs"], [fs])
parent.recv(10)
root = os.open(".", os.O_RDONLY, dir_fd=done(libc.syscall(FSMOUNT, fs, 0, 0)))
try:
    loader.load(sys.argv[2], ["count"])
except BpfError as error:
    print(error)
try:
    with token.create(root):
        loaded = loader.load(sys.argv[2], ["count"])
except BpfError as error:
    sys.exit(print(error))
print(loaded.programs["count"].test_run(bytes(214)).retval, loaded.variables["seen"].get())
"""


def fsconfig(fs, command, key=None, value=None):
    """Change a file system that is not mounted yet."""
    if LIBC.syscall(FSCONFIG, fs, command, key, value, 0) < 0:
        raise OSError(ctypes.get_errno(), "fsconfig")


@pytest.fixture
def delegated(tmp_path):
    """What a process in a user namespace prints, to which these options were delegated."""

    def run(*options):
        built = tmp_path / "flows.o"
        built.write_bytes(compiled("flows"))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(60)
        command = [sys.executable, "-c", CHILD, str(theirs.fileno()), str(built)]
        child = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True
        )
        theirs.close()
        with ours, child:
            ours.recv(10)
            for kind in ("uid", "gid"):
                with open(f"/proc/{child.pid}/{kind}_map", "w") as file:
                    file.write("0 0 4294967295")
            ours.send(b"mapped")
            _, (fs,), *_ = socket.recv_fds(ours, 10, 1)
            try:
                for option in options:
                    fsconfig(fs, SET_STRING, option.encode(), b"any")
                fsconfig(fs, CREATE)
            finally:
                os.close(fs)
            ours.send(b"created")
            return child.communicate(timeout=60)[0].splitlines()

    return run


def test_what_is_delegated_can_be_loaded(delegated):
    """With a token, programs, maps and types are loaded by the namespace's own capabilities."""
    kinds = ("delegate_cmds", "delegate_maps", "delegate_progs", "delegate_attachs")
    refused, ran = delegated(*kinds)
    assert "in a user namespace only" in refused
    assert ran == "1 1"


def test_what_is_not_delegated_is_told(delegated):
    """A file system that delegates nothing gives no token, and the error says what it lacks."""
    assert delegated()[-1].endswith(
        "it was mounted without delegate_cmds, delegate_maps, delegate_progs or delegate_attachs"
    )


def test_other_file_systems_give_no_token(tmp_path):
    """A token of a directory that is no bpf file system says why there is none."""
    with pytest.raises(BpfError, match=r"cannot get a token of .*: it is no bpf file system"):
        token.create(tmp_path)
