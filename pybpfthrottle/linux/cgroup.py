"""Cgroups of version 2: where they are mounted, and from a path, a pid or a unit to one of them.

A cgroup is known by its path below ``mount``, so that each has one path here. Other processes may
see it by another one: what is to be compared with theirs is its id.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import threading
import time
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Iterable, Iterator, Optional, Sequence

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import CgroupError, NoCgroupError, ProcessError
from pybpfthrottle.linux import libc, tables
from pybpfthrottle.logger import Logger

log = Logger(__name__)

# Planning and attaching never take that long.
_PATIENCE_S = 5.0
# kernfs gives its first number to the root of a hierarchy (fs/kernfs/dir.c).
_ROOT_ID = 1
_FIRST_CGROUP_NAMESPACE = 0xEFFFFFFB  # PROC_CGROUP_INIT_INO of include/linux/proc_ns.h
_USER_MANAGER = r"user@\d+\.service"
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
        """The id that the kernel knows it by: its inode number. Raises OSError."""
        return os.stat(self.reach).st_ino

    @property
    def reach(self) -> str:
        """The path by which this process reaches it: another one if it is not mounted here."""
        return _reach(self.path)

    def open(self) -> int:
        """Return a descriptor of the directory; the caller closes it."""
        try:
            return os.open(self.reach, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CgroupError(f"cannot open the cgroup {self.path}: {error.strerror}") from error

    def exists(self) -> bool:
        """Whether it is still there."""
        return os.path.isdir(self.reach)

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
        for cgroup in walk(self):
            # One may vanish in between.
            with suppress(FileNotFoundError):
                found += cgroup.pids()
        return found

    def ids_below(self) -> set[int]:
        """Return the ids of this cgroup and its descendants."""
        found = set()
        for cgroup in walk(self):
            with suppress(FileNotFoundError):
                found.add(cgroup.id)
        return found

    def populated(self) -> bool:
        """Whether a process is in this cgroup or a descendant."""
        return "populated 1" in self._read("cgroup.events")

    def is_root(self) -> bool:
        """Whether it is the root of all cgroups, and not only the top of what is visible."""
        with suppress(OSError):
            return self.id == _ROOT_ID
        return False

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
        os.mkdir(child.reach)
        return child

    def move_in(self, pid: int) -> None:
        """Move a process (0: this one) with all its threads into it. Raises OSError."""
        # Python's buffered files swallow the error that the kernel gives at the write.
        fd = os.open(os.path.join(self.reach, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
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
                return os.rmdir(self.reach)
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
        return tables.read(os.path.join(self.reach, name))


def _leader(tid: int) -> int:
    try:
        for line in tables.lines(f"/proc/{tid}/status"):
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    except OSError:
        pass
    return tid


def mounts() -> list[Mount]:
    """Return the mount table of this process."""
    try:
        return _mounts_of("self")
    except OSError as error:
        raise CgroupError(f"cannot read the mount table: {error}") from error


def _mounts_of(process: str) -> list[Mount]:
    return list(_parse_mounts(tables.read(f"/proc/{process}/mountinfo")))


# Asked for again and again, and long.
@lru_cache(maxsize=4)
def _parse_mounts(table: str) -> tuple[Mount, ...]:
    return tuple(parse_mount(line) for line in table.split("\n") if line)


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

    Raises CgroupError with what to do. Within ``locked`` and ``mounted_once`` it is looked up once.
    """
    if not _thread.is_mounted_once:
        return _look_for_mount()
    if _thread.mounted is None:
        _thread.mounted = _look_for_mount()
    return _thread.mounted


def _look_for_mount() -> Mount:
    table = mounts()
    found = [m for m in table if m.type == "cgroup2"]
    if not found:
        return _elsewhere(table)
    if len(found) > 1:
        # Others may be mounted over one.
        found = list(filter(_is_reached, found)) or found
    return min(found, key=_shows)


def _shows(mounted: Mount) -> tuple[int, int, int]:
    """Return what makes the mount that shows most of the tree the least."""
    parts = [part for part in mounted.root.split("/") if part]
    # In a cgroup namespace a mount from outside begins above the namespace's root: at "/..".
    above = parts.count("..")
    return len(parts) - above, -above, len(mounted.path)


