"""The way out of a network namespace of ours: addresses, NAT and forwarding in this one.

What is changed here is recorded in a file first, and restored at the end; after ``kill -9`` by the
line's keeper, or at the next start. NAT is a table of nftables (Linux 5.2), one for each way out.
"""

from __future__ import annotations

import glob
import json
import os
from contextlib import contextmanager, suppress
from ipaddress import IPv4Interface, IPv6Interface, ip_network
from typing import Any, Collection, Iterator, Mapping, Optional, Sequence, Union

from pybpfthrottle.backends.nft import FAMILY, Nft, of, table_name
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.errors import BackendError, NamespaceError
from pybpfthrottle.linux import cgroup, netns, process, run_files
from pybpfthrottle.linux.netns import Place
from pybpfthrottle.linux.process import Identity

# Of the devices by which namespaces of ours are reached.
DEVICES = "pybpfn"
# Of RFC 2544, for measurements between networks: nobody should have them in use.
_POOL = ip_network("198.19.0.0/16")
_PREFIX, _PREFIX6 = 30, 64
_SYS = "/proc/sys/"
_V4, _V6 = "/proc/sys/net/ipv4/conf", "/proc/sys/net/ipv6/conf"
_ALL4, _ALL6 = f"{_V4}/all/forwarding", f"{_V6}/all/forwarding"
_DEFAULT6 = f"{_V6}/default/forwarding"
_ROUTES, _ROUTES6 = "/proc/thread-self/net/route", "/proc/thread-self/net/ipv6_route"
_RTF_ADDRCONF = 0x00040000  # include/uapi/linux/ipv6_route.h: by router advertisements
# All but answers, in the language of nft.
_UNASKED = "ct state new,invalid,untracked"

Interface = Union[IPv4Interface, IPv6Interface]


class Ends(NamedTuple):
    """The addresses of one kind: in the namespace of ours, and of the device that leads to it."""

    inner: Interface
    outer: Interface


class WayOut(NamedTuple):
    """What a file says: who needs it, and what was changed in which network namespace.

    ``networks`` are those of the namespaces of ours, by CIDR. ``settings`` are paths in /proc/sys,
    each with its content before, in the order in which they are restored. ``forwarding`` was that
    of IPv4 as a whole, which is not changed, and ``forwarding6`` that of new devices for IPv6, once
    it is again as it was: where they are otherwise, somebody else has switched forwarding on.
    """

    id: str
    owner: Identity
    namespace: int
    networks: tuple[str, ...]
    settings: tuple[tuple[str, str], ...] = ()
    forwarding: str = ""
    forwarding6: str = ""
    # Of the namespace, whose number another one has when it has ended.
    cookie: int = 0

    @property
    def place(self) -> Place:
        """The network namespace."""
        return Place(self.namespace, self.cookie)

    @property
    def ends(self) -> list[Ends]:
        """The addresses of each kind, IPv4 first."""
        return [_ends(network) for network in self.networks]

    def __str__(self) -> str:
        """Return it for people."""
        return f"the way out {self.id} of a network namespace ({', '.join(self.networks)})"

    def write(self) -> None:
        """Write the file, or replace it. Raises NamespaceError."""
        try:
            run_files.write(_path(self.id), json.dumps(self._asdict()))
        except OSError as error:
            raise NamespaceError(
                f"cannot record the way out in {run_files.DIRECTORY}: {error.strerror}; this needs"
                " root and a writable /run"
            ) from error

    @classmethod
    def read(cls, way_id: str) -> Optional[WayOut]:
        """Return what a file says; None if it is gone or broken."""
        try:
            told = json.loads(run_files.read(_path(way_id)) or "")
            return cls(
                way_id,
                Identity(*map(int, told["owner"])),
                int(told["namespace"]),
                tuple(str(ip_network(one)) for one in told["networks"]),
                tuple((str(path), str(before)) for path, before in told["settings"]),
                str(told["forwarding"]),
                str(told.get("forwarding6", "")),
                int(told.get("cookie", 0)),
            )
        except (OSError, KeyError, TypeError, ValueError):
            return None


