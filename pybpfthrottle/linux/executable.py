"""Executables, and which processes run the one at a path."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from typing import Optional

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux.process import Process

_DELETED = " (deleted)"
_PROC = re.compile(r"/proc/(\d+)/")


class _File(NamedTuple):
    """What identifies a file; its inode number may be reused once it is deleted."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> _File:
        """Return the file at a path. Raises OSError."""
        found = os.stat(path)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_inode(self, other: _File) -> bool:
        """Whether both are the same inode, provided that both files exist."""
        return (self.device, self.inode) == (other.device, other.inode)


class Executable:
    """A file that processes execute, given by its path.

    Files are compared, not paths: in a container the same path may lead to another file, and
    another path to the same file. If an update replaces the file, both the new and the old one
    match. A path below /proc/PID keeps its meaning when that process has ended.
    """

    def __init__(self, path: str) -> None:
        """Raises ProcessError if there is no file at the path, or a script."""
        self.path = path
        through = _PROC.match(os.path.abspath(path))
        try:
            self._file = _File.of(path)
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise ProcessError(f"{path} is not a regular file")
            self._name = _name(path)
            self._root, self._mounts = _view(through[1] if through else "self")
        except OSError as error:
            raise ProcessError(f"no executable at {path}: {error.strerror}") from error
        self._through = Process(int(through[1])) if through else None
        with suppress(OSError), open(path, "rb") as file:
            begin = file.read(11)
            if begin.startswith(b"#!"):
                raise ProcessError(
                    f"{path} is a script, so its processes run the interpreter. Use --name, or give"
                    " --exe the interpreter"
                )
            self._is_appimage = begin[8:10] == b"AI"  # appimage.github.io, "Image format"

    def runs_in(self, pid: int) -> bool:
        """Whether a process executes it."""
        link = f"/proc/{pid}/exe"
        try:
            theirs = _File.of(link)
            return (
                self._is(theirs)
                or self._was(pid, theirs, os.readlink(link))
                or (self._is_appimage and self._has_mounted(pid, os.readlink(link)))
            )
        except OSError:  # it is gone, or not permitted
            return False

    def _is(self, theirs: _File) -> bool:
        """Whether a file is the one at the path, even if that led through an ended process."""
        with suppress(OSError):
            if self._through is None or self._through.alive():
                self._file = _File.of(self.path)
                return self._file.is_inode(theirs)
        return self._through is not None and self._file == theirs

    def _was(self, pid: int, theirs: _File, name: str) -> bool:
        """Whether a process executes a file that was at the path until deleted or replaced.

        The kernel appends a word to the name then, but a file may really be named so.
        """
        if name != self._name + _DELETED:
            return False
        root, mounts = _view(str(pid))
        if mounts != self._mounts and not os.path.samestat(root, self._root):
            return False  # the path is of another tree
        with suppress(OSError):
            return not _File.of(f"/proc/{pid}/root{name}").is_inode(theirs)
        return True

    def _has_mounted(self, pid: int, name: str) -> bool:
        """Whether a process executes a file inside this AppImage, which each start mounts anew."""
        with open(f"/proc/{pid}/environ", "rb") as file:
            variables = dict(one.partition(b"=")[::2] for one in file.read().split(b"\0"))
        image, directory = variables.get(b"APPIMAGE"), variables.get(b"APPDIR")
        if not image or not directory or not name.startswith(os.fsdecode(directory) + "/"):
            return False
        return self._file.is_inode(_File.of(f"/proc/{pid}/root{os.fsdecode(image)}"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Executable) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __str__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"Executable({self.path!r})"


def _name(path: str) -> str:
    """Return a file's path as the links in /proc show it, whatever tree it is in."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return name[: -len(_DELETED)] if name.endswith(_DELETED) else name


def _view(pid: str) -> tuple[os.stat_result, Optional[str]]:
    """Return the root directory and the mount namespace of a process. Raises OSError."""
    mounts = None
    with suppress(OSError):
        mounts = os.readlink(f"/proc/{pid}/ns/mnt")
    return os.stat(f"/proc/{pid}/root"), mounts