def _is_reached(mounted: Mount) -> bool:
    """Whether the path of a mount leads to it."""
    try:
        fd = os.open(mounted.path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            found = re.search(r"^mnt_id:\s*(\d+)$", file.read(), re.MULTILINE)
        table = tables.lines("/proc/self/mountinfo")
        lines = [line for line in table if found and line.split(" ")[0] == found[1]]
    except OSError:
        return True
    finally:
        os.close(fd)
    return [parse_mount(line) for line in lines] == [mounted]


class _Hidden(NamedTuple):
    """The hierarchy where it is not mounted: the mount as others have it, and how it is reached."""

    mount: Mount
    base: str
    fd: int


_hidden: list[_Hidden] = []


def _elsewhere(table: Sequence[Mount]) -> Mount:
    """Return where cgroup v2 is mounted for others, if a new /sys has hidden it from this process.

    ``ip netns exec`` mounts one, for the network namespace's own devices. Where cgroup v2 was
    unmounted by itself somebody wanted that, and it stays so. Raises CgroupError.
    """
    usual = "mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2"
    outside = _outside(table)
    if outside is None:
        raise CgroupError(f"cgroup v2 is not mounted; mount it (--mount-cgroup2): {usual}")
    if not (_hidden and _hidden[0].mount.path == outside.path and os.path.isdir(_hidden[0].base)):
        from pybpfthrottle.bpf import perf  # which mounts tracefs so

        try:
            fd = perf.mount_nowhere("cgroup2")
        except OSError as error:
            raise CgroupError(
                "cgroup v2 is not mounted here, because a new /sys was mounted, as ip netns exec"
                " does. Enter only the network namespace: nsenter --net=/run/netns/NAME"
                f" pybpfthrottle ...; or mount it: {usual} ({error})"
            ) from error
        number = os.fstat(fd).st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
        there = outside._replace(device=device, root="/")
        _hidden[:] = [_Hidden(there, f"/proc/self/fd/{fd}", fd)]
    return _hidden[0].mount


# Where to mount it. The second place is there even if no directory can be made.
_PLACES = ("/run/cgroup2", "/sys/fs/cgroup")


def mount_if_missing() -> Mount:
    """Return where cgroup v2 is mounted; mount it if it is not. It stays mounted.

    Needs CAP_SYS_ADMIN. Raises CgroupError.
    """
    with suppress(CgroupError):
        return mount()
    reasons = []
    for path in _PLACES:
        try:
            os.makedirs(path, exist_ok=True)
            # What is mounted there, such as version 1, is not to be hidden.
            if not os.listdir(path):
                libc.mount("cgroup2", path)
                return mount()
            reasons.append(f"{path} is not empty")
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
    raise CgroupError(f"cannot mount cgroup v2: {'; '.join(reasons)}")


def _outside(table: Sequence[Mount]) -> Optional[Mount]:
    """Return the mount of cgroup v2 that the first process has, if it has another /sys."""
    try:
        others = _mounts_of("1")
    except OSError:
        return None
    own, theirs = ({m.device for m in each if m.path == "/sys"} for each in (table, others))
    if not own or not theirs or own & theirs:
        return None
    return min((m for m in others if m.type == "cgroup2"), key=_shows, default=None)


def _reach(path: str) -> str:
    for hidden in _hidden:
        if (path + "/").startswith(hidden.mount.path.rstrip("/") + "/"):
            return hidden.base + path[len(hidden.mount.path.rstrip("/")) :]
    return path


def descriptors() -> list[int]:
    """Return the descriptors that this module needs: who closes all others leaves these open."""
    return [hidden.fd for hidden in _hidden]


def root() -> Cgroup:
    """Return the topmost visible cgroup."""
    return Cgroup(mount().path)


@contextmanager
def locked() -> Iterator[None]:
    """Keep other processes out of ``locked`` for the duration of the context.

    The lock is on the directory of the top cgroup, which all mount namespaces share. Anybody can
    hold it, so after a while the context is entered without it. It may be nested in this process.
    """
    if _thread.has_lock:
        yield
        return
    with mounted_once():
        try:
            fd = root().open()
        except CgroupError:  # then nobody can use cgroups
            yield
            return
        try:
            _take(fd)
            _thread.has_lock = True
            yield
        finally:
            _thread.has_lock = False
            os.close(fd)


@contextmanager
def locked_if_free() -> Iterator[bool]:
    """Like ``locked``, but without waiting: yield False if another process holds the lock."""
    with mounted_once():
        fd = -1
        with suppress(OSError, CgroupError):
            fd = os.open(mount().path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(BlockingIOError):
                if fd >= 0:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _thread.has_lock = True
            yield _thread.has_lock
        finally:
            _thread.has_lock = False
            if fd >= 0:
                os.close(fd)


@contextmanager
def mounted_once() -> Iterator[None]:
    """Look up where cgroup v2 is mounted once for the duration of the context. It may be nested."""
    if _thread.is_mounted_once:
        yield
        return
    _thread.is_mounted_once = True
    try:
        yield
    finally:
        _thread.is_mounted_once = False
        _thread.mounted = None


class _Thread(threading.local):
    """What this thread has: the lock, and where it has found cgroup v2 mounted."""

    has_lock = is_mounted_once = False
    mounted: Optional[Mount] = None


_thread = _Thread()


def _take(fd: int) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.005)
    log.warning("Another process has held the lock for %g s; continuing without it", _PATIENCE_S)


def depth(cgroup: Cgroup) -> int:
    """Return how far a cgroup is below the root of all cgroups; 0 for that.

    Raises CgroupError in a cgroup namespace, where nothing tells how deep its own root is.
    """
    with suppress(OSError):
        if os.stat("/proc/self/ns/cgroup").st_ino != _FIRST_CGROUP_NAMESPACE:
            raise CgroupError(
                "this process is in a cgroup namespace, as in a container, and cannot tell how"
                " deep in the tree a cgroup is"
            )
    where = mount()
    parts = os.path.relpath(cgroup.path, where.path).split("/")
    return len([part for part in [*where.root.split("/"), *parts] if part not in ("", ".")])


def from_path(path: str) -> Cgroup:
    """Return the cgroup v2 at a path. Raises CgroupError that says what else is there."""
    if not path:
        raise CgroupError("the cgroup path is empty")
    real = os.path.realpath(path)
    table = mounts()
    with suppress(CgroupError):
        table.append(mount())
    try:
        device = os.stat(_reach(real)).st_dev
    except OSError as error:
        raise NoCgroupError(f"no cgroup at {path!r}: {error.strerror}") from error
    number = f"{os.major(device)}:{os.minor(device)}"
    kind = next((m.type for m in table if m.device == number), "")
    if kind == "cgroup":
        raise CgroupError(
            f"{path} is in a cgroup v1 hierarchy; cgroup v2 is mounted at {mount().path}: "
            "use a path below that"
        )
    if kind != "cgroup2":
        raise CgroupError(f"{path} is not a cgroup; cgroup v2 is mounted at {mount().path}")
    if not os.path.isdir(_reach(real)):
        raise CgroupError(f"{path} is a file; give the directory {os.path.dirname(real)}")
    return _below_mount(Cgroup(real))


def _below_mount(cgroup: Cgroup) -> Cgroup:
    """Return a cgroup by its path below ``mount``: it may be given by that of another mount."""
    if cgroup in root():
        return cgroup
    return by_id(cgroup.id) or cgroup


def by_id(number: int) -> Optional[Cgroup]:
    """Return the cgroup with an id, or None if there is none, or none that is visible."""
    for cgroup in walk():
        with suppress(OSError):
            if cgroup.id == number:
                return cgroup
    return None


def known_as(path: str, number: Optional[int]) -> Optional[Cgroup]:
    """Return the cgroup that another process knows by a path and an id (None: it did not say).

    None if there is none any more, or none that is visible here.
    """
    cgroup = Cgroup(path)
    if number is None:
        return cgroup if cgroup.exists() else None
    with suppress(OSError, CgroupError):
        if cgroup.id == number and cgroup in root():
            return cgroup
    return by_id(number)


def ids(cgroups: Iterable[Cgroup]) -> list[int]:
    """Return the ids of cgroups; 0 for one that is gone already."""
    found = []
    for cgroup in cgroups:
        found.append(0)
        with suppress(OSError):
            found[-1] = cgroup.id
    return found


def from_pid(pid: int, mounted: Optional[Mount] = None) -> Cgroup:
    """Return the cgroup of a process. Raises ProcessError or CgroupError.

    Who asks for many gives what ``mount`` returns.
    """
    try:
        lines = tables.lines(f"/proc/{pid}/cgroup")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessError(f"there is no process {pid}") from None
    except OSError as error:
        raise ProcessError(f"cannot read the cgroup of process {pid}: {error.strerror}") from error
    inside = next((line[3:] for line in lines if line.startswith("0::")), None)
    if inside is None:
        raise CgroupError(f"process {pid} is not in a cgroup of version 2; is cgroup v2 mounted?")
    if inside.endswith(" (deleted)"):
        raise CgroupError(f"the cgroup of process {pid} was removed: {inside}")
    return Cgroup(_visible(inside, pid, mounted or mount()))


def _visible(inside: str, pid: int, where: Mount) -> str:
    """Return the file system path for a path from /proc/PID/cgroup."""
    # Paths outside a cgroup namespace begin with "/..", which must not be normalised away.
    parts = [part for part in inside.split("/") if part]
    above = [part for part in where.root.split("/") if part]
    if parts[: len(above)] == above and ".." not in parts[len(above) :]:
        return os.path.join(where.path, *parts[len(above) :])
    # A mount from outside of a cgroup namespace begins at "/..", and has its root somewhere below:
    # nothing tells where.
    found = _holding(pid, parts) if ".." in above else None
    if found is None:
        raise CgroupError(
            f"the cgroup of process {pid}, {inside}, is not visible below {where.path}: it"
            " belongs to another cgroup namespace"
        )
    return found.path


def _holding(pid: int, parts: Sequence[str]) -> Optional[Cgroup]:
    """Return the cgroup that lists a process; ``parts`` are those of its path, as far as known."""
    name = parts[-1] if parts and parts[-1] != ".." else ""
    for cgroup in walk():
        # One may vanish in between, or not be readable.
        with suppress(OSError):
            if (not name or os.path.basename(cgroup.path) == name) and pid in cgroup.pids():
                return cgroup
    return None


def from_unit(name: str) -> Cgroup:
    """Return the cgroup of a systemd unit without asking systemd: the directory is named after it.

    Raises CgroupError if there is none, or more than one (as with units of several users).
    """
    if not name:
        raise CgroupError("the unit name is empty")
    wanted = unit_name(name)
    if "/" in wanted:
        raise CgroupError(f"{name!r} is not a unit name; for a path use --cgroup")
    found = [c for c in walk() if os.path.basename(c.path) == wanted]
    if not found:
        if not _has_units():
            raise NoCgroupError(
                f"the unit {wanted!r} has no cgroup: systemd does not run here; use --cgroup PATH,"
                " or --name for processes"
            )
        raise NoCgroupError(f"the unit {wanted!r} has no cgroup; is it running? (systemctl status)")
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
    return name if is_unit(name) else name + ".service"


def is_unit(name: str) -> bool:
    """Whether this is the full name of a unit, one of those that have cgroups."""
    return name.endswith(_UNIT_SUFFIXES)


def unit_of(path: str) -> str:
    """Return the systemd unit that a cgroup belongs to, from its path; empty if to none.

    A unit of a user's systemd comes behind that: ``user@1000.service/app-x.scope``. What is below a
    unit, such as the units inside a container, belongs to the unit.
    """
    units = [part.lstrip("_") for part in path.split("/") if is_unit(part)]
    # Slices are units too, but hold other units rather than processes.
    units = [unit for unit in units if not unit.endswith(".slice")]
    if units and re.fullmatch(_USER_MANAGER, units[0]):
        return "/".join(units[:2])
    return units[0] if units else ""


def walk(top: Optional[Cgroup] = None) -> Iterator[Cgroup]:
    """A cgroup and all below it; without one all that are visible."""
    top = top or root()
    reach = top.reach
    waiting = [reach]
    while waiting:
        path = waiting.pop()
        try:
            below = _directories(path)
        except OSError:  # it is gone
            continue
        yield Cgroup(top.path + path[len(reach) :])
        waiting += reversed(below)


def _directories(path: str) -> list[str]:
    """Return the directories in one, in order. Raises OSError."""
    # Two links: there are none. To list the dozens of files of a cgroup takes ten times as long.
    if os.stat(path).st_nlink == 2:
        return []
    with os.scandir(path) as entries:
        names = sorted(one.name for one in entries if one.is_dir(follow_symlinks=False))
    return [f"{path}/{name}" for name in names]