def begin(way_id: str) -> WayOut:
    """Find free addresses in this thread's network namespace, and note them for a way out.

    ``finish`` does the rest, once there is a device. Raises NamespaceError.
    """
    # Without nft, nobody could say that nothing is left, and forget the way out.
    with _nft() as nft:
        nft.check("")
    with cgroup.locked():
        used = [ip_network(one) for way in _known() for one in way.networks]
        used += map(ip_network, _routed())
        pool = _POOL.subnets(new_prefix=_PREFIX)
        network = next((str(one) for one in pool if not any(map(one.overlaps, used))), None)
        if network is None:
            raise NamespaceError(f"no network of {_POOL} is free here")
        networks = (network, _new_network6()) if why_no_ipv6() == "" else (network,)
        way = WayOut(
            way_id, process.identity(), netns.number(), networks, cookie=netns.own_cookie()
        )
        way.write()
    return way


def finish(way: WayOut, device: str) -> Upkeep:
    """Translate addresses, and have this thread's network namespace forward packets.

    The upkeep is to be run now and then. Raises NamespaceError. ``end`` is needed in any case.
    """
    with cgroup.locked():
        settings = tuple(_forwarding(way))
        way = way._replace(settings=settings, forwarding=_get(_ALL4))
        way.write()
        upkeep = Upkeep(way, device)
        _change(upkeep.rules)
        try:
            for path in _needed(way):
                _switch_on(path)
        except OSError as error:
            raise NamespaceError(f"packets cannot be forwarded: {error}") from error
        if any(path == _ALL6 for path, _ in settings):
            way._replace(forwarding6=_get(_DEFAULT6)).write()
        return upkeep


class Upkeep:
    """Keeps a way out as it has to be, whatever others do meanwhile."""

    def __init__(self, way: WayOut, device: str) -> None:
        self._id = way.id
        self._device = device
        self.rules = _rules(way, device)

    def run(self) -> list[str]:
        """Put back what others have removed or switched off; return what that was, a line each.

        Whoever loads the rules of a firewall anew removes all others, and a manager of networks
        that sets up a device may switch its forwarding off. Who has made this machine a router
        since may forward, too. Raises BackendError or NamespaceError.
        """
        way = WayOut.read(self._id)
        if way is None:
            return []
        found = []
        with Nft() as nft:
            is_there = nft.table(table_name(self._id)) is not None
        rules = _rules(way, self._device)
        if not is_there or rules != self.rules:
            _change(rules)
        if not is_there:
            found.append(
                "rules of nftables that others had removed are back: the command needs them"
            )
        self.rules = rules
        off = [path for path in _needed(way) if _get(path) == "0"]
        for path in off:
            # Whoever looks while IPv6 is being switched on takes that for somebody else's doing.
            with suppress(OSError), cgroup.locked():  # a device may be gone meanwhile
                _switch_on(path)
                name = path[len(_SYS) :].replace("/", ".")
                found.append(
                    f"{name}, which others had switched off, is on again: the command needs it"
                )
        return found


def firewalls() -> list[str]:
    """Return what may keep packets from being forwarded here, a line each."""
    with suppress(BackendError, KeyError, TypeError), Nft() as nft:
        listing = nft.ask(["nft", "-j", "list", "chains"], package="nftables")["nftables"]
        return [
            f"the firewall of this machine may drop what the command sends: table {one['family']}"
            f" {one['table']} has its chain {one['name']} drop what it has no rule for. Have it"
            f' accept iifname "{DEVICES}*" and oifname "{DEVICES}*"'
            for one in of("chain", listing)
            if one.get("hook") == "forward" and _drops_the_rest(nft, one)
        ]
    return []


def _drops_the_rest(nft: Nft, chain: Mapping[str, Any]) -> bool:
    """Whether a chain drops what it has no rule for: by its policy, or as firewalld by a rule."""
    if chain.get("policy") == "drop":
        return True
    which = ["chain", *(str(chain[key]) for key in ("family", "table", "name"))]
    listing = nft.ask(["nft", "-j", "list", *which], package="nftables")["nftables"]
    *_, last = [{}, *of("rule", listing)]
    kinds = {kind for statement in last.get("expr", ()) for kind in statement}
    return bool(kinds & {"drop", "reject"}) and kinds <= {"drop", "reject", "counter", "log"}


