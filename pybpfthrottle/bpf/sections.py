"""What the name of a section says of the programs in it, as libbpf lays it down.

Source: Documentation/bpf/libbpf/program_types.rst of the kernel.
"""

from __future__ import annotations

from typing import NamedTuple, Optional

from pybpfthrottle.bpf.abi import AttachType, ProgType


class SectionKind(NamedTuple):
    """The program type, and the attach type where the name says one."""

    type: ProgType
    attach_type: Optional[AttachType] = None


_EXACT = {
    "cgroup_skb/ingress": SectionKind(ProgType.CGROUP_SKB, AttachType.CGROUP_INET_INGRESS),
    "cgroup_skb/egress": SectionKind(ProgType.CGROUP_SKB, AttachType.CGROUP_INET_EGRESS),
    "cgroup/skb": SectionKind(ProgType.CGROUP_SKB),
    "cgroup/sock": SectionKind(ProgType.CGROUP_SOCK, AttachType.CGROUP_INET_SOCK_CREATE),
    "cgroup/sock_create": SectionKind(ProgType.CGROUP_SOCK, AttachType.CGROUP_INET_SOCK_CREATE),
    "cgroup/sock_release": SectionKind(ProgType.CGROUP_SOCK, AttachType.CGROUP_INET_SOCK_RELEASE),
    "cgroup/post_bind4": SectionKind(ProgType.CGROUP_SOCK, AttachType.CGROUP_INET4_POST_BIND),
    "cgroup/post_bind6": SectionKind(ProgType.CGROUP_SOCK, AttachType.CGROUP_INET6_POST_BIND),
    "cgroup/dev": SectionKind(ProgType.CGROUP_DEVICE, AttachType.CGROUP_DEVICE),
    "sockops": SectionKind(ProgType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS),
}
_PREFIXES = {
    "socket": SectionKind(ProgType.SOCKET_FILTER),
    "classifier": SectionKind(ProgType.SCHED_CLS),
    "tc": SectionKind(ProgType.SCHED_CLS),
    "action": SectionKind(ProgType.SCHED_ACT),
    "xdp": SectionKind(ProgType.XDP, AttachType.XDP),
    "kprobe": SectionKind(ProgType.KPROBE),
    "kretprobe": SectionKind(ProgType.KPROBE),
    "tracepoint": SectionKind(ProgType.TRACEPOINT),
    "tp": SectionKind(ProgType.TRACEPOINT),
    "raw_tracepoint": SectionKind(ProgType.RAW_TRACEPOINT),
    "raw_tp": SectionKind(ProgType.RAW_TRACEPOINT),
    "perf_event": SectionKind(ProgType.PERF_EVENT),
}


def kind_of(section: str) -> Optional[SectionKind]:
    """What a section holds, or None for a name that says nothing."""
    return _EXACT.get(section) or _PREFIXES.get(section.partition("/")[0])
