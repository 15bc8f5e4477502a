"""The descendants of processes, found again without reading about each process again."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Iterable

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.linux import process, tables

# To ask more threads for their children costs as much as to look at all processes.
_MOST_THREADS = 32


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
        # Zombies, which have no children.
        self._ended: set[tuple[int, int]] = set()

    def of(self, pids: Iterable[int]) -> set[int]:
        """Return the running descendants of processes."""
        wanted = {pid for pid in pids if not _is_childless(pid)}
        if not wanted:
            return set()
        self._look()
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
        self._ended &= there
        for number in there - self._ended:
            pid = number[0]
            if pid not in self._seen:
                parent = process.parent_of(pid)
                if parent is None:
                    self._ended.add(number)
                else:
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


def _is_childless(pid: int) -> bool:
    """Whether it is certain, at little cost, that a process has no children (Linux 4.2).

    The kernel may leave out some of several children in a list, but tells an empty one exactly.
    What a thread leaves when it ends goes to another one, maybe of those that were asked before.
    """
    with suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
        return (
            len(threads) <= _MOST_THREADS
            and not any(tables.read(f"/proc/{pid}/task/{one}/children") for one in threads)
            and set(threads) <= set(os.listdir(f"/proc/{pid}/task"))
        )
    return False


def _inodes() -> dict[int, int]:
    """Return the inode of each process's directory."""
    with os.scandir("/proc") as entries:
        return {int(entry.name): entry.inode() for entry in entries if entry.name.isdigit()}


_tree = Tree()


def of(pids: Iterable[int]) -> set[int]:
    """Return the running descendants of processes."""
    return _tree.of(pids)