def end(way: WayOut) -> None:
    """Restore all, as far as no other way out needs it. Doing so twice is no error.

    What cannot be done stays in the record, for the next start.
    """
    with cgroup.locked():
        way = WayOut.read(way.id) or way  # which may have been changed further
        others = [one for one in _known() if one.place == way.place and one.id != way.id]
        needed = {path for one in others for path, _ in one.settings}
        is_left = False
        with suppress(BackendError), Nft(way.place) as nft:
            is_left = True
            if nft.descriptor < 0:
                _restore(way, needed)
            else:
                netns.inside(nft.descriptor, lambda: _restore(way, needed))
            # Until then it keeps this machine from being a router for others.
            if nft.table(table_name(way.id)) is not None:
                nft.change(f"delete table {FAMILY} {table_name(way.id)}\n")
            is_left = False
        if not is_left:
            run_files.delete(_path(way.id))


def abandoned() -> list[WayOut]:
    """Return the ways out whose processes were killed."""
    return [way for way in _known() if process.is_gone(way.owner)]


def tidy_up() -> list[WayOut]:
    """End the ways out whose processes were killed, and return them."""
    with cgroup.locked():
        found = abandoned()
        for way in found:
            end(way)
    return found


def why_no_ipv6() -> str:
    """Return why this thread's network namespace is no way out by IPv6; empty if it is one."""
    if not any(":" in one and not one.startswith("fe80:") and one != "::1" for one in _addresses()):
        return "this machine has no IPv6 address"
    if _get(_ALL6) != "1" and _is_advertised():
        return (
            "this machine has its IPv6 route from router advertisements, which Linux ignores while"
            " it forwards packets"
        )
    return ""


def _known() -> Iterator[WayOut]:
    for way_id in run_files.stems(run_files.WAYS_OUT):
        way = WayOut.read(way_id)
        if way is not None:
            yield way


def _path(way_id: str) -> str:
    return os.path.join(run_files.DIRECTORY, way_id + run_files.WAYS_OUT)


def _ends(network: str) -> Ends:
    whole = ip_network(network)
    outer, inner = (f"{whole.network_address + number}/{whole.prefixlen}" for number in (1, 2))
    if whole.version == 4:
        return Ends(IPv4Interface(inner), IPv4Interface(outer))
    return Ends(IPv6Interface(inner), IPv6Interface(outer))


def _new_network6() -> str:
    """Return a network that nobody else has, as RFC 4193 has it."""
    return str(ip_network((b"\xfd" + os.urandom(5) + bytes(10), _PREFIX6)))


def _addresses() -> set[str]:
    try:
        return netns.own_addresses()
    except OSError as error:
        raise NamespaceError(f"cannot read the addresses of this machine: {error}") from error


def _routed() -> Iterator[str]:
    """Yield the networks that there is a route to, but for the default route."""
    for fields in _table(_ROUTES)[1:]:
        destination, mask = (int(fields[at], 16).to_bytes(4, "little") for at in (1, 7))
        bits = bin(int.from_bytes(mask, "big")).count("1")
        if bits:
            yield str(ip_network((destination, bits), strict=False))


def _is_advertised() -> bool:
    """Whether the default route by IPv6 is from router advertisements."""
    return any(
        fields[1] == "00" and int(fields[8], 16) & _RTF_ADDRCONF for fields in _table(_ROUTES6)
    )


def _table(path: str) -> list[list[str]]:
    with suppress(OSError), open(path) as file:
        return [line.split() for line in file]
    return []


def _forwarding(way: WayOut) -> Iterator[tuple[str, str]]:
    """Yield the settings to change: those that are off, or that another way out has switched on.

    IPv4 is forwarded by devices. IPv6 has a switch for all, which sets those of the devices too:
    these are set back at once, as they only tell whether a device is to be a router's.
    """
    of_others = {
        path: before
        for other in _known()
        if other.place == way.place and other.id != way.id
        for path, before in _as_set(other)
    }
    for path in sorted(glob.glob(f"{_V4}/*/forwarding")):
        is_device = path.split("/")[-2] not in ("all", "default")
        if is_device and of_others.get(path, _get(path)) == "0":
            yield path, "0"
    if len(way.networks) > 1:
        yield from _forwarding6(of_others)


