"""Cgroups of version 2: where they are mounted, and from a path, a pid or a unit to one of them."""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from typing import Iterable, Iterator, NamedTuple, Optional

from pybpfthrottle.errors import CgroupError, NoCgroupError, ProcessError
from pybpfthrottle.linux import locks, process

OWN_PREFIX = "pybpfthrottle-"
MOVED_PREFIX = OWN_PREFIX + "moved-"
_TRIES = 100
_UNIT_SUFFIXES = (".service", ".scope", ".slice", ".socket", ".mount", ".swap")


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo: what of the file system is visible, and where."""

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
        """The id that the kernel knows it by: its inode number."""
        return os.stat(self.path).st_ino

    def open(self) -> int:
        """A descriptor of its directory; the caller closes it."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise CgroupError(f"cannot open the cgroup {self.path}: {error.strerror}") from error

    def exists(self) -> bool:
        """Whether it is still there."""
        return os.path.isdir(self.path)

    def pids(self) -> list[int]:
        """The processes in it, not those in cgroups below it. 0 stands for one not visible here."""
        try:
            return [int(line) for line in self._read("cgroup.procs").split()]
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
        # In a threaded cgroup only the threads can be listed.
        return sorted({_leader(int(line)) for line in self._read("cgroup.threads").split()})

    def pids_below(self) -> list[int]:
        """The processes in it and in all cgroups below it."""
        found = []
        for path, _, _ in os.walk(self.path):
            # One may vanish in between.
            with suppress(FileNotFoundError):
                found += Cgroup(path).pids()
        return found

    def populated(self) -> bool:
        """Whether a process is in it or below it."""
        return "populated 1" in self._read("cgroup.events")

    def is_root(self) -> bool:
        """Whether it is the top of what is visible."""
        return os.path.realpath(self.path) == os.path.realpath(mount().path)

    def with_ancestors(self) -> Iterator[Cgroup]:
        """Itself and those above it, as far as they are visible."""
        top = root()
        cgroup = self
        while cgroup in top:
            yield cgroup
            cgroup = Cgroup(os.path.dirname(cgroup.path))

    def create_child(self, name: str) -> Cgroup:
        """Make a cgroup below this one. Raises OSError."""
        child = Cgroup(os.path.join(self.path, name))
        os.mkdir(child.path)
        return child

    def move_in(self, pid: int) -> None:
        """Move a process (0: this one) with all its threads into it. Raises OSError."""
        # Python's buffered files swallow the error that the kernel gives at the write.
        fd = os.open(os.path.join(self.path, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"%d" % pid)
        finally:
            os.close(fd)

    def remove(self, *, patience_s: float = 0.0) -> None:
        """Remove it; it must be empty (EBUSY). Raises OSError; none if it is gone already.

        A process that has just ended may hold it a moment longer: so long it is tried again.
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
    """The mount table of this process."""
    try:
        with open("/proc/self/mountinfo", errors="surrogateescape") as table:
            return [parse_mount(line) for line in table]
    except OSError as error:
        raise CgroupError(f"cannot read the mount table: {error}") from error


def parse_mount(line: str) -> Mount:
    """A line of mountinfo (man 5 proc): optional fields end at a lone hyphen."""
    fields = line.rstrip("\n").split(" ")
    separator = fields.index("-", 6)
    return Mount(fields[2], _unescape(fields[3]), _unescape(fields[4]), fields[separator + 1])


def _unescape(text: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text


def mount() -> Mount:
    """Where cgroup v2 is mounted: on a hybrid system usually /sys/fs/cgroup/unified.

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
    """The top of what is visible."""
    return Cgroup(mount().path)


def from_path(path: str) -> Cgroup:
    """The cgroup v2 at a path. Raises CgroupError for anything else, with what it is."""
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
    """The cgroup of a process. Raises ProcessError or CgroupError."""
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
    """The path in the file system of a path as /proc/PID/cgroup gives it."""
    where = mount()
    # Paths outside of a cgroup namespace begin with "/..": nothing may normalise them away.
    parts = [part for part in inside.split("/") if part]
    above = [part for part in where.root.split("/") if part]
    if parts[: len(above)] != above or ".." in parts[len(above) :]:
        raise CgroupError(
            f"the cgroup of process {pid}, {inside}, is outside of what is mounted at {where.path}:"
            " it belongs to another cgroup namespace"
        )
    return os.path.join(where.path, *parts[len(above) :])


def from_unit(name: str) -> Cgroup:
    """The cgroup of a systemd unit, without asking systemd: its directory has the unit's name.

    Raises CgroupError if there is none, or more than one (as with the units of several users).
    """
    if not name:
        raise CgroupError("the name of a unit is empty")
    wanted = name if name.endswith(_UNIT_SUFFIXES) else name + ".service"
    if "/" in wanted:
        raise CgroupError(f"{name!r} is no unit name; give a path with --cgroup")
    found = [c for c in walk() if os.path.basename(c.path) == wanted]
    if not found:
        raise NoCgroupError(f"no cgroup of a unit {wanted!r}; is it running? (systemctl status)")
    if len(found) > 1:
        paths = ", ".join(c.path for c in found)
        raise CgroupError(f"{wanted!r} is ambiguous: give one of these with --cgroup: {paths}")
    return found[0]


def walk() -> Iterator[Cgroup]:
    """All cgroups that are visible."""
    for path, directories, _ in os.walk(mount().path):
        yield Cgroup(path)
        directories.sort()


class OwnCgroup:
    """A cgroup that this process made for a command, and holds by a lock on its directory.

    The kernel gives up the lock however this process ends; a directory with our prefix and
    without a lock is one that a crash has left.
    """

    def __init__(self, cgroup: Cgroup, fd: int) -> None:
        self.cgroup = cgroup
        self._fd = fd

    def remove(self) -> bool:
        """Remove it; False if processes are still in it. Then the next start does it."""
        try:
            self.cgroup.remove(patience_s=0.5)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        finally:
            os.close(self._fd)
        return True


def create_own(pid: int) -> OwnCgroup:
    """Make a cgroup and move a process into it: below its own where that works, or below the root.

    Raises CgroupError.
    """
    reasons = []
    for parent in _usual_parents(pid):
        try:
            return _create_own(parent, pid)
        except OSError as error:
            reasons.append(f"{parent.path}: {error.strerror}")
    raise CgroupError(
        f"cannot make a cgroup ({'; '.join(reasons)}); this needs root, and cgroup v2 writable"
    )


def _usual_parents(pid: int) -> list[Cgroup]:
    top = root()
    try:
        own = from_pid(pid)
    except CgroupError:
        return [top]
    return [own] if own == top else [own, top]


def create_empty(parent: Cgroup, *, prefix: str = OWN_PREFIX) -> OwnCgroup:
    """Make a cgroup without processes. Raises OSError."""
    return _create_own(parent, None, prefix)


class Moved:
    """Processes in cgroups that were made for them, below those that they were in.

    ``back`` or ``with`` ends it; after a crash the next start does so.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        """Make the cgroups; ``move`` fills them. Raises CgroupError or ProcessError."""
        self._pids = list(pids)
        self._own: dict[Cgroup, OwnCgroup] = {}
        try:
            for origin in dict.fromkeys(from_pid(pid) for pid in self._pids):
                self._own[origin] = create_empty(origin, prefix=MOVED_PREFIX)
        except BaseException as error:
            self.back()
            if isinstance(error, OSError):
                raise CgroupError(f"cannot make a cgroup to move into: {error}") from error
            raise

    @property
    def cgroups(self) -> list[Cgroup]:
        """Those that were made."""
        return [own.cgroup for own in self._own.values()]

    def move(self) -> None:
        """Move the processes, and what they have started, as far as it is in the same cgroups.

        Raises CgroupError.
        """
        pending = set(self._pids)
        while pending:
            found = set(pending)
            for pid in pending:
                with suppress(ProcessError, ProcessLookupError):
                    self._move(pid)
            # One that was started meanwhile is where its parent was then.
            families = process.families()
            pending = {child for pid in found for child in families.get(pid, ())}

    def _move(self, pid: int) -> None:
        own = self._own.get(from_pid(pid))
        if own is None:
            return
        try:
            own.cgroup.move_in(pid)
        except ProcessLookupError:
            raise
        except OSError as error:
            raise CgroupError(f"cannot move process {pid}: {error.strerror}") from error

    def populated(self) -> bool:
        """Whether a process is in one of them."""
        return any(cgroup.exists() and cgroup.populated() for cgroup in self.cgroups)

    def back(self) -> None:
        """Move what is in them to where it came from, and remove them."""
        for origin, own in self._own.items():
            _move_out(own.cgroup, origin)
            own.remove()
        self._own.clear()

    def __enter__(self) -> Moved:
        return self

    def __exit__(self, *_: object) -> None:
        self.back()


def _move_out(cgroup: Cgroup, into: Cgroup) -> None:
    """Move all processes; what is started meanwhile, too."""
    while True:
        with suppress(FileNotFoundError):
            pids = cgroup.pids()
            for pid in pids:
                with suppress(ProcessLookupError):
                    into.move_in(pid)
            if pids:
                continue
        return


def _create_own(parent: Cgroup, pid: Optional[int], prefix: str = OWN_PREFIX) -> OwnCgroup:
    os.stat(parent.path)
    for attempt in range(_TRIES):
        cgroup = Cgroup(os.path.join(parent.path, f"{prefix}{os.getpid()}-{attempt}"))
        # Until it is locked another instance may take it for abandoned: then the next one.
        with suppress(FileExistsError, FileNotFoundError, BlockingIOError):
            os.mkdir(cgroup.path)
            fd = _lock(cgroup)
            try:
                _accept_processes(parent, cgroup)
                if pid is not None:
                    cgroup.move_in(pid)
            except BaseException:
                os.close(fd)
                cgroup.remove()
                raise
            return OwnCgroup(cgroup, fd)
    raise FileExistsError(errno.EEXIST, "no free name", parent.path)


def _lock(cgroup: Cgroup) -> int:
    """Lock its directory; BlockingIOError if another process has, FileNotFoundError if it is gone.

    The lock ends with the descriptor.
    """
    fd = locks.lock(cgroup.path)
    if not cgroup.exists():  # removed between the two
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, "removed", cgroup.path)
    return fd


def _accept_processes(parent: Cgroup, child: Cgroup) -> None:
    """A child of a threaded cgroup takes processes only when it is threaded itself."""
    if parent.is_root():
        return
    with open(os.path.join(parent.path, "cgroup.type")) as file:
        threaded = "threaded" in file.read()
    if threaded:
        fd = os.open(os.path.join(child.path, "cgroup.type"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"threaded")
        finally:
            os.close(fd)


def claim(cgroup: Cgroup) -> int:
    """Lock a cgroup for a limit, so that no second one is put on it unknowingly.

    The lock ends with the descriptor, and so with this process. Raises CgroupError that names the
    process which has it, or has one above, below, or for a process in it.
    """
    try:
        locks.settle(cgroup.path)
        fd = _lock(cgroup)
    except BlockingIOError:
        raise _claimed(cgroup, locks.holders(cgroup.path).get(locks.key(cgroup.path))) from None
    except OSError as error:
        raise CgroupError(f"cannot open the cgroup {cgroup.path}: {error.strerror}") from error
    try:
        below = [Cgroup(path) for path, _, _ in os.walk(cgroup.path)][1:]
        _refuse_held((*list(cgroup.with_ancestors())[1:], *below))
        holder = process.claimed(cgroup.pids_below())
        if holder:
            raise CgroupError(
                f"process {process.listed([holder.claimed])} in {cgroup.path} is limited already,"
                f" by process {holder.by}. If you mean both limits, add --stack"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_claimed(cgroup: Cgroup) -> None:
    """Raise CgroupError if another process has a limit on a cgroup or above it."""
    _refuse_held(cgroup.with_ancestors())


def _refuse_held(cgroups: Iterable[Cgroup]) -> None:
    held = locks.holders(mount().path)
    for other in cgroups:
        with suppress(FileNotFoundError):  # it was removed meanwhile
            holder = held.get(locks.key(other.path), os.getpid())
            if holder != os.getpid():
                raise _claimed(other, holder)


def _claimed(cgroup: Cgroup, holder: Optional[int]) -> CgroupError:
    by = f"process {holder}" if holder else "another process"
    return CgroupError(
        f"{cgroup.path} is limited already, by {by}: packets would be charged to both limits."
        " If you mean both, add --stack"
    )


def remove_abandoned() -> list[Cgroup]:
    """Remove the cgroups of crashed runs of ours that no process is in any more.

    Those that were moved into one go back to where they came from.
    """
    return abandoned(remove=True)


def abandoned(*, remove: bool = False) -> list[Cgroup]:
    """The cgroups of crashed runs of ours that no process is in any more."""
    found = []
    # From below: who was moved twice goes back twice.
    for cgroup in reversed(list(walk())):
        if not os.path.basename(cgroup.path).startswith(OWN_PREFIX):
            continue
        # An OSError: its owner lives, or it is not ours to remove.
        with suppress(OSError):
            fd = _lock(cgroup)
            try:
                moved = os.path.basename(cgroup.path).startswith(MOVED_PREFIX)
                if moved and remove:
                    _move_out(cgroup, Cgroup(os.path.dirname(cgroup.path)))
                if moved or not cgroup.populated():
                    if remove:
                        cgroup.remove()
                    found.append(cgroup)
            finally:
                os.close(fd)
    return found
