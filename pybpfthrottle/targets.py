"""Resolve a target to processes and cgroups, and check which may be limited."""

from __future__ import annotations

import os
import pwd
import time
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Iterable, Iterator, Optional, Sequence

from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import CgroupError, ProcessError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import process, systemd, tables
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.process import Process
from pybpfthrottle.model import Target

if TYPE_CHECKING:
    from pybpfthrottle.linux import login
    from pybpfthrottle.linux.executable import Executable

# A tmux session may be attached from another login meanwhile. A check takes milliseconds.
_LOGIN_LASTS_S = 10.0
_FIRST = 1  # the init system
_COMM_BYTES = 15  # the kernel keeps this many bytes of a process's name


class Selection(NamedTuple):
    """Processes by id, and all that match, now or later.

    A process matches if it has one of the names, one of the executables and one of the users, for
    each kind given. With ``children`` all children of a chosen process, present and future, are
    chosen too, even if it ends. Processes that hold this session are chosen only by id.
    ``new_sockets`` is False if sockets created from now on are limited by other means. ``rule``
    names the rule that takes processes in, and lets them go.
    """

    processes: tuple[Process, ...] = ()
    names: frozenset[str] = frozenset()
    executables: frozenset[Executable] = frozenset()
    users: frozenset[int] = frozenset()
    children: bool = True
    new_sockets: bool = True
    rule: str = ""

    @property
    def matches_some(self) -> bool:
        """Whether it selects more than ids, so that later processes may match."""
        return bool(self.names or self.executables or self.users)

    @property
    def certain_names(self) -> frozenset[str]:
        """Names that make a process match by themselves, as the kernel keeps them."""
        if self.executables or self.users:
            return frozenset()
        return frozenset(name for name in self.names if as_kept(name) == name)

    @property
    def waits(self) -> bool:
        """Whether later processes may come."""
        return self.matches_some or bool(self.rule)

    def matching(self) -> Iterator[int]:
        """Yield the processes that match now, except this session's."""
        if self.matches_some:
            session = _own_login(int(time.monotonic() / _LOGIN_LASTS_S))
            yield from (
                pid for pid in process.running() if pid not in session and self.matches(pid)
            )

    def matches(self, pid: int) -> bool:
        """Whether a running process matches."""
        return (
            (not self.names or has_name(pid, self.names))
            and (not self.executables or any(one.runs_in(pid) for one in self.executables))
            and (not self.users or effective_user(pid) in self.users)
            and not process.is_kernel_thread(pid)
            and not process.has_ended(pid)
        )

    def __str__(self) -> str:
        """Return e.g. ``process 12 (curl)`` or ``all processes named 'curl' of user 1000``."""
        if self.rule:
            return f"the processes of rule {self.rule}"
        parts = []
        if self.processes:
            pids = [chosen.pid for chosen in self.processes]
            parts.append(f"process{'es' * (len(pids) > 1)} {process.listed(pids)}")
        if self.matches_some:
            words = ["all processes"]
            if self.names:
                words.append(f"named {_any_of(self.names)}")
            if self.executables:
                words.append(f"running {_any_of(map(str, self.executables))}")
            if self.users:
                words.append(f"of {_any_of({user_name(uid) for uid in self.users})}")
            parts.append(" ".join(words))
        they = "they start" if len(self.processes) > 1 or self.matches_some else "it starts"
        return " and ".join(parts) + (f", and what {they}" if self.children else "")


@lru_cache(maxsize=1)
def _own_login(period: int) -> frozenset[int]:
    """Return the processes of the login session in use, cached for one ``period``."""
    from pybpfthrottle.linux import login  # what asks about sockets, which not all commands do

    return frozenset(login.processes())


@lru_cache(maxsize=1)
def _login_at(second: int, pid: int) -> tuple[Sequence[int], Sequence[login.Carrier]]:
    """Return this session's processes and sockets: once a second, as to look takes milliseconds."""
    from pybpfthrottle.linux import login

    pids = login.processes()
    return pids, login.carriers(pids)


def user_id(text: str) -> int:
    """Return the id of a user, given by name or number. Raises ProcessError."""
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ProcessError(f"there is no user {text!r}") from None


def user_name(uid: int) -> str:
    """Return the name of a user, or the id if there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _any_of(words: Iterable[str]) -> str:
    return " or ".join(sorted(words))


def as_kept(name: str) -> str:
    """Return a process's name as the kernel keeps it."""
    return os.fsencode(name)[:_COMM_BYTES].decode(errors="replace")


def has_name(pid: int, names: frozenset[str], short: Optional[str] = None) -> bool:
    """Match as ``pgrep -x``; names longer than the kernel keeps are sought in the command line.

    ``short`` is the name that the kernel keeps, if it is known.
    """
    short = process.name_of(pid) if short is None else short
    if short in names:
        return True
    long = [name for name in names if len(name.encode()) > _COMM_BYTES]
    if not any(os.fsencode(name)[:_COMM_BYTES] == os.fsencode(short) for name in long):
        return False
    with suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        first = os.fsdecode(file.read().split(b"\0")[0])
        return os.path.basename(first) in long
    return False


def effective_user(pid: int) -> int:
    """Return the effective user of a process; -1 if it is gone."""
    with suppress(OSError):
        for line in tables.lines(f"/proc/{pid}/status"):
            if line.startswith("Uid:"):
                return int(line.split()[2])
    return -1


def select(target: Target) -> Selection:
    """Return the processes of a target. Raises ProcessError for what does not exist."""
    if not all(target.names):
        raise ProcessError("the process name is empty")
    return Selection(
        tuple(Process(pid) for pid in dict.fromkeys(target.pids)),
        frozenset(target.names),
        _executables(target.executables),
        frozenset(map(user_id, target.users)),
        children=target.children,
        rule=target.rule if target.by_rule else "",
    )


