"""Cgroups v2: where they are mounted, and how to find one by path, pid or unit."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
import time
from contextlib import contextmanager, suppress
from typing import Iterator, NamedTuple

from pybpfthrottle.errors import CgroupError, NoCgroupError, ProcessError

log = logging.getLogger(__name__)

# Planning and attaching never take that long.
_PATIENCE_S = 5.0
_UNIT_SUFFIXES = (".service", ".scope", ".slice", ".socket", ".mount", ".swap")


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo: the visible part of a file system, and where it is."""

    device: str
    root: str
    path: str
    type: str


class Cgroup:
    """One cgroup by its path. It holds no descriptor."""

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def id(self) -> int:
        """The kernel's id of the cgroup: its inode number."""
        return os.stat(self.path).st_ino

    def open(self) -> int:
        """Return a descriptor of the directory; the caller closes it."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CgroupError(f"cannot open the cgroup {self.path}: {error.strerror}") from error

    def exists(self) -> bool:
        """Whether the cgroup still exists."""
        return os.path.isdir(self.path)

    def is_still(self, cgroup_id: int) -> bool:
        """Whether the cgroup exists with this id: its path may be reused for another one."""
        try:
            return self.id == cgroup_id
        except OSError:
            return False

    def pids(self) -> list[int]:
        """Return the processes in this cgroup, not its descendants; 0 is one not visible here."""
        try:
            return [int(line) for line in self._read("cgroup.procs").split()]
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        # In a threaded cgroup only threads can be listed.
        return sorted({_leader(int(line)) for line in self._read("cgroup.threads").split()})

    def pids_below(self) -> list[int]:
        """Return the processes in this cgroup and its descendants."""
        found = []
        for path, _, _ in os.walk(self.path):
            # One may vanish meanwhile.
            with suppress(FileNotFoundError):
                found += Cgroup(path).pids()
        return found

    def ids_below(self) -> set[int]:
        """Return the ids of this cgroup and its descendants."""
        found = set()
        for path, _, _ in os.walk(self.path):
            with suppress(FileNotFoundError):
                found.add(Cgroup(path).id)
        return found

    def populated(self) -> bool:
        """Whether a process is in this cgroup or a descendant."""
        return "populated 1" in self._read("cgroup.events")

    def is_root(self) -> bool:
        """Whether this is the topmost visible cgroup."""
        return os.path.realpath(self.path) == os.path.realpath(mount().path)

    def with_ancestors(self) -> Iterator[Cgroup]:
        """Yield this cgroup and its visible ancestors."""
        top = root()
        cgroup = self
        while cgroup in top:
            yield cgroup
            cgroup = Cgroup(os.path.dirname(cgroup.path))

    def create_child(self, name: str) -> Cgroup:
        """Create a child cgroup. Raises OSError."""
        child = Cgroup(os.path.join(self.path, name))
        os.mkdir(child.path)
        return child

    def move_in(self, pid: int) -> None:
        """Move a process (0: this one) with all its threads into the cgroup. Raises OSError."""
        # Python's buffered files swallow the kernel's error for the write.
        fd = os.open(os.path.join(self.path, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d" % pid)
        finally:
            os.close(fd)

    def remove(self, *, patience_s: float = 0.0) -> None:
        """Remove the cgroup, unless it is gone already. Raises OSError: EBUSY if it is not empty.

        A process that has just ended may hold it a moment longer: retry for ``patience_s``.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                return os.rmdir(self.path)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise
            time.sleep(0.005)

    def __contains__(self, other: object) -> bool:
        """Whether the other cgroup is this one or below it."""
        if not isinstance(other, Cgroup):
            return False
        return (other.path.rstrip("/") + "/").startswith(self.path.rstrip("/") + "/")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cgroup) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"Cgroup({self.path!r})"

    def _read(self, name: str) -> str:
        with open(os.path.join(self.path, name)) as file:
            return file.read()


def _leader(tid: int) -> int:
    try:
        with open(f"/proc/{tid}/status") as status:
            for line in status:
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
    except OSError:
        pass
    return tid


def mounts() -> list[Mount]:
    """Return the mount table of this process."""
    try:
        with open("/proc/self/mountinfo", errors="surrogateescape") as table:
            return [parse_mount(line) for line in table]
    except OSError as error:
        raise CgroupError(f"cannot read the mount table: {error}") from error


def parse_mount(line: str) -> Mount:
    """Parse a line of mountinfo (man 5 proc): optional fields end at a lone hyphen."""
    fields = line.rstrip("\n").split(" ")
    separator = fields.index("-", 6)
    return Mount(fields[2], _unescape(fields[3]), _unescape(fields[4]), fields[separator + 1])


