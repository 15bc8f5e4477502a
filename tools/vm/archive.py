"""The files of a machine that has no disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Callable, Optional


class Archive:
    """An initramfs: an uncompressed cpio archive in the newc format; they can be concatenated."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.known: set[str] = set()

    def add(self, path: str, data: bytes, mode: int = 0o755, mtime: int = 0) -> None:
        """Add a regular file, and the directories above it."""
        self._add(path, stat.S_IFREG | mode, data, mtime)

    def link(self, path: str, target: str) -> None:
        """Add a symbolic link, and the directories above it."""
        self._add(path, stat.S_IFLNK | 0o777, os.fsencode(target))

    def copy(self, source: Path, path: Optional[str] = None) -> None:
        """Add a file of this machine, with its mtime: Python's compiled files go by it."""
        status = source.stat()
        mode, mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
        self.add(path or os.path.abspath(source), source.read_bytes(), mode, mtime)

    def tree(self, top: Path, wanted: Callable[[str], bool]) -> None:
        """Add a directory as the root: the files, links and directories that are wanted."""
        for directory, names, files in os.walk(top):
            inside = Path("/", os.path.relpath(directory, top))
            links = [name for name in names if Path(directory, name).is_symlink()]
            names[:] = sorted(name for name in names if wanted(str(inside / name)))
            for name in (*links, *sorted(files)):
                if wanted(str(inside / name)):
                    self._add_found(Path(directory, name), str(inside / name))

    def finish(self) -> bytes:
        """Return the archive with its end."""
        self._entry("TRAILER!!!", 0)
        return bytes(self.data) + bytes(-len(self.data) % 512)

    def _add_found(self, source: Path, path: str) -> None:
        if source.is_symlink():
            self.link(path, os.readlink(source))
        elif source.is_file():
            self.copy(source, path)

    def _add(self, path: str, mode: int, data: bytes, mtime: int = 0) -> None:
        for parent in list(map(str, Path(path).parents))[-2::-1]:
            if parent not in self.known:
                self.known.add(parent)
                self._entry(parent, stat.S_IFDIR | 0o755)
        if path not in self.known:
            self.known.add(path)
            self._entry(path, mode, data, mtime)

    def _entry(self, path: str, mode: int, data: bytes = b"", mtime: int = 0) -> None:
        name = os.fsencode(path.strip("/")) + b"\0"
        # The zeros: owner and group, the numbers of devices, a checksum that newc has not.
        fields = (len(self.known), mode, 0, 0, 1, mtime, len(data), 0, 0, 0, 0, len(name), 0)
        self.data += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self.data += bytes(-len(self.data) % 4) + data
        self.data += bytes(-len(self.data) % 4)
