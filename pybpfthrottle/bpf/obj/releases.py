"""The first Linux release that has each kind of program, map, helper function and instruction.

For people: what a kernel really has is tried, by ``features``. A helper may be there since, but not
for every type of program. Source: the history of linux/bpf.h and of kernel/bpf/.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Union

from pybpfthrottle.bpf.abi import AttachType, MapType, ProgType

_A, _M, _P = AttachType, MapType, ProgType

PROGRAM_TYPES = {
    _P.SOCKET_FILTER: "3.19",
    _P.KPROBE: "4.1",
    _P.SCHED_CLS: "4.1",
    _P.SCHED_ACT: "4.1",
    _P.TRACEPOINT: "4.7",
    _P.XDP: "4.8",
    _P.PERF_EVENT: "4.9",
    _P.CGROUP_SKB: "4.10",
    _P.CGROUP_SOCK: "4.10",
    _P.LWT_IN: "4.10",
    _P.LWT_OUT: "4.10",
    _P.LWT_XMIT: "4.10",
    _P.SOCK_OPS: "4.13",
    _P.SK_SKB: "4.14",
    _P.CGROUP_DEVICE: "4.15",
    _P.SK_MSG: "4.17",
    _P.RAW_TRACEPOINT: "4.17",
    _P.CGROUP_SOCK_ADDR: "4.17",
    _P.LWT_SEG6LOCAL: "4.18",
    _P.LIRC_MODE2: "4.18",
    _P.SK_REUSEPORT: "4.19",
    _P.FLOW_DISSECTOR: "4.20",
    _P.CGROUP_SYSCTL: "5.2",
    _P.RAW_TRACEPOINT_WRITABLE: "5.2",
    _P.CGROUP_SOCKOPT: "5.3",
    _P.TRACING: "5.5",
    _P.STRUCT_OPS: "5.6",
    _P.EXT: "5.6",
    _P.LSM: "5.7",
    _P.SK_LOOKUP: "5.9",
    _P.SYSCALL: "5.14",
    _P.NETFILTER: "6.4",
}

# Only those that are newer than their program type, and that the kernel insists on.
ATTACH_TYPES = {
    _A.CGROUP_INET4_POST_BIND: "4.17",
    _A.CGROUP_INET6_POST_BIND: "4.17",
    _A.CGROUP_UDP4_SENDMSG: "4.18",
    _A.CGROUP_UDP6_SENDMSG: "4.18",
    _A.CGROUP_UDP4_RECVMSG: "5.2",
    _A.CGROUP_UDP6_RECVMSG: "5.2",
    _A.MODIFY_RETURN: "5.7",
    _A.TRACE_ITER: "5.8",
    _A.CGROUP_INET4_GETPEERNAME: "5.8",
    _A.CGROUP_INET6_GETPEERNAME: "5.8",
    _A.CGROUP_INET4_GETSOCKNAME: "5.8",
    _A.CGROUP_INET6_GETSOCKNAME: "5.8",
    _A.XDP_DEVMAP: "5.8",
    _A.XDP_CPUMAP: "5.9",
    _A.CGROUP_INET_SOCK_RELEASE: "5.9",
    _A.SK_SKB_VERDICT: "5.13",
    _A.SK_REUSEPORT_SELECT_OR_MIGRATE: "5.14",
    _A.TRACE_KPROBE_MULTI: "5.18",
    _A.LSM_CGROUP: "6.0",
    _A.TRACE_UPROBE_MULTI: "6.6",
    _A.CGROUP_UNIX_CONNECT: "6.7",
    _A.CGROUP_UNIX_SENDMSG: "6.7",
    _A.CGROUP_UNIX_RECVMSG: "6.7",
    _A.CGROUP_UNIX_GETPEERNAME: "6.7",
    _A.CGROUP_UNIX_GETSOCKNAME: "6.7",
    _A.TRACE_KPROBE_SESSION: "6.10",
    _A.TRACE_UPROBE_SESSION: "6.13",
}

MAP_TYPES = {
    _M.HASH: "3.19",
    _M.ARRAY: "3.19",
    _M.PROG_ARRAY: "4.2",
    _M.PERF_EVENT_ARRAY: "4.3",
    _M.PERCPU_HASH: "4.6",
    _M.PERCPU_ARRAY: "4.6",
    _M.STACK_TRACE: "4.6",
    _M.CGROUP_ARRAY: "4.8",
    _M.LRU_HASH: "4.10",
    _M.LRU_PERCPU_HASH: "4.10",
    _M.LPM_TRIE: "4.11",
    _M.ARRAY_OF_MAPS: "4.12",
    _M.HASH_OF_MAPS: "4.12",
    _M.DEVMAP: "4.14",
    _M.SOCKMAP: "4.14",
    _M.CPUMAP: "4.15",
    _M.XSKMAP: "4.18",
    _M.SOCKHASH: "4.18",
    _M.CGROUP_STORAGE: "4.19",
    _M.REUSEPORT_SOCKARRAY: "4.19",
    _M.PERCPU_CGROUP_STORAGE: "4.20",
    _M.QUEUE: "4.20",
    _M.STACK: "4.20",
    _M.SK_STORAGE: "5.2",
    _M.DEVMAP_HASH: "5.4",
    _M.STRUCT_OPS: "5.6",
    _M.RINGBUF: "5.8",
    _M.INODE_STORAGE: "5.10",
    _M.TASK_STORAGE: "5.11",
    _M.BLOOM_FILTER: "5.16",
    _M.USER_RINGBUF: "6.1",
    _M.CGRP_STORAGE: "6.2",
    _M.ARENA: "6.9",
}

# Helpers were numbered as they came: the first number that each release added.
_HELPERS = (
    *((1, "3.19"), (4, "4.1"), (12, "4.2"), (17, "4.3"), (23, "4.4"), (26, "4.5"), (27, "4.6")),
    *((31, "4.8"), (37, "4.9"), (42, "4.10"), (45, "4.11"), (46, "4.12"), (48, "4.13")),
    *((51, "4.14"), (54, "4.15"), (58, "4.16"), (60, "4.17"), (65, "4.18"), (81, "4.19")),
    *((84, "4.20"), (91, "5.0"), (93, "5.1"), (99, "5.2"), (109, "5.3"), (111, "5.5")),
    *((116, "5.6"), (119, "5.7"), (125, "5.8"), (136, "5.9"), (142, "5.10"), (156, "5.11")),
    *((163, "5.12"), (164, "5.13"), (166, "5.14"), (169, "5.15"), (176, "5.16"), (180, "5.17")),
    *((186, "5.18"), (194, "5.19"), (204, "6.0"), (208, "6.1"), (210, "6.2")),
)
_FIRST_NUMBERS = [number for number, _ in _HELPERS]


def of_helper(number: int) -> str:
    """Return the first release with a helper function, by its number in linux/bpf.h."""
    return _HELPERS[max(0, bisect_right(_FIRST_NUMBERS, number) - 1)][1]


def since_when(kind: type[Union[MapType, ProgType]], number: int) -> str:
    """Return what a type is called and since when there is one: "type ringbuf, since Linux 5.8"."""
    try:
        known = kind(number)
    except ValueError:
        return f"type {number}"
    release = PROGRAM_TYPES.get(known) if isinstance(known, ProgType) else MAP_TYPES.get(known)
    return f"type {known.name.lower()}" + (f", since Linux {release}" if release else "")


def order(release: str) -> tuple[int, ...]:
    """Return what releases are compared by: 5.10 comes after 5.9."""
    return tuple(map(int, release.split(".")))
