"""Who else handles this machine's packets, and whether that conflicts with a limit."""

from __future__ import annotations

import os
import re
import socket
import struct
from pathlib import Path
from typing import Iterator

from pybpfthrottle.backends.ebpf import attached, privileges
from pybpfthrottle.backends.ebpf.attached import Links
from pybpfthrottle.backends.protocol import Priority, all_backends
from pybpfthrottle.diagnostics.check import Check, Result, Setup, passed, skipped, warned
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import netlink

_SECTION = "What is there already"
_ROUTE, _NETFILTER = 0, 12
_GET_QDISC = 38
_TC_KIND = 1
_GET_TABLE = 10 << 8 | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_TABLE_NAME, _TABLE_USE = 1, 3
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
# The defaults of interfaces.
_DEFAULT_QDISCS = {"noqueue", "pfifo_fast", "fq_codel", "fq", "mq", "pfifo"}

_FIREWALLS = {
    "firewalld": "/run/firewalld",
    "ufw": "/etc/ufw/ufw.conf",
    "iptables (IPv4)": "/proc/net/ip_tables_names",
    "iptables (IPv6)": "/proc/net/ip6_tables_names",
}
_ENGINES = {
    "Docker": "/run/docker.sock",
    "Podman": "/run/podman/podman.sock",
    "containerd": "/run/containerd/containerd.sock",
    "CRI-O": "/run/crio/crio.sock",
    "LXD": "/var/snap/lxd/common/lxd/unix.socket",
    "libvirt": "/run/libvirt/libvirt-sock",
}
_CONTAINER_CGROUP = re.compile(r"(docker|libpod|cri-containerd|crio|lxc)[-.][\w-]+")
# The names that systemd gives its programs (src/core/bpf-firewall.c and others).
_OF_SYSTEMD = {
    "sd_fw_ingress": "IPAddressAllow=, IPAccounting=",
    "sd_fw_egress": "IPAddressAllow=, IPAccounting=",
    "sd_devices": "DeviceAllow=",
    "sd_bind4": "SocketBindAllow=",
    "sd_bind6": "SocketBindAllow=",
    "restrict_ifaces": "RestrictNetworkInterfaces=",
}


def _qdiscs(setup: Setup) -> Result:
    try:
        found = list(_list_qdiscs())
    except OSError as error:
        return skipped(f"the kernel does not report them: {error.strerror}")
    special = [f"{device}: {kind}" for device, kind in found if kind not in _DEFAULT_QDISCS]
    if special:
        text = "packets pass both the limit and these; the lower rate wins"
        return passed(text, *special)
    return passed("all interfaces have the default ones", *(f"{d}: {k}" for d, k in found))


def _list_qdiscs() -> Iterator[tuple[str, str]]:
    for body in netlink.dump(_ROUTE, _GET_QDISC, bytes(20)):
        [index] = struct.unpack_from("=i", body, 4)
        kind = netlink.attributes(body[20:]).get(_TC_KIND, b"").rstrip(b"\0").decode()
        try:
            yield socket.if_indextoname(index), kind
        except OSError:
            yield f"interface {index}", kind


def _tables(setup: Setup) -> Result:
    try:
        found = list(_list_tables())
    except OSError as error:
        return passed(
            "this kernel has no nftables, or does not report tables", error.strerror or ""
        )
    if not found:
        return passed("no tables")
    return passed("they see packets before or after the limit, and do not conflict", *found)


def _list_tables() -> Iterator[str]:
    for body in netlink.dump(_NETFILTER, _GET_TABLE, bytes(4)):
        values = netlink.attributes(body[4:])
        name = values.get(_TABLE_NAME, b"").rstrip(b"\0").decode(errors="replace")
        [chains] = struct.unpack(">I", values.get(_TABLE_USE, bytes(4)))
        yield f"{_FAMILIES.get(body[0], body[0])} {name}: {chains} chains and sets"


def _firewalls(setup: Setup) -> Result:
    found = [name for name, path in _FIREWALLS.items() if _is_active(path)]
    if not found:
        return passed("none is visible")
    return passed("packets they drop never count towards a limit; they do not conflict", *found)


def _is_active(path: str) -> bool:
    try:
        text = Path(path).read_text()
    except (OSError, ValueError):
        return os.path.isdir(path)
    return "ENABLED=yes" in text if path.endswith(".conf") else bool(text.strip())


def _engines(setup: Setup) -> Result:
    engines = [name for name, path in _ENGINES.items() if os.path.exists(path)]
    containers = sorted(
        {
            os.path.basename(cgroup.path)
            for cgroup in cgroups_v2.walk()
            if _CONTAINER_CGROUP.search(os.path.basename(cgroup.path))
        }
    )
    if not engines and not containers:
        return passed("none is visible")
    text = "each container has a cgroup of its own, which --cgroup limits; they do not conflict"
    return passed(text, *engines, *containers)


def _systemd(setup: Setup) -> Result:
    known = Links()
    found: dict[str, list[str]] = {}
    for cgroup in cgroups_v2.walk():
        try:
            there = list(attached.at(cgroup, known=known))
        except OSError as error:
            return skipped(privileges.why_refused(error, str(error.filename)))
        for one in there:
            name = one.info.name if one.info else ""
            if name in _OF_SYSTEMD:
                found.setdefault(f"{name} ({_OF_SYSTEMD[name]})", []).append(cgroup.path)
    if not found:
        return passed("systemd has attached no programs to cgroups")
    evidence = [f"{name}: {', '.join(paths)}" for name, paths in found.items()]
    return passed("its programs allow others", *evidence)


def _backends(setup: Setup) -> Result:
    others = [backend for backend in all_backends() if backend.priority is not Priority.BEST]
    left = [str(leftover) for backend in others for leftover in backend.leftovers()]
    if left:
        return warned("a crash has left these; pybpfthrottle cleanup removes them", *left)
    reasons = {
        (backend.name, direction): backend.unavailable(direction)
        for backend in others
        for direction in backend.directions
    }
    evidence = [
        f"{name}, {direction}s: {reason or 'available'}"
        for (name, direction), reason in reasons.items()
    ]
    able = dict.fromkeys(name for (name, _), reason in reasons.items() if reason is None)
    if not able:
        return passed("none can limit here", *evidence)
    return passed(f"where eBPF cannot limit, {', '.join(able)} can", *evidence)


CHECKS = (
    Check(
        "company.systemd",
        _SECTION,
        "BPF programs of systemd",
        "IPAddressAllow=, IPAccounting= and others attach BPF programs to cgroups",
        "",
        _systemd,
        ("cgroup.v2", "rights.commands"),
    ),
    Check(
        "company.qdiscs",
        _SECTION,
        "queueing disciplines",
        "tc's limits are for interfaces, ours for cgroups",
        "",
        _qdiscs,
    ),
    Check("company.nftables", _SECTION, "nftables", "firewalls may drop packets", "", _tables),
    Check("company.firewalls", _SECTION, "firewalls", "they may drop packets", "", _firewalls),
    Check(
        "company.containers",
        _SECTION,
        "container engines",
        "they keep containers in cgroups",
        "",
        _engines,
        ("cgroup.v2",),
    ),
    Check(
        "company.backends",
        _SECTION,
        "other backends",
        "they limit where eBPF cannot",
        "",
        _backends,
    ),
)
