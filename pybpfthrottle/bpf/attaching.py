"""A loaded program becomes a Link: how, its type and attach type say; where, the caller.

=====================================  ==========  ==============================================
programs                               argument    where they are attached
=====================================  ==========  ==============================================
cgroup_skb, cgroup/..., sockops,       cgroup      a directory of cgroup v2, by path or descriptor
lsm_cgroup
xdp, tcx/..., netkit/...               interface   a network interface, by name or index
sk_lookup, flow_dissector              netns       a network namespace, by path or descriptor
sk_skb/..., sk_msg                     map         a live map of type SOCKMAP or SOCKHASH
netfilter                              hook        "prerouting", "input", "forward", "output" or
                                                   "postrouting" of this network namespace
raw_tp                                 tracepoint  a name; that of the section where none is given
tp_btf, fentry, fexit, fmod_ret, lsm,  none        the function that the program was loaded for
iter, freplace
=====================================  ==========  ==============================================

Besides, cgroups (Linux 6.17), tcx and netkit take ``before``, ``after`` and ``first``, xdp a
``mode``, netfilter ``family``, ``priority`` and ``defragment``, tracepoints and functions a
``cookie``. Probes and profiles are in ``tracing.by_section``.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, Optional, Union

from pybpfthrottle.bpf import abi, links
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.obj import releases
from pybpfthrottle.bpf.privileges import capabilities_for, why_refused
from pybpfthrottle.bpf.programs import Program

Place = Union[str, "os.PathLike[str]", int]
# What a program goes before or after.
Neighbour = Union[Program, Link]

_A, _P = AttachType, ProgType
_NOWHERE = "none"
_TCX = (_A.TCX_INGRESS, _A.TCX_EGRESS)
# What is in tracing.by_section: few programs that are attached need that.
_PROBES = (_P.KPROBE, _P.TRACEPOINT, _P.PERF_EVENT)
_TRACEPOINTS = (_P.RAW_TRACEPOINT, _P.RAW_TRACEPOINT_WRITABLE)
_ARGUMENTS = {
    **dict.fromkeys(
        (_A.XDP, _A.TCX_INGRESS, _A.TCX_EGRESS, _A.NETKIT_PRIMARY, _A.NETKIT_PEER), "interface"
    ),
    **dict.fromkeys((_A.SK_LOOKUP, _A.FLOW_DISSECTOR), "netns"),
    **dict.fromkeys(
        (
            *(_A.SK_SKB_STREAM_PARSER, _A.SK_SKB_STREAM_VERDICT, _A.SK_SKB_VERDICT),
            _A.SK_MSG_VERDICT,
        ),
        "map",
    ),
    **dict.fromkeys(
        (
            *(_A.TRACE_RAW_TP, _A.TRACE_FENTRY, _A.TRACE_FEXIT, _A.MODIFY_RETURN),
            _A.LSM_MAC,
        ),
        _NOWHERE,
    ),
    **{known: "cgroup" for known in _A if known.name.startswith("CGROUP_")},
    _A.LSM_CGROUP: "cgroup",
    _A.NETFILTER: "hook",
}
_ORDER = ("before", "after", "first")
# What may be given besides, by the attach type, or else by the argument.
_OPTIONS: dict[Union[AttachType, str], tuple[str, ...]] = {
    _A.XDP: ("mode",),
    _A.NETFILTER: ("family", "priority", "defragment"),
    "cgroup": _ORDER,
    "interface": _ORDER,
    "tracepoint": ("cookie",),
    _NOWHERE: ("cookie",),
}
# What programs of a type are attached as where neither a section nor the caller says it, and what
# there is to choose from.
_DEFAULTS: dict[int, AttachType] = {
    _P.XDP: _A.XDP,
    _P.SOCK_OPS: _A.CGROUP_SOCK_OPS,
    _P.CGROUP_DEVICE: _A.CGROUP_DEVICE,
    _P.CGROUP_SYSCTL: _A.CGROUP_SYSCTL,
    _P.SK_MSG: _A.SK_MSG_VERDICT,
    _P.SK_LOOKUP: _A.SK_LOOKUP,
    _P.FLOW_DISSECTOR: _A.FLOW_DISSECTOR,
    _P.NETFILTER: _A.NETFILTER,
}
_CHOICES: dict[int, str] = {
    _P.CGROUP_SKB: "AttachType.CGROUP_INET_INGRESS or CGROUP_INET_EGRESS",
    _P.CGROUP_SOCK: "AttachType.CGROUP_INET_SOCK_CREATE, or another hook of sockets",
    _P.CGROUP_SOCK_ADDR: "AttachType.CGROUP_INET4_CONNECT, or another hook of addresses",
    _P.CGROUP_SOCKOPT: "AttachType.CGROUP_GETSOCKOPT or CGROUP_SETSOCKOPT",
    _P.TRACING: "AttachType.TRACE_RAW_TP, TRACE_FENTRY, TRACE_FEXIT, MODIFY_RETURN or TRACE_ITER",
    _P.LSM: "AttachType.LSM_MAC or LSM_CGROUP",
    _P.SCHED_CLS: "AttachType.TCX_INGRESS or TCX_EGRESS (Linux 6.6)",
    _P.SK_SKB: "AttachType.SK_SKB_VERDICT, SK_SKB_STREAM_PARSER or SK_SKB_STREAM_VERDICT",
}
_ROUTE = "pin it, and name the pin in 'ip route add ... encap bpf'"
# What to do with programs that no link attaches, or not yet.
_OTHERS: dict[int, str] = {
    _P.SOCKET_FILTER: "pass program.fd to setsockopt(SO_ATTACH_BPF)",
    _P.SK_REUSEPORT: "pass program.fd to setsockopt(SO_ATTACH_REUSEPORT_EBPF)",
    _P.SCHED_ACT: "pin it, and name the pin in 'tc action add action bpf'",
    **dict.fromkeys((_P.LWT_IN, _P.LWT_OUT, _P.LWT_XMIT, _P.LWT_SEG6LOCAL), _ROUTE),
    _P.LIRC_MODE2: "attach it to an infrared device with BPF_PROG_ATTACH",
    _P.SYSCALL: "run it with program.test_run()",
    _P.EXT: "load it with targets= for a function of another program",
    _P.STRUCT_OPS: "its struct is what is attached: loaded.struct_ops[NAME].attach()",
}
# The same for attach types of programs that are attached otherwise.
_IN_MAPS = {
    _A.XDP_DEVMAP: "put program.fd into an element of a map of type DEVMAP",
    _A.XDP_CPUMAP: "put program.fd into an element of a map of type CPUMAP",
}
# The first release with links of a kind, by the attach type, or else by the argument.
_SINCE: dict[Union[AttachType, str], str] = {
    _A.SK_LOOKUP: "5.9",
    _A.TCX_INGRESS: "6.6",
    _A.TCX_EGRESS: "6.6",
    _A.NETKIT_PRIMARY: "6.7",
    _A.NETKIT_PEER: "6.7",
    _A.LSM_CGROUP: "6.0",
    _A.LSM_MAC: "5.7",
    _A.NETFILTER: "6.4",
    "cgroup": "5.7",
    "interface": "5.9",
    "netns": "5.7",
    "map": "6.10",
    "tracepoint": "4.17",
    _NOWHERE: "5.5",
}
# The same for options, where they are newer than the links.
_NEWER = {"cgroup": "6.17", "tracepoint": "6.10", _NOWHERE: "6.0"}


def attach(program: Program, attach_type: Optional[AttachType], **places: Any) -> Link:
    """Attach a program; ``places`` has what ``Program.attach`` was given, by argument.

    Raises TypeError for an argument that it does not take, or lacks, and AttachError.
    """
    if program.type in _PROBES:
        from pybpfthrottle.bpf.tracing import by_section

        return by_section.attach(program, places)
    if attach_type is None:
        attach_type = program.expected_attach_type
    if attach_type is None:
        attach_type = _DEFAULTS.get(program.type)
    if attach_type is _A.TRACE_ITER:
        from pybpfthrottle.bpf import iterating

        return iterating.attach(program, **_only_for_iterators(program, places))
    argument = _argument(program, attach_type)
    options = _options(places, attach_type, argument)
    place = _only(program, argument, places)
    try:
        return _attach(program, attach_type, argument, place, options)
    except OSError as error:
        if attach_type in _TCX and _is_older_than_tcx(error) and not options:
            return _by_tc(program, attach_type, place)
        raise AttachError(
            f"cannot attach {_described(program, attach_type)}"
            f"{'' if place is None else f' to {argument} {place!s}'}:"
            f" {_why(error, program, attach_type, argument, place, options)}",
            errno=error.errno or 0,
        ) from error


def _only_for_iterators(program: Program, places: dict[str, Any]) -> dict[str, Any]:
    wrong = [f"{name}=" for name in places if name not in ("map", "cgroup", "pid")]
    if wrong:
        raise TypeError(f"{program.name!r} cannot be attached by {', '.join(wrong)}")
    return places


def _options(
    places: dict[str, Any], attach_type: Optional[AttachType], argument: str
) -> dict[str, Any]:
    """Take out what is not the place."""
    if attach_type is None and argument == _NOWHERE:
        return {}
    by_type = _OPTIONS.get(attach_type) if attach_type is not None else None
    names = _OPTIONS.get(argument, ()) if by_type is None else by_type
    return {name: places.pop(name) for name in names if places.get(name) is not None}


def _argument(program: Program, attach_type: Optional[AttachType]) -> str:
    """Return the argument that says where programs of this kind are attached."""
    if program.type in _TRACEPOINTS:
        return "tracepoint"
    if program.type == _P.EXT and program.attach_to:
        return _NOWHERE
    if attach_type in _ARGUMENTS:
        return _ARGUMENTS[attach_type]
    choices = _CHOICES.get(program.type)
    if choices:
        raise TypeError(
            f"{program.name!r} does not say its attach type: give attach_type={choices}"
        )
    remedy = _OTHERS.get(program.type)
    if attach_type in _IN_MAPS:
        remedy = _IN_MAPS[attach_type]
    raise AttachError(
        f"cannot attach {_described(program, attach_type)}: not supported"
        f"{f'; {remedy}' if remedy else ''}"
    )


def _only(program: Program, argument: str, places: dict[str, Any]) -> Any:
    """Return what was given for the one argument that there is to be."""
    given = {name: place for name, place in places.items() if place is not None}
    place = given.pop(argument, program.attach_to if argument == "tracepoint" else None)
    if given:
        names = ", ".join(f"{name}=" for name in given)
        raise TypeError(f"{program.name!r} cannot be attached by {names}")
    if place is None and argument != _NOWHERE:
        raise TypeError(f"{program.name!r} needs {argument}=, where it is attached")
    return place


def _attach(
    program: Program,
    attach_type: Optional[AttachType],
    argument: str,
    place: Any,
    options: dict[str, Any],
) -> Link:
    if argument == "tracepoint":
        return links.attach_raw_tracepoint(program, place, **options)
    if attach_type is None or argument == _NOWHERE:
        if options and attach_type is not None:  # Linux 6.0
            return links.create_link(program, 0, attach_type, {"tracing.cookie": options["cookie"]})
        return links.attach_raw_tracepoint(program)
    if argument == "hook":
        return links.create_link(program, 0, attach_type, _netfilter(place, **options))
    if attach_type is _A.XDP:
        flags = _xdp_flags(**options)
        with _target(argument, place) as target:
            return links.create_link(program, target, attach_type, flags=flags)
    with _target(argument, place) as target:
        flags, relative = _order(program, **options)
        part = "cgroup" if argument == "cgroup" else "tcx"
        if argument == "cgroup" and relative and not flags & abi.BPF_F_LINK:
            raise TypeError(f"{program.name!r} goes before or after a link, at a cgroup")
        extra = {f"{part}.relative_fd": relative} if relative else {}
        return links.create_link(program, target, attach_type, extra, flags=flags)


_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_MODES = {
    "native": abi.XDP_FLAGS_DRV_MODE,
    "generic": abi.XDP_FLAGS_SKB_MODE,
    "offload": abi.XDP_FLAGS_HW_MODE,
}


def _netfilter(
    hook: str, family: str = "ipv4", priority: int = 0, defragment: bool = False
) -> dict[str, int]:
    return {
        "netfilter.pf": _FAMILIES[_one_of("family", family, _FAMILIES)],
        "netfilter.hooknum": _HOOKS.index(_one_of("hook", hook, _HOOKS)),
        "netfilter.priority": priority,
        "netfilter.flags": abi.BPF_F_NETFILTER_IP_DEFRAG if defragment else 0,
    }


def _xdp_flags(mode: Optional[str] = None) -> int:
    return _MODES[_one_of("mode", mode, _MODES)] if mode is not None else 0


def _one_of(argument: str, given: str, known: Iterable[str]) -> str:
    """Return what is given. Raises TypeError for what is not known."""
    if given not in known:
        raise TypeError(f"{argument}={given!r} is not one of {', '.join(known)}")
    return given


def _order(
    program: Program,
    before: Optional[Neighbour] = None,
    after: Optional[Neighbour] = None,
    first: bool = False,
) -> tuple[int, int]:
    """Return flags, and the descriptor of what the program goes before or after; 0 for none."""
    if (before is not None) + (after is not None) + first > 1:
        raise TypeError(f"{program.name!r} goes to one place: before=, after= or first=")
    neighbour = before if before is not None else after
    if neighbour is None:
        return (abi.BPF_F_BEFORE if first else 0), 0
    flags = abi.BPF_F_AFTER if before is None else abi.BPF_F_BEFORE
    if isinstance(neighbour, Link):
        flags |= abi.BPF_F_LINK
    return flags, neighbour.fd


def _is_older_than_tcx(error: OSError) -> bool:
    from pybpfthrottle.bpf.running import version, version_code

    return error.errno == errno.EINVAL and version() < version_code("6.6")


def _by_tc(program: Program, attach_type: AttachType, place: Any) -> Link:
    from pybpfthrottle.bpf import tc

    try:
        with _target("interface", place) as index:
            return tc.attach(program, index, attach_type)
    except OSError as error:
        raise AttachError(
            f"cannot attach {_described(program, attach_type)} to interface {place} by tc: {error}",
            errno=error.errno or 0,
        ) from error


@contextmanager
def _target(argument: str, place: Any) -> Iterator[int]:
    """Return the number that BPF_LINK_CREATE knows a place by."""
    if argument == _NOWHERE:
        yield 0
    elif argument == "map":
        yield place.fd
    elif isinstance(place, int):
        yield place
    elif argument == "interface":
        yield socket.if_nametoindex(place)
    else:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)


def _described(program: Program, attach_type: Optional[AttachType]) -> str:
    kind = attach_type.name.lower() if attach_type is not None else _type_name(program.type)
    return f"{program.name!r} ({kind})"


def _type_name(number: int) -> str:
    return releases.since_when(ProgType, number).partition(",")[0]


def _why(
    error: OSError,
    program: Program,
    attach_type: Optional[AttachType],
    argument: str,
    place: Any,
    options: Iterable[str],
) -> str:
    if error.errno in (errno.EPERM, errno.ENOSYS):
        return why_refused(error, str(error.filename), capabilities_for(program.type))
    if argument == "tracepoint" and error.errno == errno.ENOENT:
        return f"{error}{_nearest_tracepoints(place)}"
    if error.errno != errno.EINVAL:
        return str(error)
    newer = [f"{name}= needs Linux {_NEWER[argument]}" for name in options if argument in _NEWER]
    if newer:
        return f"{error} ({', '.join(newer)})"
    release = _SINCE[argument] if attach_type is None else _SINCE.get(attach_type, _SINCE[argument])
    older = ""
    if argument in ("cgroup", "map"):
        older = "; before that, use links.attach_legacy"
    return f"{error} (links of this kind need Linux {release}{older})"


def _nearest_tracepoints(name: str) -> str:
    from pybpfthrottle.bpf.tracing import nearest, tracefs

    try:
        with tracefs.directory() as place:
            known = tracefs.tracepoints(place)
    except (AttachError, OSError):
        return ""
    return nearest.hint(name, (one.partition("/")[2] for one in known))
