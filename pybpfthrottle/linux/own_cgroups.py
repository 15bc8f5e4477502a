"""Cgroups that this program creates: for a command, and for processes moved temporarily.

Their names tell who created them, so that the next start can remove the leftovers of a crash.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import ExitStack, suppress
from typing import Callable, Iterable, Optional

from pybpfthrottle.errors import CgroupError, ProcessError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Identity

PREFIX = "pybpfthrottle-"
MOVED_PREFIX = PREFIX + "moved-"
_TRIES = 100
# The owner's pid and start time, its pid namespace unless that is the first, and a number.
_NAME = re.compile(rf"{PREFIX}(?:moved-)?(\d+)-(\d+)(?:-(\d+))?-\d+")
# The cgroups that this process created and has not given up.
_held: set[str] = set()


def is_ours(cgroup: Cgroup) -> bool:
    """Whether the name says that an instance of this program created the cgroup."""
    return _NAME.fullmatch(os.path.basename(cgroup.path)) is not None


def is_held(cgroup: Cgroup) -> bool:
    """Whether this process created the cgroup and has not given it up."""
    return cgroup.path in _held


class OwnCgroup:
    """A cgroup that this process made."""

    def __init__(self, cgroup: Cgroup) -> None:
        self.cgroup = cgroup

    def remove(self) -> bool:
        """Remove it; return False if it still has processes: then a later start removes it."""
        _held.discard(self.cgroup.path)
        try:
            self.cgroup.remove(patience_s=0.5)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True


def create_for(pid: int, *, escapes: Callable[[Cgroup], str] = lambda parent: "") -> OwnCgroup:
    """Make a cgroup below that of a process, or else below the root, and move the process there.

    ``escapes`` returns what it would escape from below a parent: then that is not used. Raises
    CgroupError.
    """
    reasons = []
    numbers = set()
    for parent in _usual_parents(pid):
        try:
            escaped = escapes(parent)
            if escaped:
                reasons.append(f"{parent.path}: the command would escape {escaped}")
                continue
            return _create(parent, pid)
        except OSError as error:
            reasons.append(f"{parent.path}: {error.strerror}")
            numbers.add(error.errno)
    if numbers & {errno.EACCES, errno.EPERM}:
        remedy = "this needs root and a writable cgroup v2"
    else:
        remedy = without_one("start the command yourself, and limit it with --pid PID")
    raise CgroupError(f"cannot make a cgroup ({'; '.join(reasons)}): {remedy}")


def without_one(otherwise: str) -> str:
    """Return what to do where no cgroup can be made, for people.

    ``otherwise`` is what works where sockets can be marked. In a pid namespace they cannot: there
    the whole container can be limited, from inside if its cgroup is visible.
    """
    if process.in_first_namespace():
        return otherwise
    with suppress(CgroupError, ProcessError):
        own = cgroups.from_pid(os.getpid())
        if not own.is_root():
            return f"limit all of this container: --cgroup {own.path} --whole-cgroup"
    return "limit it from outside this container, with --pid or --cgroup"


def _usual_parents(pid: int) -> list[Cgroup]:
    top = cgroups.root()
    try:
        own = cgroups.from_pid(pid)
    except CgroupError:
        return [top]
    return [own] if own == top else [own, top]


def create_empty(parent: Cgroup, *, prefix: str = PREFIX) -> OwnCgroup:
    """Make a cgroup without processes. Raises OSError."""
    return _create(parent, None, prefix)


def _create(parent: Cgroup, pid: Optional[int], prefix: str = PREFIX) -> OwnCgroup:
    os.stat(parent.reach)
    stem = prefix + _owner_in_name(process.identity())
    for attempt in range(_TRIES):
        cgroup = Cgroup(os.path.join(parent.path, f"{stem}-{attempt}"))
        with suppress(FileExistsError):
            os.mkdir(cgroup.reach)
            with ExitStack() as undo:
                undo.callback(cgroup.remove)
                _accept_processes(parent, cgroup)
                if pid is not None:
                    cgroup.move_in(pid)
                undo.pop_all()
            _held.add(cgroup.path)
            return OwnCgroup(cgroup)
    raise FileExistsError(errno.EEXIST, "no free name", parent.path)


def _owner_in_name(owner: Identity) -> str:
    name = f"{owner.pid}-{owner.start_ticks}"
    return name if process.in_first_namespace() else f"{name}-{owner.pid_namespace}"


def _accept_processes(parent: Cgroup, child: Cgroup) -> None:
    """A child of a threaded cgroup takes processes only when it is threaded itself."""
    try:
        with open(os.path.join(parent.reach, "cgroup.type")) as file:
            threaded = "threaded" in file.read()
    except FileNotFoundError:  # the root has none, nor had any before Linux 4.14
        return
    if threaded:
        fd = os.open(os.path.join(child.reach, "cgroup.type"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"threaded")
        finally:
            os.close(fd)


class Moved:
    """Processes in cgroups created for them, below their original ones.

    ``back`` or ``with`` moves them back; after a crash the next start does so.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        """Create the cgroups; ``move`` fills them. Raises CgroupError or ProcessError."""
        self._pids = list(pids)
        self._own: dict[Cgroup, OwnCgroup] = {}
        try:
            for origin in dict.fromkeys(cgroups.from_pid(pid) for pid in self._pids):
                self._own[origin] = create_empty(origin, prefix=MOVED_PREFIX)
        except BaseException as error:
            self.back()
            if isinstance(error, OSError):
                remedy = without_one("use --pid without --move-cgroup")
                raise CgroupError(
                    f"cannot make a cgroup to move the process into ({error.strerror}): {remedy}"
                ) from error
            raise

    @property
    def cgroups(self) -> list[Cgroup]:
        """The cgroups that were made."""
        return [own.cgroup for own in self._own.values()]

    def move(self, *, children: bool = True) -> None:
        """Move the processes, and with ``children`` their children that are in the same cgroups.

        Raises CgroupError.
        """
        pending = set(self._pids)
        while pending:
            moved = set(pending)
            for pid in pending:
                with suppress(ProcessError, ProcessLookupError):
                    self._move(pid)
            if not children:
                return
            # A child started meanwhile is where its parent was then.
            families = process.families()
            pending = {child for pid in moved for child in families.get(pid, ())}

    def _move(self, pid: int) -> None:
        own = self._own.get(cgroups.from_pid(pid))
        if own is None:
            return
        try:
            own.cgroup.move_in(pid)
        except ProcessLookupError:
            raise
        except OSError as error:
            raise CgroupError(f"cannot move process {pid}: {error.strerror}") from error

    def populated(self) -> bool:
        """Whether a process is in one of the cgroups."""
        return any(cgroup.exists() and cgroup.populated() for cgroup in self.cgroups)

    def back(self) -> None:
        """Move all processes back to where they came from, and remove the cgroups."""
        with ExitStack() as stack:
            for origin, own in self._own.items():
                stack.callback(own.remove)
                stack.callback(_move_out, own.cgroup, origin)
        self._own.clear()

    def __enter__(self) -> Moved:
        return self

    def __exit__(self, *_: object) -> None:
        self.back()


