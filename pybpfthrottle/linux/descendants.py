"""The descendants of processes, found again without reading about each process again."""

from __future__ import annotations

import os
from typing import Iterable, NamedTuple

from pybpfthrottle.linux import process


class _Seen(NamedTuple):
    """A process, and its parent when it was looked at. Each is a process id, and its inode."""

    number: tuple[int, int]
    parent: tuple[int, int]


class Tree:
    """Who was whose child, as far as it was looked at.

    The kernel gives each process's directory in /proc another inode, and tells it with the list of
    them. So what was read stays true while that is the same, but for one thing: whose parent ends
    becomes the child of one of its ancestors. That is looked up again for those that matter.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def of(self, pids: Iterable[int]) -> set[int]:
        """Return the running descendants of processes."""
        self._look()
        wanted = set(pids)
        parents = {pid: process.parent_of(pid) for pid in self._below(wanted)}
        found: set[int] = set()
        while new := {pid for pid, parent in parents.items() if parent in wanted} - found:
            found |= new
            wanted |= new
        return found

    def _look(self) -> None:
        """Read about the processes that are new, or whose parent has ended."""
        inodes = _inodes()
        there = set(inodes.items())
        for pid, one in list(self._seen.items()):
            if one.number not in there or one.parent not in there:
                del self._seen[pid]
        for number in there:
            pid = number[0]
            if pid not in self._seen:
                parent = process.parent_of(pid)
                if parent is not None:
                    self._seen[pid] = _Seen(number, (parent, inodes.get(parent, 0)))

    def _below(self, pids: Iterable[int]) -> set[int]:
        """Return what was below processes, whoever has ended since."""
        children: dict[int, list[int]] = {}
        for pid, one in self._seen.items():
            children.setdefault(one.parent[0], []).append(pid)
        found: set[int] = set()
        new = list(pids)
        while new:
            new = [child for pid in new for child in children.get(pid, ()) if child not in found]
            found.update(new)
        return found


def _inodes() -> dict[int, int]:
    """Return the inode of each process's directory."""
    with os.scandir("/proc") as entries:
        return {int(entry.name): entry.inode() for entry in entries if entry.name.isdigit()}


_tree = Tree()


def of(pids: Iterable[int]) -> set[int]:
    """Return the running descendants of processes."""
    return _tree.of(pids)
