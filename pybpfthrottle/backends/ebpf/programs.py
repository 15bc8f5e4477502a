"""The shipped programs: one table of what each is for, and the objects that contain them."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from enum import Enum
from functools import cache
from typing import Any, Iterable, Optional, Union

from pybpfthrottle.backends.ebpf import features, privileges
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.obj import stored
from pybpfthrottle.bpf.obj.plain import Data, NamedTuple
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.errors import BpfError, ObjectFileError, ProgramLoadError
from pybpfthrottle.linux.process import PACKAGE_ROOT
from pybpfthrottle.model import Direction

# The prefix of every program's name, in the kernel too.
PREFIX = "pybpft_"
# That of programs that belong to no throttle: several share them.
SHARED_PREFIX = "pybpfs_"


class Role(Enum):
    """What a program does for a throttle."""

    POLICE = "drops packets over the limit"
    SHAPE = "slows TCP down before packets have to be dropped"
    MARK = "marks the new sockets of processes"
    ADOPT = "shapes a connection that was open before"
    BELONGS = "tells whether a connection that was open before belongs to the throttle"
    FOLLOW = "keeps up to date which processes are limited"
    GATE = "hands acknowledgements of downloads to the gate's keeper"
    SHARED = "does the work of programs of several throttles, which only enter it"
    COUNT = "counts the packets of each process"
    IMPAIR = "has a bad network lose packets, and refuse connections"


class Scope(Enum):
    """Whose packets a program handles."""

    ALL = "all packets of a cgroup"
    MARKED = "the packets of marked sockets"


class Needs(NamedTuple):
    """The first Linux release that accepts a program, and the kernel feature it needs."""

    release: str
    feature: str

    def why_refused(self, error: BpfError) -> str:
        """Return what is missing, if that is why the kernel refused programs."""
        if error.errno in (errno.EPERM, errno.ENOSYS, errno.ENOMEM):
            return str(error)
        return f"{self.feature} (Linux {self.release}): {error}"


class Shipped(Data, frozen=True):
    """One program.

    ``hook`` is a cgroup attach type, or the name of a raw tracepoint. ``direction`` is None if the
    program serves both, ``scope`` if it sees no packets, and ``verdict`` (one of EGRESS_VERDICTS)
    if it drops none. A ``multipath`` program recognises the connections of MPTCP sockets, and
    replaces one that does not.
    """

    name: str
    objects: tuple[str, ...]
    hook: Union[AttachType, str]
    role: Role
    needs: Needs
    scope: Optional[Scope] = None
    direction: Optional[Direction] = None
    verdict: Optional[str] = None
    multipath: bool = False

    @property
    def attach_type(self) -> AttachType:
        """The hook of a program that is attached to cgroups. Raises TypeError for any other."""
        if isinstance(self.hook, str):
            raise TypeError(f"{self.name} is attached to the tracepoint {self.hook}")
        return self.hook


_INGRESS, _EGRESS = AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS
_SOCK_OPS, _SETSOCKOPT = AttachType.CGROUP_SOCK_OPS, AttachType.CGROUP_SETSOCKOPT
_SOCK_CREATE = AttachType.CGROUP_INET_SOCK_CREATE
_SOCK_RELEASE = AttachType.CGROUP_INET_SOCK_RELEASE
_CONNECT4, _CONNECT6 = AttachType.CGROUP_INET4_CONNECT, AttachType.CGROUP_INET6_CONNECT

_DOWNLOAD, _UPLOAD = Direction.DOWNLOAD, Direction.UPLOAD
_ALL, _MARKED = Scope.ALL, Scope.MARKED

# Small programs that enter shared ones.
ENTRIES = "throttle-entries"
_CGROUP = ("throttle", "throttle-direct", ENTRIES)
_MARKS = ("throttle-marked", ENTRIES)
_SHARED = ("throttle-shared",)
_BOTH = tuple(dict.fromkeys((*_CGROUP, *_MARKS)))
_PROCESSES = ("processes",)
_TRAFFIC = ("traffic", "traffic-remotes")
_CONDITIONS = ("conditions", "conditions-early")
_CONDITIONS_MARKED = ("conditions-marked",)
_CONDITIONS_CONNECT = ("conditions",)

_POLICE = Role.POLICE
_DENY, _TELL = "deny", "congestion"

_PACKETS = Needs("4.10", "programs for the packets of a cgroup")
_VERDICT = Needs("5.3", "a verdict that tells TCP of congestion")
_CALLBACKS = Needs("5.10", "callbacks for TCP header options")
_STORAGE = Needs("5.10", "socket storage by a packet's socket, and for new sockets")
_MULTIPATH = Needs("5.19", "the MPTCP socket of a packet, by the kernel's types")
_ADOPTING = Needs("6.12", "callbacks for connections that are open (TCP_BPF_SOCK_OPS_CB_FLAGS)")
_ASKING = Needs("5.3", "programs for setsockopt(2)")
_GATE = Needs("5.10", "ring buffers, and the kernel's types (CONFIG_DEBUG_INFO_BTF)")
_CONNECTING = Needs("4.17", "programs for connect(2)")
_TRACING = Needs("5.8", "ring buffers, and the kernel's types (CONFIG_DEBUG_INFO_BTF)")

# In the order in which a throttle's programs are attached: the programs that follow processes
# have to see processes end before they see new ones.
PROGRAMS = (
    Shipped("pybpft_ingress", _CGROUP, _INGRESS, _POLICE, _PACKETS, _ALL, _DOWNLOAD, _DENY),
    Shipped("pybpft_egress", _CGROUP, _EGRESS, _POLICE, _PACKETS, _ALL, _UPLOAD, _DENY),
    Shipped("pybpft_egresscn", _CGROUP, _EGRESS, _POLICE, _VERDICT, _ALL, _UPLOAD, _TELL),
    Shipped("pybpft_sockops", _CGROUP, _SOCK_OPS, Role.SHAPE, _CALLBACKS, _ALL),
    Shipped("pybpft_sockopsp", _CGROUP, _SOCK_OPS, Role.SHAPE, _MULTIPATH, _ALL, multipath=True),
    Shipped("pybpft_mingress", _MARKS, _INGRESS, _POLICE, _STORAGE, _MARKED, _DOWNLOAD, _DENY),
    Shipped("pybpft_megress", _MARKS, _EGRESS, _POLICE, _STORAGE, _MARKED, _UPLOAD, _DENY),
    Shipped("pybpft_megressc", _MARKS, _EGRESS, _POLICE, _STORAGE, _MARKED, _UPLOAD, _TELL),
    Shipped("pybpft_msockops", _MARKS, _SOCK_OPS, Role.SHAPE, _CALLBACKS, _MARKED),
    *(
        Shipped(name, _MARKS, hook, _POLICE, _MULTIPATH, _MARKED, direction, verdict, True)
        for name, hook, direction, verdict in (
            ("pybpft_pingress", _INGRESS, _DOWNLOAD, _DENY),
            ("pybpft_pegress", _EGRESS, _UPLOAD, _DENY),
            ("pybpft_pegressc", _EGRESS, _UPLOAD, _TELL),
        )
    ),
    Shipped("pybpft_psockops", _MARKS, _SOCK_OPS, Role.SHAPE, _MULTIPATH, _MARKED, multipath=True),
    Shipped("pybpft_create", _MARKS, _SOCK_CREATE, Role.MARK, _STORAGE),
    Shipped("pybpft_adopt", _BOTH, _SETSOCKOPT, Role.ADOPT, _ADOPTING),
    Shipped("pybpft_belongs", _BOTH, _SETSOCKOPT, Role.BELONGS, _ASKING),
    Shipped("pybpft_gate", ("gate", ENTRIES), _EGRESS, Role.GATE, _GATE, _ALL),
    Shipped("pybpft_mgate", ("gate", ENTRIES), _EGRESS, Role.GATE, _GATE, _MARKED),
    *(
        Shipped(name, objects, hook, Role.SHARED, needs, multipath=multipath)
        for name, objects, hook, needs, multipath in (
            ("pybpfs_ingress", _SHARED, _INGRESS, _PACKETS, False),
            ("pybpfs_egress", _SHARED, _EGRESS, _PACKETS, False),
            ("pybpfs_egresscn", _SHARED, _EGRESS, _VERDICT, False),
            ("pybpfs_sockops", _SHARED, _SOCK_OPS, _CALLBACKS, False),
            ("pybpfs_sockopsp", _SHARED, _SOCK_OPS, _MULTIPATH, True),
            ("pybpfs_gate", ("gate-shared",), _EGRESS, _GATE, False),
        )
    ),
    *(
        Shipped(name, objects, hook, Role.IMPAIR, needs, scope, direction, verdict)
        for name, objects, hook, needs, scope, direction, verdict in (
            ("pybpft_cin", _CONDITIONS, _INGRESS, _PACKETS, _ALL, _DOWNLOAD, _DENY),
            ("pybpft_cout", _CONDITIONS, _EGRESS, _PACKETS, _ALL, _UPLOAD, _DENY),
            ("pybpft_coutcn", _CONDITIONS, _EGRESS, _VERDICT, _ALL, _UPLOAD, _TELL),
            ("pybpft_ccon4", _CONDITIONS_CONNECT, _CONNECT4, _CONNECTING, _ALL, None, None),
            ("pybpft_ccon6", _CONDITIONS_CONNECT, _CONNECT6, _CONNECTING, _ALL, None, None),
            ("pybpft_cmin", _CONDITIONS_MARKED, _INGRESS, _STORAGE, _MARKED, _DOWNLOAD, _DENY),
            ("pybpft_cmout", _CONDITIONS_MARKED, _EGRESS, _STORAGE, _MARKED, _UPLOAD, _DENY),
            ("pybpft_cmoutcn", _CONDITIONS_MARKED, _EGRESS, _STORAGE, _MARKED, _UPLOAD, _TELL),
            ("pybpft_cmcon4", _CONDITIONS_MARKED, _CONNECT4, _STORAGE, _MARKED, None, None),
            ("pybpft_cmcon6", _CONDITIONS_MARKED, _CONNECT6, _STORAGE, _MARKED, None, None),
        )
    ),
    Shipped("pybpft_owner", _TRAFFIC, _SOCK_CREATE, Role.COUNT, _STORAGE),
    Shipped("pybpft_received", _TRAFFIC, _INGRESS, Role.COUNT, _STORAGE),
    Shipped("pybpft_sent", _TRAFFIC, _EGRESS, Role.COUNT, _STORAGE),
    Shipped("pybpft_closed", _TRAFFIC, _SOCK_RELEASE, Role.COUNT, _STORAGE),
    Shipped("pybpft_came", _TRAFFIC, _SOCK_OPS, Role.COUNT, _STORAGE),
    *(
        Shipped(name, _TRAFFIC, hook, Role.COUNT, _MULTIPATH, multipath=True)
        for name, hook in (
            *(("pybpft_recvp", _INGRESS), ("pybpft_sentp", _EGRESS)),
            ("pybpft_camep", _SOCK_OPS),
        )
    ),
    Shipped("pybpft_exit", _PROCESSES, "sched_process_exit", Role.FOLLOW, _TRACING),
    Shipped("pybpft_fork", _PROCESSES, "sched_process_fork", Role.FOLLOW, _TRACING),
    Shipped("pybpft_expect", _PROCESSES, "sched_process_exec", Role.FOLLOW, _TRACING),
    Shipped("pybpft_exec", _PROCESSES, "sched_process_exec", Role.FOLLOW, _TRACING),
)
_BY_NAME = {program.name: program for program in PROGRAMS}
OBJECTS = tuple(dict.fromkeys(name for program in PROGRAMS for name in program.objects))
# Where a throttle's programs are attached to cgroups.
HOOKS = tuple(
    dict.fromkeys(program.attach_type for program in PROGRAMS if program.role is not Role.FOLLOW)
)


def by_name(name: str) -> Optional[Shipped]:
    """Return the program with this name, or None if none is shipped."""
    return _BY_NAME.get(name)


def of_object(name: str) -> tuple[Shipped, ...]:
    """Return the programs that an object contains."""
    return tuple(program for program in PROGRAMS if name in program.objects)


@cache
def with_role(role: Role, scope: Optional[Scope] = None) -> tuple[Shipped, ...]:
    """Return the programs with a role, for a scope if one is given."""
    return tuple(
        program for program in PROGRAMS if program.role is role and scope in (None, program.scope)
    )


def counters() -> list[Shipped]:
    """Return the programs that count: one for each hook, that which supports MPTCP if it can."""
    return [*{one.hook: one for one in with_role(Role.COUNT) if is_for_this_kernel(one)}.values()]


def policer(scope: Scope, direction: Direction, verdict: str) -> Shipped:
    """Return the program that drops packets; ``verdict`` is one of EGRESS_VERDICTS.

    Raises ProgramLoadError for a verdict that this kernel lacks: even if the kernel accepted the
    program, it would mistake the verdict for another one.
    """
    if direction is Direction.DOWNLOAD:
        verdict = _DENY
    elif verdict == "auto":
        verdict = _TELL if features.CONGESTION_VERDICT.available() else _DENY
    found = _best(
        program
        for program in with_role(Role.POLICE, scope)
        if (program.direction, program.verdict) == (direction, verdict)
    )
    missing = features.CONGESTION_VERDICT.missing() if verdict == _TELL else None
    if missing is not None:
        if isinstance(missing, PermissionError):
            missing = BpfError(privileges.why_refused(missing, "BPF_PROG_LOAD"))
        raise ProgramLoadError(
            f"cannot load {found.name!r}: the egress verdict congestion needs Linux"
            f" {found.needs.release} ({missing}); use --egress-verdict deny or auto",
            errno=getattr(missing, "errno", None) or 0,
        )
    return found


def gate(scope: Scope) -> Shipped:
    """Return the gate of marked sockets, or of whatever is shaped."""
    (found,) = with_role(Role.GATE, scope)
    return found


def shaper(scope: Scope) -> Shipped:
    """Return the program that shapes."""
    return _best(with_role(Role.SHAPE, scope))


def _best(same: Iterable[Shipped]) -> Shipped:
    """Return the one of two programs that supports MPTCP, if this kernel accepts it."""
    by_multipath = {program.multipath: program for program in same}
    if len(by_multipath) > 1 and features.MPTCP_SOCKET.available():
        return by_multipath[True]
    return by_multipath[False]


def is_for_this_kernel(program: Shipped) -> bool:
    """Whether this kernel supports a program, one of several for the same purpose."""
    if program.multipath and not features.MPTCP_SOCKET.available():
        return False
    return program.verdict != _TELL or features.CONGESTION_VERDICT.available()


def object_for(scope: Scope) -> str:
    """Return the name of the object for a scope: the faster one if this kernel accepts it."""
    if scope is Scope.MARKED:
        return "throttle-marked"
    return "throttle-direct" if features.DIRECT_PACKET_ACCESS.available() else "throttle"


@cache
def read(name: str) -> ObjectSpec:
    """Read the object with this name, such as "throttle", for this machine's byte order.

    The result is cached and shared by all callers: do not change it. Raises ObjectFileError.
    """
    return read_anew(name)


def read_anew(name: str) -> ObjectSpec:
    """Read an object as ``read`` does, whether or not it was read before."""
    file_name = f"{name}.{'bpfel' if sys.byteorder == 'little' else 'bpfeb'}"
    found = data(f"{file_name}.o")
    with suppress(ObjectFileError):
        spec = stored.load(data(f"{file_name}.json"), found, name)
        if spec is not None:
            return spec
    from pybpfthrottle.bpf.obj import elf  # with pyelftools, which takes a moment

    return elf.read_object(found, name=name)


def data(file_name: str) -> bytes:
    """Return the bytes of a file of prebuilt/. Raises ObjectFileError if it is not there."""
    # The import system's own loader reads from directories and from zip files.
    loader: Any = __spec__.loader
    # In a wheel prebuilt/ is inside the package, in a checkout beside it.
    for directory in (os.path.join(PACKAGE_ROOT, "pybpfthrottle"), PACKAGE_ROOT):
        try:
            found: bytes = loader.get_data(os.path.join(directory, "prebuilt", file_name))
        except OSError:
            continue
        return found
    raise ObjectFileError(f"prebuilt/{file_name} is missing: this installation is incomplete")
