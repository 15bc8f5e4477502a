"""Runs tc and ip of iproute2 in one network namespace; their answers are JSON."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.backends.commands import Commands
from pybpfthrottle.errors import BackendError
from pybpfthrottle.linux import netns
from pybpfthrottle.linux.netns import Place
from pybpfthrottle.logger import Logger

log = Logger(__name__)

_PACKAGE = "iproute2"
_IFB = "ifb"

# What tc -j and ip -j print: an object for each thing.
Listing = Sequence[Mapping[str, Any]]


class Iproute(Commands):
    """Runs tc and ip in one network namespace. ``close`` or ``with`` releases that.

    All methods raise BackendError.
    """

    def change(self, lines: Iterable[str]) -> None:
        """Carry out commands of tc one after the other, up to the first that fails."""
        text = "".join(f"{line}\n" for line in lines)
        if text:
            log.debug("tc in network namespace %d:\n%s", self.namespace, text.rstrip())
            self.run(["tc", "-batch", "-"], package=_PACKAGE, text=text)

    def qdiscs(self) -> Listing:
        """Return the queueing disciplines of all devices, with their statistics."""
        found: Listing = self.ask(["tc", "-j", "-s", "qdisc", "show"], package=_PACKAGE)
        return found

    def filters(self, device: str, hook: str = "ingress") -> Listing:
        """Return the filters at a device's ``ingress`` or ``egress`` hook, with statistics."""
        command = ["tc", "-j", "-s", "filter", "show", "dev", device, hook]
        found: Listing = self.ask(command, package=_PACKAGE)
        return found

    def links(self) -> dict[str, Optional[str]]:
        """Return the kind of each device by its name; None for hardware and the loopback device."""
        found = self.ask(["ip", "-j", "-d", "link", "show"], package=_PACKAGE)
        return {one["ifname"]: one.get("linkinfo", {}).get("info_kind") for one in found if one}

    def routes(self) -> list[Listing]:
        """Return the default routes of IPv4 and IPv6; the main tables if there are none."""
        families = ["-4", "-6"] if os.path.exists("/proc/net/if_inet6") else ["-4"]
        for which in ("default", "table main"):
            command = ["route", "show", *which.split()]
            found = [self.ask(["ip", "-j", one, *command], package=_PACKAGE) for one in families]
            if any(found):
                return found
        return []

    def add_ifb(self, name: str) -> None:
        """Create an IFB device, and set it up."""
        if not os.path.isdir(f"/sys/module/{_IFB}"):
            # Loaded by the kernel itself, the module would begin with two devices of its own.
            with suppress(BackendError):
                self.run(["modprobe", _IFB, "numifbs=0"], package="kmod")
        self._ip(f"link add {name} type {_IFB}")
        # Its address would be a route, and would send packets. The kernel sets a device up before
        # it looks at anything else in the same request.
        self._ip(f"link set {name} addrgenmode none")
        self._ip(f"link set {name} up")

    def delete_ifb(self, name: str) -> None:
        """Delete an IFB device if it is there; a device of another kind is left alone."""
        if self.links().get(name) == _IFB:
            self._ip(f"link delete {name} type {_IFB}")

    def __enter__(self) -> Iproute:
        return self

    def _ip(self, arguments: str) -> None:
        log.debug("ip %s", arguments)
        self.run(["ip", *arguments.split()], package=_PACKAGE)


class Scratch(Iproute):
    """A network namespace of its own, for trials, that lasts as long as the commands run in it."""

    def __init__(self) -> None:
        """Raises BackendError."""
        try:
            fd = netns.new()
        except OSError as error:
            raise BackendError(f"cannot make a network namespace: {error.strerror}") from error
        super().__init__()
        self._fd = fd
        self._resources.callback(os.close, fd)
        self.place = Place(os.fstat(fd).st_ino)

    def __enter__(self) -> Scratch:
        return self


def devices(routes: Sequence[Listing]) -> list[str]:
    """Return the devices that packets leave and come by: those of the best default routes.

    Without any default route they are the devices of all routes.
    """
    found: dict[str, None] = {}
    for family in routes:
        defaults = [one for one in family if one.get("dst") == "default"]
        best = min((int(one.get("metric", 0)) for one in defaults), default=0)
        for one in [one for one in defaults if int(one.get("metric", 0)) == best] or family:
            for hop in [one, *one.get("nexthops", ())]:
                # What is unreachable has the loopback device.
                if hop.get("dev", "lo") != "lo":
                    found[str(hop["dev"])] = None
    return list(found)
