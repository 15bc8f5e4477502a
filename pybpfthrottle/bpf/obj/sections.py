"""Names of sections -> the kind of the programs in them.

The names are those of libbpf (Documentation/bpf/libbpf/program_types.rst of the kernel), taken as
leniently as cilium/ebpf takes them.
"""

from __future__ import annotations

from typing import Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import AttachType, ProgType
from pybpfthrottle.bpf.obj.plain import NamedTuple

_P, _A = ProgType, AttachType


class SectionKind(NamedTuple):
    """The program type, the attach type where the name says one, and flags of BPF_PROG_LOAD."""

    type: ProgType
    attach_type: Optional[AttachType] = None
    flags: int = 0


class Meaning(NamedTuple):
    """The meaning of a section's name; ``target`` follows the kind after a slash, or is None."""

    kind: SectionKind
    target: Optional[str]
    autoload: bool


_UNKNOWN = SectionKind(_P.UNSPEC)
# These stand alone or before a slash and a target.
_WITH_TARGET = {
    "kprobe": SectionKind(_P.KPROBE),
    "uprobe": SectionKind(_P.KPROBE),
    "kretprobe": SectionKind(_P.KPROBE),
    "uretprobe": SectionKind(_P.KPROBE),
    "ksyscall": SectionKind(_P.KPROBE),
    "kretsyscall": SectionKind(_P.KPROBE),
    "usdt": SectionKind(_P.KPROBE),
    "tracepoint": SectionKind(_P.TRACEPOINT),
    "tp": SectionKind(_P.TRACEPOINT),
    "raw_tracepoint": SectionKind(_P.RAW_TRACEPOINT),
    "raw_tp": SectionKind(_P.RAW_TRACEPOINT),
    "raw_tracepoint.w": SectionKind(_P.RAW_TRACEPOINT_WRITABLE),
    "raw_tp.w": SectionKind(_P.RAW_TRACEPOINT_WRITABLE),
    "freplace": SectionKind(_P.EXT),
    "struct_ops": SectionKind(_P.STRUCT_OPS),
    "kprobe.multi": SectionKind(_P.KPROBE, _A.TRACE_KPROBE_MULTI),
    "kretprobe.multi": SectionKind(_P.KPROBE, _A.TRACE_KPROBE_MULTI),
    "kprobe.session": SectionKind(_P.KPROBE, _A.TRACE_KPROBE_SESSION),
    "uprobe.multi": SectionKind(_P.KPROBE, _A.TRACE_UPROBE_MULTI),
    "uretprobe.multi": SectionKind(_P.KPROBE, _A.TRACE_UPROBE_MULTI),
    "uprobe.session": SectionKind(_P.KPROBE, _A.TRACE_UPROBE_SESSION),
    "tp_btf": SectionKind(_P.TRACING, _A.TRACE_RAW_TP),
    "fentry": SectionKind(_P.TRACING, _A.TRACE_FENTRY),
    "fmod_ret": SectionKind(_P.TRACING, _A.MODIFY_RETURN),
    "fexit": SectionKind(_P.TRACING, _A.TRACE_FEXIT),
    "lsm": SectionKind(_P.LSM, _A.LSM_MAC),
    "lsm_cgroup": SectionKind(_P.LSM, _A.LSM_CGROUP),
    "iter": SectionKind(_P.TRACING, _A.TRACE_ITER),
}
# Any other name that begins with one of these means the same: xdp_prog1, socket/main.
_PREFIXES = {
    "socket": SectionKind(_P.SOCKET_FILTER),
    "tc": SectionKind(_P.SCHED_CLS),
    "classifier": SectionKind(_P.SCHED_CLS),
    "action": SectionKind(_P.SCHED_ACT),
    "syscall": SectionKind(_P.SYSCALL, flags=abi.BPF_F_SLEEPABLE),
    "lwt_in": SectionKind(_P.LWT_IN),
    "lwt_out": SectionKind(_P.LWT_OUT),
    "lwt_xmit": SectionKind(_P.LWT_XMIT),
    "lwt_seg6local": SectionKind(_P.LWT_SEG6LOCAL),
    "sk_skb": SectionKind(_P.SK_SKB),
    "cgroup/skb": SectionKind(_P.CGROUP_SKB),
    "sk_reuseport/migrate": SectionKind(_P.SK_REUSEPORT, _A.SK_REUSEPORT_SELECT_OR_MIGRATE),
    "sk_reuseport": SectionKind(_P.SK_REUSEPORT, _A.SK_REUSEPORT_SELECT),
    "tc/ingress": SectionKind(_P.SCHED_CLS, _A.TCX_INGRESS),
    "tc/egress": SectionKind(_P.SCHED_CLS, _A.TCX_EGRESS),
    "tcx/ingress": SectionKind(_P.SCHED_CLS, _A.TCX_INGRESS),
    "tcx/egress": SectionKind(_P.SCHED_CLS, _A.TCX_EGRESS),
    "netkit/primary": SectionKind(_P.SCHED_CLS, _A.NETKIT_PRIMARY),
    "netkit/peer": SectionKind(_P.SCHED_CLS, _A.NETKIT_PEER),
    "xdp/devmap": SectionKind(_P.XDP, _A.XDP_DEVMAP),
    "xdp_devmap": SectionKind(_P.XDP, _A.XDP_DEVMAP),
    "xdp/cpumap": SectionKind(_P.XDP, _A.XDP_CPUMAP),
    "xdp_cpumap": SectionKind(_P.XDP, _A.XDP_CPUMAP),
    "xdp": SectionKind(_P.XDP, _A.XDP),
    "perf_event": SectionKind(_P.PERF_EVENT, _A.PERF_EVENT),
    "sockops": SectionKind(_P.SOCK_OPS, _A.CGROUP_SOCK_OPS),
    "sk_skb/stream_parser": SectionKind(_P.SK_SKB, _A.SK_SKB_STREAM_PARSER),
    "sk_skb/stream_verdict": SectionKind(_P.SK_SKB, _A.SK_SKB_STREAM_VERDICT),
    "sk_skb/verdict": SectionKind(_P.SK_SKB, _A.SK_SKB_VERDICT),
    "sk_msg": SectionKind(_P.SK_MSG, _A.SK_MSG_VERDICT),
    "lirc_mode2": SectionKind(_P.LIRC_MODE2, _A.LIRC_MODE2),
    "flow_dissector": SectionKind(_P.FLOW_DISSECTOR, _A.FLOW_DISSECTOR),
    "cgroup_skb/ingress": SectionKind(_P.CGROUP_SKB, _A.CGROUP_INET_INGRESS),
    "cgroup_skb/egress": SectionKind(_P.CGROUP_SKB, _A.CGROUP_INET_EGRESS),
    "cgroup/sock_create": SectionKind(_P.CGROUP_SOCK, _A.CGROUP_INET_SOCK_CREATE),
    "cgroup/sock_release": SectionKind(_P.CGROUP_SOCK, _A.CGROUP_INET_SOCK_RELEASE),
    "cgroup/sock": SectionKind(_P.CGROUP_SOCK, _A.CGROUP_INET_SOCK_CREATE),
    "cgroup/post_bind4": SectionKind(_P.CGROUP_SOCK, _A.CGROUP_INET4_POST_BIND),
    "cgroup/post_bind6": SectionKind(_P.CGROUP_SOCK, _A.CGROUP_INET6_POST_BIND),
    "cgroup/bind4": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_INET4_BIND),
    "cgroup/bind6": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_INET6_BIND),
    "cgroup/connect4": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_INET4_CONNECT),
    "cgroup/connect6": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_INET6_CONNECT),
    "cgroup/connect_unix": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UNIX_CONNECT),
    "cgroup/sendmsg4": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UDP4_SENDMSG),
    "cgroup/sendmsg6": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UDP6_SENDMSG),
    "cgroup/sendmsg_unix": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UNIX_SENDMSG),
    "cgroup/recvmsg4": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UDP4_RECVMSG),
    "cgroup/recvmsg6": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UDP6_RECVMSG),
    "cgroup/recvmsg_unix": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UNIX_RECVMSG),
    "cgroup/getpeername4": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_INET4_GETPEERNAME),
    "cgroup/getpeername6": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_INET6_GETPEERNAME),
    "cgroup/getpeername_unix": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UNIX_GETPEERNAME),
    "cgroup/getsockname4": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_INET4_GETSOCKNAME),
    "cgroup/getsockname6": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_INET6_GETSOCKNAME),
    "cgroup/getsockname_unix": SectionKind(_P.CGROUP_SOCK_ADDR, _A.CGROUP_UNIX_GETSOCKNAME),
    "cgroup/sysctl": SectionKind(_P.CGROUP_SYSCTL, _A.CGROUP_SYSCTL),
    "cgroup/getsockopt": SectionKind(_P.CGROUP_SOCKOPT, _A.CGROUP_GETSOCKOPT),
    "cgroup/setsockopt": SectionKind(_P.CGROUP_SOCKOPT, _A.CGROUP_SETSOCKOPT),
    "cgroup/dev": SectionKind(_P.CGROUP_DEVICE, _A.CGROUP_DEVICE),
    "sk_lookup": SectionKind(_P.SK_LOOKUP, _A.SK_LOOKUP),
    "netfilter": SectionKind(_P.NETFILTER, _A.NETFILTER),
}
_SLEEPABLE = (
    *("fentry", "fexit", "fmod_ret", "lsm", "iter", "uprobe", "uretprobe", "usdt"),
    *("uprobe.multi", "uretprobe.multi", "uprobe.session", "struct_ops"),
)
for _name in _SLEEPABLE:
    _WITH_TARGET[f"{_name}.s"] = _WITH_TARGET[_name]._replace(flags=abi.BPF_F_SLEEPABLE)
for _name in ("xdp", "xdp/devmap", "xdp/cpumap"):
    _PREFIXES[_name.replace("xdp", "xdp.frags")] = _PREFIXES[_name]._replace(
        flags=abi.BPF_F_XDP_HAS_FRAGS
    )
_LONGEST = max(map(len, _PREFIXES))


def meaning_of(section: str) -> Meaning:
    """Return what a section's name says; the type is UNSPEC where it says nothing.

    A question mark in front means that the programs are not to be loaded unless they are asked for.
    """
    name = section[1:] if section.startswith("?") else section
    known = _known(name)
    kind = _WITH_TARGET.get(known) or _PREFIXES.get(known, _UNKNOWN)
    rest = name[len(known) :]
    target = rest[1:] if rest.startswith("/") else ""
    return Meaning(kind, target or None, autoload=name == section)


def _known(name: str) -> str:
    """Return the longest part of a name, from its start, that is known; or nothing."""
    before_slash = name.partition("/")[0]
    if before_slash in _WITH_TARGET:
        return before_slash
    lengths = range(min(len(name), _LONGEST), 0, -1)
    return next((name[:length] for length in lengths if name[:length] in _PREFIXES), "")
