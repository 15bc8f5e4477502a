"""Pinned links and maps: what they attach outlives the process that has attached it.

They are in a directory for each throttle and each time that it was pinned, in the bpf file system.
If none is mounted, it is mounted while there are any. Call these under the lock of all throttles.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import ExitStack, suppress
from typing import Any, Container, Iterable, Optional, Union

from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.errors import CgroupError
from pybpfthrottle.linux import cgroup, libc

_USUAL = "/sys/fs/bpf"
_TYPE = "bpf"
_DIRECTORY = "pybpfthrottle"
# No throttle has such a short id.
_DRAFT = "draft"
# Beside our directory, where we have mounted the file system ourselves; it ends with that.
_MOUNTED = "mounted-by-pybpfthrottle"
# What the kernel puts there.
_BUILT_IN = ("maps.debug", "progs.debug")


def pin(throttle_id: str, kept: Iterable[Union[Link, Map[Any, Any]]]) -> str:
    """Pin links and maps in a new directory; return its path. Needs CAP_BPF or CAP_SYS_ADMIN.

    Links Linux 5.7. Raises OSError; then nothing is pinned.
    """
    place = os.path.join(_mount(), _DIRECTORY)
    number = os.urandom(4).hex()
    # Half of its pins would keep a throttle that nobody can open any more.
    draft, path = (os.path.join(place, f"{name}-{number}") for name in (_DRAFT, throttle_id))
    try:
        os.makedirs(place, mode=0o700, exist_ok=True)
        if not _is_trusted(place):
            raise PermissionError(errno.EPERM, "it belongs to another user; remove it", place)
        os.mkdir(draft, mode=0o700)
        for index, one in enumerate(kept):
            one.pin(os.path.join(draft, str(index)))
        os.rename(draft, path)
    except OSError:
        unpin(draft)
        raise
    return path


def of(throttle_id: str) -> list[str]:
    """Return the directories with the pins of a throttle."""
    return [path for path, found in _all() if found == throttle_id]


def unpin(path: str) -> None:
    """Remove what was pinned in a directory, and the directory. Doing so twice is no error.

    Raises OSError once all has been removed that can be.
    """
    with ExitStack() as steps:
        steps.callback(_unmount, os.path.dirname(os.path.dirname(path)))
        with suppress(FileNotFoundError):
            names = os.listdir(path)
            steps.callback(os.rmdir, path)
            for name in names:
                steps.callback(os.unlink, os.path.join(path, name))


def tidy_up(known: Container[str]) -> None:
    """Remove the pins of throttles that are not known any more, and what a kill left half made."""
    for path, throttle_id in _all():
        if throttle_id not in known:
            unpin(path)
    top = _mounted_at()
    if top is not None:
        _unmount(top)


def _all() -> list[tuple[str, str]]:
    """Return each directory with pins, and the id of its throttle."""
    top = _mounted_at()
    if top is None:
        return []
    place = os.path.join(top, _DIRECTORY)
    with suppress(OSError):
        if not _is_trusted(place):
            return []
        return [(os.path.join(place, name), name.partition("-")[0]) for name in os.listdir(place)]
    return []


def _is_trusted(place: str) -> bool:
    """Whether nobody else has made our directory, or a link in its place. Raises OSError.

    Anybody can make either in a bpf file system that was mounted without a mode, and what is in it
    is removed by root.
    """
    status = os.lstat(place)
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid in (0, os.geteuid())
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _mount() -> str:
    """Return where a bpf file system is mounted, by us if it has to be. Raises OSError."""
    found = _mounted_at()
    if found is None:
        libc.mount(_TYPE, _USUAL, "mode=0700")
        found = _USUAL
        os.mkdir(os.path.join(found, _MOUNTED), mode=0o700)
    return found


def _unmount(top: str) -> None:
    """Remove our directory if it is empty, and unmount what we have mounted."""
    try:
        os.rmdir(os.path.join(top, _DIRECTORY))
    except OSError as error:
        if error.errno != errno.ENOENT:  # ENOTEMPTY: another throttle's
            return
    # Only if nobody else has pinned anything meanwhile.
    if set(os.listdir(top)) - set(_BUILT_IN) == {_MOUNTED}:
        with suppress(OSError):  # somebody is in it
            libc.umount(top)


def _mounted_at() -> Optional[str]:
    """Return where a bpf file system is mounted: in the usual place if it is there."""
    try:
        found = [one.path for one in cgroup.mounts() if one.type == _TYPE]
    except CgroupError:  # no /proc
        return None
    return _USUAL if _USUAL in found else next(iter(found), None)