def _move_out(cgroup: Cgroup, into: Cgroup) -> None:
    """Move all processes, including children started meanwhile."""
    while True:
        with suppress(FileNotFoundError):
            pids = cgroup.pids()
            for pid in pids:
                with suppress(ProcessLookupError):
                    into.move_in(pid)
            if pids:
                continue
        return


def remove_abandoned() -> list[Cgroup]:
    """Remove the cgroups left behind by our crashed runs; return those removed.

    Processes that were moved into one go back to where they came from.
    """
    return abandoned(remove=True)


def abandoned(*, remove: bool = False) -> list[Cgroup]:
    """Return the empty cgroups left behind by our crashed runs."""
    found = []
    # From the bottom up: what was moved twice goes back twice.
    for cgroup in reversed(list(cgroups.walk())):
        if not _is_abandoned(cgroup):
            continue
        with suppress(OSError):  # gone meanwhile, or removal is not permitted
            moved = os.path.basename(cgroup.path).startswith(MOVED_PREFIX)
            if moved and remove:
                _move_out(cgroup, Cgroup(os.path.dirname(cgroup.path)))
            if moved or not cgroup.populated():
                if remove:
                    cgroup.remove()
                found.append(cgroup)
    return found


def _is_abandoned(cgroup: Cgroup) -> bool:
    """Whether a cgroup is ours, and its creator has ended or given it up."""
    named = _NAME.fullmatch(os.path.basename(cgroup.path))
    if named is None:
        return False
    pid, start_ticks = int(named[1]), int(named[2])
    owner = Identity(pid, int(named[3] or process.FIRST_PID_NAMESPACE), start_ticks)
    if process.same(owner, process.identity()):
        return cgroup.path not in _held
    return process.is_gone(owner)