def _unescape(text: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text


def mount() -> Mount:
    """Return where cgroup v2 is mounted: on a hybrid system usually /sys/fs/cgroup/unified.

    Raises CgroupError with what to do.
    """
    found = [m for m in mounts() if m.type == "cgroup2"]
    if not found:
        raise CgroupError(
            "cgroup v2 is not mounted; mount it: mkdir -p /run/cgroup2"
            " && mount -t cgroup2 none /run/cgroup2"
        )
    # The mount that shows most of the tree.
    return min(found, key=lambda m: (len(m.root.rstrip("/")), len(m.path)))


def root() -> Cgroup:
    """Return the topmost visible cgroup."""
    return Cgroup(mount().path)


@contextmanager
def locked() -> Iterator[None]:
    """Keep other processes out of ``locked`` for the duration of the context.

    The lock is on the directory of the top cgroup, which all mount namespaces share. Anybody can
    hold it, so after a while the context is entered without it. It may be nested in this process.
    """
    if _lock.held:
        yield
        return
    try:
        fd = os.open(mount().path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, CgroupError):  # then nobody can use cgroups
        yield
        return
    try:
        _take(fd)
        _lock.held = True
        yield
    finally:
        _lock.held = False
        os.close(fd)


@contextmanager
def locked_if_free() -> Iterator[bool]:
    """Like ``locked``, but without waiting: yield False if another process holds the lock."""
    fd = -1
    with suppress(OSError, CgroupError):
        fd = os.open(mount().path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(BlockingIOError):
            if fd >= 0:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _lock.held = True
        yield _lock.held
    finally:
        _lock.held = False
        if fd >= 0:
            os.close(fd)


class _Lock(threading.local):
    """Whether this thread has the lock."""

    held = False


_lock = _Lock()


def _take(fd: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.005)
    log.warning("Another process has held the lock for %g s: going on without it", _PATIENCE_S)


def from_path(path: str) -> Cgroup:
    """Return the cgroup v2 at a path. Raises CgroupError that says what else is there."""
    if not path:
        raise CgroupError("the path of a cgroup is empty")
    real = os.path.realpath(path)
    try:
        device = os.stat(real).st_dev
    except OSError as error:
        raise NoCgroupError(f"no cgroup at {path!r}: {error.strerror}") from error
    number = f"{os.major(device)}:{os.minor(device)}"
    kind = next((m.type for m in mounts() if m.device == number), "")
    if kind == "cgroup":
        raise CgroupError(
            f"{path} is in a cgroup v1 hierarchy; cgroup v2 is mounted at {mount().path}: "
            "use a path below that"
        )
    if kind != "cgroup2":
        raise CgroupError(f"{path} is not a cgroup; cgroup v2 is mounted at {mount().path}")
    if not os.path.isdir(real):
        raise CgroupError(f"{path} is a file; give the directory {os.path.dirname(real)}")
    return Cgroup(real)


def from_pid(pid: int) -> Cgroup:
    """Return the cgroup of a process. Raises ProcessError or CgroupError."""
    try:
        with open(f"/proc/{pid}/cgroup", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessError(f"there is no process {pid}") from None
    except OSError as error:
        raise ProcessError(f"cannot read the cgroup of process {pid}: {error.strerror}") from error
    inside = next((line[3:] for line in lines if line.startswith("0::")), None)
    if inside is None:
        raise CgroupError(f"process {pid} is in no cgroup of version 2; is it mounted?")
    if inside.endswith(" (deleted)"):
        raise CgroupError(f"the cgroup of process {pid} was removed: {inside}")
    return Cgroup(_visible(inside, pid))


def _visible(inside: str, pid: int) -> str:
    """Return the file system path for a path from /proc/PID/cgroup."""
    where = mount()
    # Paths outside a cgroup namespace begin with "/..", which must not be normalised away.
    parts = [part for part in inside.split("/") if part]
    above = [part for part in where.root.split("/") if part]
    if parts[: len(above)] != above or ".." in parts[len(above) :]:
        raise CgroupError(
            f"the cgroup of process {pid}, {inside}, is outside of what is mounted at {where.path}:"
            " it belongs to another cgroup namespace"
        )
    return os.path.join(where.path, *parts[len(above) :])


def from_unit(name: str) -> Cgroup:
    """Return the cgroup of a systemd unit without asking systemd: the directory is named after it.

    Raises CgroupError if there is none, or more than one (as with units of several users).
    """
    if not name:
        raise CgroupError("the name of a unit is empty")
    wanted = unit_name(name)
    if "/" in wanted:
        raise CgroupError(f"{name!r} is no unit name; give a path with --cgroup")
    found = [c for c in walk() if os.path.basename(c.path) == wanted]
    if not found:
        if not _has_units():
            raise NoCgroupError(
                f"no cgroup of a unit {wanted!r}: this machine runs no systemd; use --cgroup PATH,"
                " or --name for processes"
            )
        raise NoCgroupError(f"no cgroup of a unit {wanted!r}; is it running? (systemctl status)")
    if len(found) > 1:
        paths = ", ".join(c.path for c in found)
        raise CgroupError(f"{wanted!r} is ambiguous: give one of these with --cgroup: {paths}")
    return found[0]


def _has_units() -> bool:
    """Whether there are units: systemd runs here, or an outer one's cgroups are visible."""
    return os.path.isdir("/run/systemd/system") or any(
        one.path.endswith((".service", ".scope", ".slice")) for one in walk()
    )


def unit_name(name: str) -> str:
    """Return the full name of a unit: as for systemctl, the default suffix is ``.service``."""
    return name if name.endswith(_UNIT_SUFFIXES) else name + ".service"


def walk() -> Iterator[Cgroup]:
    """Yield all visible cgroups."""
    for path, directories, _ in os.walk(mount().path):
        yield Cgroup(path)
        directories.sort()