def _executables(paths: Iterable[str]) -> frozenset[Executable]:
    if not paths:
        return frozenset()
    from pybpfthrottle.linux.executable import Executable

    return frozenset(map(Executable, paths))


def target_of(selection: Optional[Selection], chosen: Sequence[Cgroup] = ()) -> Target:
    """Return the target for a selection, or else for cgroups."""
    if selection is None:
        return Target(cgroups=tuple(cgroup.path for cgroup in chosen))
    return Target(
        pids=tuple(one.pid for one in selection.processes),
        names=tuple(sorted(selection.names)),
        executables=tuple(sorted(map(str, selection.executables))),
        users=tuple(sorted(map(user_name, selection.users))),
        children=selection.children,
    )


def given_cgroups(target: Target, *, insist: bool) -> list[Cgroup]:
    """Return the cgroups and units of a target; ``insist`` allows those of this session.

    Raises CgroupError, or ProcessError for one that may not be limited.
    """
    chosen = [cgroups.from_path(path) for path in target.cgroups]
    chosen += [cgroups.from_unit(name) for name in target.units]
    chosen = list(dict.fromkeys(chosen))
    _refuse_nested(chosen)
    if not insist:
        _refuse_own_session(chosen, "add --whole-cgroup")
    return chosen


def with_sockets(target: Target) -> Target:
    """Return a target with the socket units that start its services, as far as they are active.

    In the cgroup of such a unit systemd creates the sockets that it hands over. They remain there,
    with all connections that they accept.
    """
    units = list(target.units)
    for service in target.units:
        for name in systemd.sockets_of(cgroups.unit_name(service)):
            with suppress(CgroupError):  # it is not active, or systemd has no cgroup for it
                cgroups.from_unit(name)
                units.append(name)
    return target.changed(units=tuple(dict.fromkeys(units)))


def whole_cgroups(selection: Selection) -> list[Cgroup]:
    """Return the cgroups that processes are in, to be limited as a whole.

    Raises CgroupError, or ProcessError for one that may not be limited.
    """
    chosen = own_cgroups(selection)
    _refuse_nested(chosen)
    for cgroup in chosen:
        if cgroup.is_root():
            raise ProcessError(
                f"{cgroup.path} is the root cgroup, which holds everything outside other cgroups:"
                " omit --whole-cgroup to limit only the process"
            )
    _refuse_own_session(chosen, "give --cgroup {path} --whole-cgroup")
    return chosen


def own_cgroups(selection: Selection) -> list[Cgroup]:
    """Return the cgroups that processes are in. Raises CgroupError or ProcessError."""
    return list(dict.fromkeys(cgroups.from_pid(one.pid) for one in selection.processes))


def share_cgroups(selection: Selection) -> bool:
    """Whether others are in the cgroups of processes too, or may come, since one is the root."""
    own = {one.pid for one in selection.processes}
    try:
        return any(
            cgroup.is_root()
            or any(
                pid not in own and not process.is_kernel_thread(pid) for pid in cgroup.pids_below()
            )
            for cgroup in own_cgroups(selection)
        )
    except (CgroupError, OSError):  # the cgroup is not visible here, or is gone
        return True


def reaches_far(selection: Selection, *, moved: bool) -> str:
    """Return that all processes, or what carries this session, are limited; empty otherwise.

    ``moved``: those in other cgroups than the chosen ones are not.
    """
    chosen = {one.pid for one in selection.processes}
    if _FIRST in chosen and selection.children:
        which = "all processes in its cgroup" if moved else "all processes"
        alone = "" if moved else "; to limit it alone, add --no-children"
        return (
            f"process {process.listed([_FIRST])} has started all others, directly or not: {which}"
            f" are limited, this session's too{alone}"
        )
    if chosen.isdisjoint(process.own_session()):
        return ""
    _, carriers = _login_at(int(time.monotonic()), os.getpid())
    for carrier in carriers:
        covered = process.ancestors(carrier.pid) if selection.children else [carrier.pid]
        if carrier.is_open and not chosen.isdisjoint(covered):
            return (
                f"process {process.listed([carrier.pid])} has this session's connection: the limit"
                " slows down your own remote login"
            )
    return ""


def _refuse_nested(chosen: Sequence[Cgroup]) -> None:
    for one in chosen:
        for other in chosen:
            if one is not other and other in one:
                raise CgroupError(
                    f"{other.path} is inside {one.path}: its packets would be charged twice"
                )


def _refuse_own_session(chosen: Sequence[Cgroup], insist: str) -> None:
    """Refuse cgroups whose limit could cut off the user's own connection by accident.

    A socket belongs to the cgroup that it was made in: the connection of a login is sshd's, even if
    the session has left it, and the processes that serve it were moved elsewhere. ``insist`` says
    how to have it all the same, for a ``{path}``.
    """
    pids, carriers = _login_at(int(time.monotonic()), os.getpid())
    for pid in pids:
        try:
            where = cgroups.from_pid(pid)
        except (ProcessError, CgroupError):
            continue
        for cgroup in chosen:
            if where in cgroup:
                raise ProcessError(
                    f"{cgroup.path} holds this session too (process"
                    f" {process.listed([pid])}): the limit would slow down your own terminal or"
                    f" remote login. If you want that, {insist.format(path=cgroup.path)}"
                )
    for cgroup in chosen if carriers else ():
        below = cgroup.ids_below()
        for carrier in carriers:
            if carrier.cgroup_id in below:
                raise ProcessError(
                    f"{cgroup.path} has a connection of this session (of process"
                    f" {process.listed([carrier.pid])}): the limit would slow down your own remote"
                    f" login. If you want that, {insist.format(path=cgroup.path)}"
                )
