"""A kernel behind the one door, for tests without privileges."""

from __future__ import annotations

import os
from typing import Callable, NamedTuple, Optional

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd

_CREATING = (Cmd.MAP_CREATE, Cmd.PROG_LOAD, Cmd.BTF_LOAD, Cmd.LINK_CREATE)


class Call(NamedTuple):
    """One command and its fields as they were when it was given."""

    cmd: Cmd
    attr: Attr


class FakeKernel:
    """Records each command; what creates something answers with a descriptor, all else with 0."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.handlers: dict[Cmd, Callable[[Attr], Optional[int]]] = {}
        self._created: list[tuple[int, int]] = []

    def __call__(self, cmd: Cmd, attr: Attr) -> int:
        """Do a command as the test has it."""
        self.calls.append(Call(cmd, Attr.from_buffer_copy(attr)))
        handler = self.handlers.get(cmd)
        answer = handler(attr) if handler else None
        if answer is not None:
            return answer
        return self.create() if cmd in _CREATING else 0

    def refuse(self, cmd: Cmd, *errnos: int) -> None:
        """Answer a command with these errnos in turn, 0 being none; from the last one on with it.

        ``refuse(cmd, EAGAIN, 0)`` refuses once.
        """
        left = list(errnos)

        def handler(_: Attr) -> None:
            number = left.pop(0) if len(left) > 1 else left[0]
            if number:
                raise syscall.error(number, cmd)

        self.handlers[cmd] = handler

    def refuse_if(self, cmd: Cmd, number: int, refused: Callable[[Attr], object]) -> None:
        """Answer a command with an errno where its fields are refused."""

        def handler(attr: Attr) -> None:
            if refused(attr):
                raise syscall.error(number, cmd)

        self.handlers[cmd] = handler

    def given(self, cmd: Cmd) -> list[Attr]:
        """The fields of each time that a command was given."""
        return [call.attr for call in self.calls if call.cmd == cmd]

    def created(self) -> int:
        """How many descriptors were given out."""
        return len(self._created)

    def still_open(self) -> int:
        """How many of the descriptors that were given out are open; each is a file of its own."""
        return sum(_is_open(fd, inode) for fd, inode in self._created)

    def create(self) -> int:
        """A new descriptor, remembered."""
        fd = os.memfd_create("fake", os.MFD_CLOEXEC)
        self._created.append((fd, os.fstat(fd).st_ino))
        return fd

    def close_all(self) -> None:
        """Close what a test has left open."""
        for fd, inode in self._created:
            if _is_open(fd, inode):
                os.close(fd)


def _is_open(fd: int, inode: int) -> bool:
    """Whether a descriptor is that of a file still, and not closed or used again."""
    try:
        return os.fstat(fd).st_ino == inode
    except OSError:
        return False
