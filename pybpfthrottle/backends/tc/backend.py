"""The backends by traffic control, which differ in what they put in force."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property
from typing import ClassVar, Iterator, Optional, Sequence

from pybpfthrottle.backends.nft import Member, Nft, members
from pybpfthrottle.backends.protocol import (
    Match,
    Offer,
    Order,
    Part,
    Priority,
    Ready,
    Record,
)
from pybpfthrottle.backends.recorded import RecordedBackend, order_of
from pybpfthrottle.backends.tc import htb, ifb, police, shaper
from pybpfthrottle.backends.tc.iproute import Scratch
from pybpfthrottle.backends.tc.sockets import limited_processes
from pybpfthrottle.errors import BackendError, CgroupError
from pybpfthrottle.linux import cgroup
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Direction, Rate

log = Logger(__name__)

_RATE = Rate(1_000_000)
_TRIAL = "pybpf-trial"
_FILTER = "filter add dev lo ingress pref 1 protocol ip u32"


class TcBackend(RecordedBackend):
    """One of the backends. Linux 4.5, and what each needs beside that."""

    priority: ClassVar[Priority] = Priority.GOOD
    directions: ClassVar[tuple[Direction, ...]]
    matches: ClassVar[tuple[Match, ...]] = (Match.CGROUP,)
    loses: ClassVar[tuple[str, ...]]
    counted_nothing = "No packets in the counters of tc (is this how they are routed?)"

    @property
    def title(self) -> str:
        """Its name for people."""
        return self.name

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Return why it cannot limit this direction here, or None."""
        if direction not in self.directions:
            return f"it limits {self.directions[0]}s only"
        return self._refused

    def offer(self, direction: Direction, match: Match) -> Offer:
        """Return what it can do for a direction and a way of matching."""
        refused = self.unavailable(direction)
        if match not in self.matches:
            refused = self._only_cgroups
        return Offer(self.name, self.priority, direction, match, refused, self.loses)

    @property
    def _only_cgroups(self) -> str:
        return f"{self.name} tells cgroups apart, and not single sockets"

    @cached_property
    def _refused(self) -> Optional[str]:
        """Why it cannot limit here.

        It is tried in a network namespace that ends with the trial: nothing can stay.
        """
        try:
            with Scratch() as ip:
                # Without rights or commands nothing is learned about the kernel.
                ip.links()
                ip.qdiscs()
                self._try(ip)
        except (BackendError, CgroupError, OSError) as error:
            return str(error)
        return None

    def _try(self, ip: Scratch) -> None:
        """Do what a throttle does. Raises BackendError, CgroupError or OSError."""
        raise NotImplementedError

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Put limits in force, and record them. Raises BackendError; then all is undone."""
        if order.processes is not None and Match.MARKS not in self.matches:
            raise BackendError(self._only_cgroups)
        return self.put_in_force(order, throttle_id)

    def make_ready(self, order: Order) -> Ready:
        """Return what will put the limits in force: there is nothing to prepare."""
        if Match.MARKS not in self.matches:
            raise BackendError(self._only_cgroups)
        return _Later(self)

    def processes(self, record: Record) -> list[int]:
        """Return the processes whose sockets it limits; none if cgroups are limited."""
        return limited_processes(order_of(record))


class _Later:
    """Limits for a process that comes later."""

    def __init__(self, backend: TcBackend) -> None:
        self._backend = backend

    def apply(self, order: Order, throttle_id: str) -> Part:
        """Put the limits of the order in force. Raises BackendError; then all is undone."""
        return self._backend.apply(order, throttle_id)

    def remove(self) -> None:
        """Do nothing: nothing was made."""


class HtbBackend(TcBackend):
    """Uploads of cgroups, by HTB on devices. Linux 5.13 with nft, for matching cgroups."""

    name = htb.NAME
    directions = (Direction.UPLOAD,)
    kind = htb.KIND
    loses = (
        "headers and acknowledgements count too",
        "connections opened before a process entered its cgroup are not limited",
        "only the devices of the default routes are limited",
    )

    def _try(self, ip: Scratch) -> None:
        _try_htb(ip)
        top = cgroup.root()
        cgroup.depth(top)
        with Nft() as nft, members([top], root_level=1) as matched:
            nft.check(_classify([]))
            try:
                nft.check(_classify(matched))
            except BackendError as error:
                raise BackendError(
                    f"this kernel or nft cannot match cgroups (Linux 5.13): {error}"
                ) from error


def _classify(matched: Sequence[Member]) -> str:
    lines = htb.commands("trial", ["lo"], matched, 1)
    return "".join(f"{line}\n" for line in lines)


class IfbBackend(TcBackend):
    """Downloads of sockets, by HTB on an IFB device. Linux 5.8, which tells sockets' cgroups."""

    name = ifb.NAME
    directions = (Direction.DOWNLOAD,)
    kind = ifb.KIND
    matches = (Match.CGROUP, Match.MARKS)
    loses = (
        "a new connection is limited within 0.05 s, after 5 quiet seconds within 0.25 s",
        "only TCP and UDP are limited, by address and port",
        "headers and acknowledgements count too",
        "only the devices of the default routes are limited",
    )

    def _try(self, ip: Scratch) -> None:
        _try_htb(ip)
        _try_ingress(ip)
        with _needed("CONFIG_IFB"):
            ip.add_ifb(_TRIAL)
        with _needed("CONFIG_NET_ACT_MIRRED"):
            ip.change([f"{_FILTER} {police.ALL} action mirred egress redirect dev {_TRIAL}"])


class PoliceBackend(TcBackend):
    """All downloads of a device, by a policer."""

    name = police.NAME
    priority = Priority.FALLBACK
    directions = (Direction.DOWNLOAD,)
    kind = police.KIND
    matches = (Match.CGROUP, Match.MARKS)
    loses = (
        "ALL downloads by the devices of the default routes are limited, whoever they are for",
        "packets over the limit are dropped, not delayed, so more is retransmitted",
        "headers and acknowledgements count too",
    )

    def _try(self, ip: Scratch) -> None:
        _try_ingress(ip)
        with _needed("CONFIG_NET_ACT_POLICE"):
            ip.change([f"{_FILTER} {police.ALL} action {police.police(_RATE)}"])


@contextmanager
def _needed(option: str) -> Iterator[None]:
    """Have an error say which option of the kernel is needed."""
    try:
        yield
    except BackendError as error:
        raise BackendError(f"this kernel lacks {option}: {error}") from error


def _try_htb(ip: Scratch) -> None:
    with _needed("CONFIG_NET_SCH_HTB"):
        ip.change([shaper.root("lo"), *shaper.shape("lo", 1, _RATE)])


def _try_ingress(ip: Scratch) -> None:
    with _needed("CONFIG_NET_SCH_INGRESS"):
        ip.change(["qdisc add dev lo clsact"])
    with _needed("CONFIG_NET_CLS_U32"):
        ip.change([f"{_FILTER} {police.ALL}"])
