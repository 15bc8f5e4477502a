"""The owner's side of the diversion's keeper: one keeper process for all diversions of this one."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from contextlib import ExitStack, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.bpf import maps
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.loader import Loadable, Object
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.diversion import tap
from pybpfthrottle.diversion.records import KEEPER, RING, DivertBounds, DivertKeeper, DivertState
from pybpfthrottle.diversion.tally import Tally
from pybpfthrottle.errors import BpfError, Error
from pybpfthrottle.linux import netns
from pybpfthrottle.linux.helper import SharedHelper
from pybpfthrottle.logger import Logger
from pybpfthrottle.supervisor import next_round

if TYPE_CHECKING:
    from pybpfthrottle.conditions.model import Impairment

log = Logger(__name__)

OBJECT = "divert"
_BACK = "pybpfd_back"
# Starting takes a twentieth of a second, on a machine that is busy with other things far longer.
_READY_S, _DRAINED_S = 20.0, 2.0
_UNRETURNED = (
    "packets that were given back did not arrive (a firewall, or a policy of IPsec, drops them)"
)
# How often it is looked for namespaces that are gone.
_FORGET_S = 30.0


class _GoneError(OSError):
    """A network namespace that no process is in any more, as far as can be seen."""


class Kept:
    """A diversion that the keeper serves. ``attach`` attaches its programs anew.

    It impairs packets as ``wanted``; without, it is the queue of the limit in ``slot`` of the maps
    ``limit``, those of its bucket, its rate and its gate.
    """

    def __init__(
        self,
        state: Map[int, DivertState],
        tally: Tally,
        attach: Callable[[], Sequence[Link]],
        *,
        wanted: Optional[Impairment] = None,
        loopback: bool = False,
        limit: Sequence[Map[Any, Any]] = (),
        slot: int = 0,
    ) -> None:
        self.state = state
        self.tally = tally
        self.attach = attach
        self.wanted = wanted
        self.loopback = loopback
        self.limit = limit
        self.slot = slot
        self.is_open = self.is_closing = self.is_closed = False
        self.refused: Optional[str] = None
        # No device can be made for what it took before that was known.
        self.has_no_device = False

    def switch_on(self) -> None:
        """Have its programs take packets: until then they only let them pass, and count nothing."""
        state = self.state[0]
        state.on = 1
        self.state[0] = state

    def told(self) -> Mapping[str, Any]:
        """Return what the keeper is told of it."""
        if self.wanted is not None:
            # Without it the queue of a limit is there sooner.
            from pybpfthrottle.diversion import impairing

            return {"impairment": impairing.to_json(self.wanted)}
        return {"slot": self.slot}


class DiversionKeeper(SharedHelper):
    """The keeper process of this process's diversions.

    As a chore it also gives the keeper a device in each network namespace where packets come in.
    """

    title = "The keeper of delayed packets"
    module = "pybpfthrottle.diversion.keeper"

    def __init__(self) -> None:
        """Make what it shares with the programs. Raises OSError, BpfError or ObjectFileError."""
        self._numbers = 0
        self._kept: dict[int, Kept] = {}
        # By the index in the record that the programs read; 0 is free.
        self._networks = [0] * DivertBounds.DIVERT_NAMESPACES
        self._settings: list[int] = []
        self._back: Optional[Object] = None
        # Whether the keeper reads the ring by now.
        self._reads = False
        self.unserved: dict[int, str] = {}
        spec = programs.read(OBJECT)
        with ExitStack() as undo:
            self.shared = undo.enter_context(maps.create(spec.maps[KEEPER]))
            self.ring = undo.enter_context(maps.create(spec.maps[RING]))
            # What the programs see of it.
            self._seen = DivertKeeper.from_buffer(mmap.mmap(self.shared.fd, mmap.PAGESIZE))
            super().__init__()
            self.due_s = next_round(_FORGET_S)
            self._tell_ring()
            self._closing = undo.pop_all()

    def run(self) -> None:
        """Do what the keeper asks for, replace it if it has died, and forget what is gone."""
        super().run()
        if time.monotonic() >= self.due_s:
            self.due_s = next_round(_FORGET_S)
            with self._busy:
                self._forget_networks()

    def number(self) -> int:
        """Return a number for a new diversion."""
        with self._busy:
            self._numbers += 1
            return self._numbers

    def serve(self, number: int, kept: Kept, networks: Iterable[int]) -> None:
        """Have the keeper serve a diversion, and wait until it does.

        Raises what ``begin`` raises.
        """
        self.begin(number, kept, networks)
        self.wait_until(lambda: kept.is_open, _READY_S)
        if not kept.is_open:
            self.drop(number)
            raise OSError(f"{self.title.lower()} does not start ({self.ended or 'it hangs'})")

    def begin(
        self,
        number: int,
        kept: Kept,
        networks: Iterable[int],
        links: Optional[Sequence[Link]] = None,
    ) -> None:
        """Have the keeper serve a diversion as soon as it can.

        ``networks`` are the namespaces where it is sure to be needed. ``links`` are those of a
        queue, whose programs are attached but take nothing yet. While the keeper starts, the
        packets of the first queue wait for it; others pass. Raises AttachError, CgroupError or
        OSError.
        """
        networks = list(networks)
        with self._busy:
            is_early = links is not None and not self._reads and not self._served()
            if is_early:
                self._take_early(kept, networks)
            else:
                self.start()
                self._serve_networks(networks)
            self._kept[number] = kept
            try:
                if kept.loopback:
                    self._let_loopback_in()
                self._open(number, kept, kept.attach() if links is None else links)
                if links is not None and not is_early:
                    # The keeper knows of it before it reads the first packet.
                    kept.switch_on()
            except BaseException:
                del self._kept[number]
                raise

    def change(self, number: int, wanted: Impairment, *, anew: bool = True) -> None:
        """Have what comes from now on impaired in another way."""
        with self._busy:
            kept = self._kept[number]
            kept.wanted = wanted
            self.tell({"change": number, **kept.told(), "anew": anew})

    def drop(self, number: int) -> None:
        """Have the keeper give back what it holds for a diversion, and forget it."""
        kept = self._kept[number]
        with self._busy:
            kept.is_closing = True
            self.tell({"close": number})
        self.wait_until(lambda: kept.is_closed, _DRAINED_S)
        with self._busy:
            del self._kept[number]
            if self._settings and not any(each.loopback for each in self._kept.values()):
                self._restore()

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "unserved" in message:
            self._serve_network(message["unserved"])
        if "broken" in message:
            self._forget_network(message["broken"])
            self._serve_network(message["broken"])
            log.warning("Somebody has removed our device for delayed packets; there is a new one")
        if message.get("unreturned") in self._kept:
            self._kept[message["unreturned"]].refused = _UNRETURNED
        self._reads = self._reads or "opened" in message
        for state in ("opened", "closed"):
            kept = self._kept.get(message.get(state, 0))
            if kept is not None:
                kept.is_open, kept.is_closed = state == "opened", state == "closed"

    def _introduce(self) -> None:
        networks = self._served()
        self._networks = [0] * len(self._networks)
        self._tell_ring()
        self._serve_networks(networks)
        if self._settings:
            tap.change(self._settings)
            self.tell({"settings": True}, self._settings)
        for number, kept in self._kept.items():
            if kept.is_closing:
                continue
            try:
                self._open(number, kept, kept.attach())
            except (Error, OSError) as error:
                kept.refused = str(error)
                log.warning("Packets are delayed no longer: %s", error)

    def _abandon(self) -> None:
        ctypes.memset(ctypes.addressof(self._seen), 0, ctypes.sizeof(self._seen))

    def _close(self) -> None:
        self._restore()
        self._closing.close()
        # It is in a cycle, and would keep the map until the garbage is collected.
        del self._seen

    def _open(self, number: int, kept: Kept, links: Sequence[Link]) -> None:
        with ExitStack() as closing:
            # The keeper alone has them: when it ends, however, nothing is diverted any more.
            for link in links:
                closing.enter_context(link)
            maps = [one.fd for one in kept.limit]
            fds = [kept.state.fd, kept.tally.fd, *maps, *(link.fd for link in links)]
            self.tell({"open": number, **kept.told()}, fds)

    def _take_early(self, kept: Kept, networks: Sequence[int]) -> None:
        """Have packets wait in the ring from now on, and only then do what takes long.

        That is the keeper's start, and the device by which they come back. The keeper does not read
        the ring before it knows of the first diversion. What was taken is lost if there can be no
        device.
        """
        wanted = [inode for inode in networks if inode not in self.unserved]
        for index, inode in enumerate(wanted[: len(self._networks)]):
            self._seen.namespaces[index] = inode
            self._seen.alive = 1
        kept.switch_on()
        try:
            self.start()
            self._serve_networks(networks)
        finally:
            self._seen.namespaces[:] = self._networks
        kept.has_no_device = not self._served()

    def _serve_networks(self, networks: Iterable[int]) -> None:
        for inode in networks:
            self._serve_network(inode)

    def _serve_network(self, inode: int) -> None:
        """Give the keeper a device in a network namespace, unless it has one."""
        if inode in self._networks or inode in self.unserved:
            return
        if 0 not in self._networks:
            self.unserved[inode] = f"{len(self._networks)} network namespaces are served already"
            return
        try:
            made = self._inside(inode, lambda: tap.create(self.program_of_device()))
        except (BpfError, OSError) as error:
            self.unserved[inode] = f"no device can be made in its network namespace: {error}"
            log.warning("Packets pass undelayed: %s", self.unserved[inode])
            return
        index = self._networks.index(0)
        self._networks[index] = inode
        message = {"network": inode, "index": index, "udp": made.has_udp}
        self.tell(message, made.fds())
        made.close()
        if any(kept.loopback for kept in self._kept.values()):
            self._let_loopback_in()

    def program_of_device(self) -> Program:
        """Return the program by which packets come back, loaded once. Raises BpfError."""
        if self._back is None:
            self._back = self._closing.enter_context(program_of_device().load())
        return self._back.programs[_BACK]

    def _served(self) -> list[int]:
        return [inode for inode in self._networks if inode]

    def _forget_networks(self) -> None:
        """Give up namespaces that nobody can be in any more: the keeper's device keeps them alive.

        What could not be served may be served by now.
        """
        self.unserved.clear()
        for inode in self._served():
            if not netns.exists(inode):
                self._forget_network(inode)

    def _forget_network(self, inode: int) -> None:
        if inode in self._networks:
            index = self._networks.index(inode)
            self._networks[index] = 0
            self.tell({"forget": inode, "index": index})

    def _let_loopback_in(self) -> None:
        for inode in self._served():
            with suppress(_GoneError):
                self._settings += self._inside(inode, tap.let_loopback_in)
        # The keeper restores them if this process cannot.
        self.tell({"settings": True}, self._settings)

    def _restore(self) -> None:
        settings, self._settings = self._settings, []
        tap.restore(settings)
        if self.ended is None:
            self.tell({"settings": False})

    def _inside(self, inode: int, work: Callable[[], Any]) -> Any:
        namespace = netns.open_by_number(inode)
        if namespace is None:
            raise _GoneError("it is gone, or cannot be seen from here")
        try:
            return netns.inside(namespace, work)
        finally:
            os.close(namespace)

    def _tell_ring(self) -> None:
        size = self.ring.info().max_entries
        self.tell({"ring": size}, [self.shared.fd, self.ring.fd])


@cache
def program_of_device() -> Loadable:
    """Return the program of our devices, fitted to this kernel once."""
    return Loadable(programs.read(OBJECT), [_BACK])


def networks_of(pids: Iterable[int]) -> list[int]:
    """Return the network namespaces of processes; this process's own if there are none."""
    found = set()
    for pid in pids:
        with suppress(OSError):  # it has ended, or may not be looked into
            found.add(netns.number(pid))
    return sorted(found) or [netns.number()]
