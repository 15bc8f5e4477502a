"""Connections that were open before the limit: the kernel adopts them, or user space paces them."""

from __future__ import annotations

import logging
from contextlib import ExitStack, suppress
from typing import Any, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import connections, programs
from pybpfthrottle.backends.ebpf.attach import attach
from pybpfthrottle.backends.ebpf.pacer import Pacer
from pybpfthrottle.backends.ebpf.programs import Role, Shipped
from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.specs import ObjectSpec
from pybpfthrottle.errors import BpfError, CgroupError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.linux.sockets import Borrowed, TcpInfo

log = logging.getLogger(__name__)


class Adoption:
    """While it is entered, each connection that it is called with is shaped, if that can be.

    One program at the setsockopt hook has the kernel adopt it (Linux 6.12). Where the kernel takes
    that program not, or refuses, another one tells whether the connection is of the cgroups, and
    its uploads are paced from user space (Linux 5.10). They are loaded and attached from the first
    connection on. ``unadopted`` counts those whose downloads, at least, are policed.
    """

    def __init__(
        self,
        spec: ObjectSpec,
        maps: Mapping[str, Map[Any, Any]],
        cgroups: Sequence[Cgroup],
        pacer: Pacer,
    ) -> None:
        self._spec = spec
        self._maps = maps
        self._cgroups = cgroups
        self._pacer = pacer
        self._untried = [*programs.with_role(Role.ADOPT), *programs.with_role(Role.BELONGS)]
        self._program: Optional[Shipped] = None
        self._stack = ExitStack()
        self.unadopted = 0

    def __enter__(self) -> Adoption:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, found: Borrowed) -> None:
        """Have a socket shaped, if it is a connection."""
        with suppress(OSError):  # it is none any more
            if found.is_tcp and (info := TcpInfo.of(found.socket)).sends:
                self._shape(found, info.receive_window)

    def _shape(self, found: Borrowed, window: int) -> None:
        while not found.is_local and (self._program or self._attach_next()):
            answer = connections.ask(found.socket, window)
            if answer is None:
                return
            if self._program and self._program.role is Role.BELONGS:
                if answer:
                    self._pacer.take(found)
                    break
                return  # the shaper has it
            if answer:
                return
            self._stack.close()
            self._program = None
        self.unadopted += 1

    def _attach_next(self) -> bool:
        while self._untried:
            program = self._untried.pop(0)
            with ExitStack() as undo:
                try:
                    loaded = undo.enter_context(
                        loader.load(self._spec, [program.name], maps=self._maps)
                    )
                    live = loaded.programs[program.name]
                    for target in self._cgroups:
                        attachment = attach(live, target, program.attach_type)
                        undo.callback(attachment.detach)
                except (BpfError, CgroupError) as error:
                    log.debug("Connections that are open are not for %s: %s", program.name, error)
                    continue
                self._stack = undo.pop_all()
                self._program = program
                return True
        return False