def _forwarding6(of_others: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if _ALL6 in of_others:
        yield from ((path, was) for path, was in of_others.items() if path.startswith(_V6))
    elif _get(_ALL6) == "0":
        yield _ALL6, "0"
        yield from ((path, "1") for path in _devices6() if _get(path) == "1")


def _devices6() -> list[str]:
    """Return the paths of the settings that the switch of IPv6 sets too."""
    return [path for path in sorted(glob.glob(f"{_V6}/*/forwarding")) if path != _ALL6]


def _needed(way: WayOut) -> list[str]:
    """Return the settings that have to be on."""
    return [path for path, _ in _as_set(way) if path.startswith(_V4) or path == _ALL6]


def _switch_on(path: str) -> None:
    if path == _ALL6:
        _set_all6("1", {one: _get(one) for one in _devices6()})
    else:
        _set(path, "1")


def _set_all6(value: str, devices: Mapping[str, str]) -> None:
    """Set the switch of IPv6, and devices as they are to be then."""
    _set(_ALL6, value)
    for path, own in devices.items():
        with suppress(OSError):  # of a device that is gone
            _set(path, own)


def _rules(way: WayOut, device: str) -> list[str]:
    """Return what translates what comes from our network, and forwards nothing else than before.

    It takes the place of what there is.
    """
    table = f"{FAMILY} {table_name(way.id)}"
    kinds = {4: "ip", 6: "ip6"}
    return [
        f"add table {table}",
        f"delete table {table}",
        f"add table {table}",
        f"add chain {table} out {{ type nat hook postrouting priority 100; }}",
        *(
            f'add rule {table} out oifname != "{device}" {kinds[one.version]} saddr {one.ip}'
            " masquerade"
            for one, _ in way.ends
        ),
        f"add chain {table} through {{ type filter hook forward priority 0; }}",
        f'add rule {table} through iifname "{DEVICES}*" accept',
        # Nobody is to reach the command who could not do so without it.
        f'add rule {table} through oifname "{DEVICES}*" {_UNASKED} drop',
        f'add rule {table} through oifname "{DEVICES}*" accept',
        *(f"add rule {table} through {one} drop" for one in _forwarded_by_us(way)),
    ]


def _change(rules: Sequence[str]) -> None:
    with _nft() as nft:
        nft.change("\n".join([*rules, ""]))


@contextmanager
def _nft() -> Iterator[Nft]:
    try:
        with Nft() as nft:
            yield nft
    except BackendError as error:
        raise NamespaceError(
            f"the command's addresses cannot be translated: {error}. This needs nftables with NAT"
            " (Linux 5.2, CONFIG_NFT_MASQ, CONFIG_NFT_NAT)"
        ) from error


def _forwarded_by_us(way: WayOut) -> Iterator[str]:
    """Yield what matches packets that this machine did not forward before, and shall not now.

    Answers are those of somebody who forwards since on a device that was on already.
    """
    for path, _ in _as_set(way):
        if path.startswith(_V4):
            yield f'meta nfproto ipv4 iifname "{path.split("/")[-2]}" {_UNASKED}'
        elif path == _ALL6:
            yield f"meta nfproto ipv6 {_UNASKED}"


def _get(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _set(path: str, value: str) -> None:
    if _get(path) != value:
        with open(path, "w") as file:
            file.write(value)


def _as_set(way: WayOut) -> Iterator[tuple[str, str]]:
    """Yield the settings that a way out has changed last, as far as one can see.

    Somebody else, such as Docker, may have made this machine a router since, or none.
    """
    others = (
        (_V4, _get(_ALL4) != way.forwarding),
        (_V6, way.forwarding6 not in ("", _get(_DEFAULT6))),
    )
    for path, before in way.settings:
        if not any(is_others and path.startswith(kind) for kind, is_others in others):
            yield path, before


def _restore(way: WayOut, needed: Collection[str]) -> None:
    for path, before in _as_set(way):
        with suppress(OSError):  # of a device that is gone
            if path in needed:
                continue
            if path == _ALL6:
                _set_all6(before, _devices6_after(way))
            elif path.startswith(_V4):
                _set(path, before)


def _devices6_after(way: WayOut) -> dict[str, str]:
    """Return how devices are to be: as they are, unless we were killed while all were on."""
    if way.forwarding6:
        return {path: _get(path) for path in _devices6()}
    return {path: "1" for path, _ in way.settings if path.startswith(_V6) and path != _ALL6}
