"""The backend: the token bucket in the kernel, at the cgroup's ingress and egress hooks."""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from typing import Optional

from pybpfthrottle.backends import Limits, Options, Priority, Targets
from pybpfthrottle.backends.ebpf import features, privileges
from pybpfthrottle.backends.ebpf.kinds import ALL, MARKED, MARKER, Kind, read_object
from pybpfthrottle.backends.ebpf.shaping import choose as shaping_for
from pybpfthrottle.backends.ebpf.throttle import EbpfHandle
from pybpfthrottle.bpf import loader
from pybpfthrottle.errors import (
    BpfError,
    CgroupError,
    Error,
    NoMarksError,
    ThrottleError,
)
from pybpfthrottle.linux import cgroup
from pybpfthrottle.model import Direction

log = logging.getLogger(__name__)


class EbpfBackend:
    """Linux 4.10 with cgroup v2; nothing outside of the cgroup is touched."""

    name = "ebpf"
    priority = Priority.BEST

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Why it cannot limit this direction here, or None."""
        try:
            cgroup.mount()
        except CgroupError as error:
            return str(error)
        refused = features.CGROUP_SKB.missing()
        if refused is None:
            return None
        if isinstance(refused, OSError) and refused.errno in (errno.EPERM, errno.ENOSYS):
            return privileges.why_refused(refused, "BPF_PROG_LOAD")
        return f"this kernel does not take cgroup_skb programs (CONFIG_CGROUP_BPF): {refused}"

    def prepare(self) -> None:
        """Read the object ahead; what is wrong with it is told when it is applied."""
        with suppress(Error):
            read_object()

    def apply(self, targets: Targets, limits: Limits, options: Options) -> EbpfHandle:
        """Load once, and attach to each target.

        Raises BpfError, CgroupError, ProcessError or ThrottleError; then all is undone.
        """
        kinds = [ALL] if targets.cgroups else []
        kinds += [MARKED] if targets.processes is not None else []
        handle: Optional[EbpfHandle] = None
        try:
            for kind in kinds:
                try:
                    handle = _load(kind, targets, limits, options, handle)
                except BpfError as error:
                    if kind is MARKED:
                        raise NoMarksError(
                            f"the kernel takes no marks on sockets: {error}"
                        ) from error
                    raise
            if handle is None:
                raise ThrottleError("no target was given")
            # First: it may be needed as soon as something is shaped, and is to be forked before
            # there is a thread.
            if options.guard:
                handle.guard()
            if targets.cgroups:
                handle.limit_cgroups(targets.cgroups)
            if targets.processes is not None:
                handle.limit_processes(targets.processes)
            handle.follow()
        except BaseException:
            if handle is not None:
                handle.remove()
            raise
        return handle


def _load(
    kind: Kind,
    targets: Targets,
    limits: Limits,
    options: Options,
    handle: Optional[EbpfHandle],
) -> EbpfHandle:
    """The programs of a kind, with the shaper if it is wanted and this kernel takes it.

    They share the maps of what ``handle`` has already.
    """
    programs = {kind.policer(direction, options.egress_verdict): direction for direction in limits}
    wanted = any(
        shaping_for(direction, rate, options.shape.get(direction, "auto")).flags
        for direction, rate in limits.items()
    )
    names = [*programs, *([MARKER] if kind is MARKED else [])]
    spec = kind.read()
    refused = None
    for more in ([*names, kind.shaper], names) if wanted else (names,):
        try:
            loaded = loader.load(spec, more, maps=handle.maps if handle else {})
            break
        except BpfError as error:
            if more is names:
                raise
            refused = str(error)
            log.debug("This kernel does not take %s: %s", ", ".join(more), error)
    for name, direction in programs.items():
        log.debug(
            "Program '%s' loaded with expected_attach_type: Some(%s)",
            name,
            "Ingress" if direction is Direction.DOWNLOAD else "Egress",
        )
    if handle is None:
        handle = EbpfHandle(loaded, targets, limits, options, object_name=spec.name)
    else:
        handle.add(loaded)
    handle.begin(refused if wanted and kind.shaper not in loaded.programs else None)
    return handle
