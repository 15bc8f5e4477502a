"""The doors to the kernel, counted: one call can be refused, or the last thing its process does."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import subprocess
import sys
from mmap import mmap
from typing import Any, Callable, Optional

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Cmd
from pybpfthrottle.linux import libc

KILL = 0
WAYS = {"EPERM": errno.EPERM, "ENOMEM": errno.ENOMEM, "EINVAL": errno.EINVAL, "kill": KILL}

# They change nothing, and how often they are called depends on what else is on the machine.
_READING = {
    Cmd.MAP_LOOKUP_ELEM, Cmd.MAP_GET_NEXT_KEY, Cmd.PROG_GET_NEXT_ID, Cmd.MAP_GET_NEXT_ID,
    Cmd.PROG_GET_FD_BY_ID, Cmd.MAP_GET_FD_BY_ID, Cmd.OBJ_GET_INFO_BY_FD, Cmd.PROG_QUERY,
    Cmd.LINK_GET_FD_BY_ID, Cmd.LINK_GET_NEXT_ID, Cmd.BTF_GET_FD_BY_ID, Cmd.BTF_GET_NEXT_ID,
}  # fmt: skip
# Python's own, which make or remove what stays.
_FILES = ("mkdir", "rmdir", "unlink", "rename", "fork", "pipe")
_COUNT = struct.Struct("=Q")


class Doors:
    """Counts the calls of this process and of those that it forks, and meddles with one of them."""

    def __init__(self, point: int = 0, way: int = KILL) -> None:
        """``point``: the call to meddle with, from 1 on; 0: none. ``way``: an errno, or KILL."""
        self._point, self._way = point, way
        self._shared = mmap(-1, 4096)
        self._now = False
        self._seen: set[tuple[object, ...]] = set()
        self._name = b""

    @property
    def count(self) -> int:
        """How many calls there were."""
        return int(_COUNT.unpack_from(self._shared)[0])

    @property
    def name(self) -> str:
        """The call that was meddled with; empty if it did not come to that."""
        return bytes(self._shared[_COUNT.size : 200]).rstrip(b"\0").decode()

    def install(self) -> None:
        """Replace the doors, in this process for good."""
        bpf, function = syscall.bpf, libc._function
        syscall.bpf = lambda cmd, attr: self._bpf(bpf, cmd, attr)
        libc._function = lambda name: self._libc(function(name), name)
        for name in _FILES:
            setattr(os, name, self._python(getattr(os, name), name))
        os.open = self._open(os.open)
        subprocess.run = self._python(subprocess.run, "run")

    def _bpf(self, door: Callable[..., int], cmd: Cmd, attr: Any) -> int:
        frame = sys._getframe(2)
        if cmd in _READING and not self._is_first(cmd, frame):
            return door(cmd, attr)
        refused = self._comes(f"BPF_{Cmd(cmd).name}")
        if refused:
            raise syscall.error(refused, cmd)
        try:
            return door(cmd, attr)
        finally:
            self._went()

    def _is_first(self, cmd: Cmd, frame: Any) -> bool:
        """Whether this place of the program, with its two callers, reads for the first time."""
        place: tuple[object, ...] = (cmd,)
        for _ in range(3):
            if frame is not None:
                place += (frame.f_code, frame.f_lineno)
                frame = frame.f_back
        if place in self._seen:
            return False
        self._seen.add(place)
        return True

    def _libc(self, door: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            refused = self._comes(name)
            if refused:
                ctypes.set_errno(refused)
                return -1
            try:
                return door(*arguments)
            finally:
                self._went()

        return call

    def _python(self, door: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            refused = self._comes(name)
            if refused:
                raise OSError(refused, os.strerror(refused), name)
            owner = os.getpid()
            try:
                return door(*arguments, **named)
            finally:
                if os.getpid() == owner:  # not in the child of a fork
                    self._went()

        return call

    def _open(self, door: Callable[..., int]) -> Callable[..., int]:
        making = self._python(door, "open")

        def call(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            chosen = making if flags & os.O_CREAT else door
            return int(chosen(path, flags, *arguments, **named))

        return call

    def _comes(self, name: str) -> Optional[int]:
        """Count a call; return the errno that refuses it."""
        number = self.count + 1
        _COUNT.pack_into(self._shared, 0, number)
        self._now = number == self._point
        if self._now:
            text = name.encode()
            self._shared[_COUNT.size : _COUNT.size + len(text)] = text
        return self._way if self._now and self._way != KILL else None

    def _went(self) -> None:
        if self._now and self._way == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
