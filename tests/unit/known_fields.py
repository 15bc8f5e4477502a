"""Which fields of commands and info records a release of Linux knows; others have to be zeros.

Source: the history of include/uapi/linux/bpf.h and of the LAST_FIELDs in kernel/bpf/syscall.c.
"""

from __future__ import annotations

import ctypes
import errno

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import Attr, Cmd

Release = tuple[int, ...]
Known = list[tuple[Release, str]]

# The member of the union that a command is given in, and since which release the last field is.
_LOOKUP: Known = [((4, 14), "value"), ((5, 1), "flags")]
_BATCH: Known = [((5, 6), "flags")]
_NEXT_ID: Known = [((4, 13), "next_id")]
COMMANDS: dict[Cmd, tuple[str, Known]] = {
    Cmd.MAP_CREATE: (
        "map_create",
        [
            ((4, 14), "numa_node"),
            ((4, 15), "map_name"),
            ((4, 16), "map_ifindex"),
            ((4, 18), "btf_value_type_id"),
            ((5, 6), "btf_vmlinux_value_type_id"),
            ((5, 16), "map_extra"),
        ],
    ),
    Cmd.MAP_LOOKUP_ELEM: ("map_elem", _LOOKUP),
    Cmd.MAP_UPDATE_ELEM: ("map_elem", [((4, 14), "flags")]),
    Cmd.MAP_DELETE_ELEM: ("map_elem", [((4, 14), "key")]),
    Cmd.MAP_GET_NEXT_KEY: ("map_elem", [((4, 14), "value")]),
    Cmd.PROG_LOAD: (
        "prog_load",
        [
            ((4, 14), "prog_flags"),
            ((4, 15), "prog_ifindex"),
            ((4, 17), "expected_attach_type"),
            ((5, 0), "line_info_cnt"),
            ((5, 5), "attach_prog_fd"),
            ((5, 14), "fd_array"),
            ((5, 17), "core_relo_rec_size"),
            ((6, 4), "log_true_size"),
        ],
    ),
    Cmd.OBJ_PIN: ("obj_pin", [((4, 14), "bpf_fd"), ((4, 15), "file_flags"), ((6, 5), "path_fd")]),
    Cmd.OBJ_GET: ("obj_pin", [((4, 14), "bpf_fd"), ((4, 15), "file_flags"), ((6, 5), "path_fd")]),
    Cmd.PROG_ATTACH: ("prog_attach", [((4, 14), "attach_flags"), ((5, 6), "replace_bpf_fd")]),
    Cmd.PROG_DETACH: ("prog_attach", [((4, 14), "attach_type"), ((6, 6), "replace_bpf_fd")]),
    Cmd.PROG_TEST_RUN: (
        "test_run",
        [((4, 14), "duration"), ((5, 2), "ctx_out"), ((5, 10), "cpu"), ((5, 18), "batch_size")],
    ),
    Cmd.PROG_GET_NEXT_ID: ("get_id", _NEXT_ID),
    Cmd.MAP_GET_NEXT_ID: ("get_id", _NEXT_ID),
    Cmd.PROG_GET_FD_BY_ID: ("get_id", [((4, 13), "id")]),
    Cmd.MAP_GET_FD_BY_ID: ("get_id", [((4, 13), "id"), ((4, 15), "open_flags")]),
    Cmd.OBJ_GET_INFO_BY_FD: ("info", [((4, 13), "info")]),
    Cmd.PROG_QUERY: (
        "query",
        [((4, 15), "prog_cnt"), ((6, 0), "prog_attach_flags"), ((6, 6), "revision")],
    ),
    Cmd.RAW_TRACEPOINT_OPEN: ("raw_tracepoint", [((4, 17), "prog_fd"), ((6, 10), "cookie")]),
    Cmd.BTF_LOAD: ("btf_load", [((4, 18), "btf_log_level")]),
    Cmd.BTF_GET_FD_BY_ID: ("get_id", [((4, 18), "id")]),
    Cmd.MAP_LOOKUP_AND_DELETE_ELEM: ("map_elem", [((4, 20), "value"), ((5, 14), "flags")]),
    Cmd.MAP_FREEZE: ("map_elem", [((5, 2), "map_fd")]),
    Cmd.BTF_GET_NEXT_ID: ("get_id", [((5, 4), "next_id")]),
    Cmd.MAP_LOOKUP_BATCH: ("batch", _BATCH),
    Cmd.MAP_LOOKUP_AND_DELETE_BATCH: ("batch", _BATCH),
    Cmd.MAP_UPDATE_BATCH: ("batch", _BATCH),
    Cmd.MAP_DELETE_BATCH: ("batch", _BATCH),
    Cmd.LINK_CREATE: ("link_create", [((5, 7), "flags")]),
    Cmd.LINK_UPDATE: ("link_update", [((5, 7), "old_prog_fd")]),
    Cmd.LINK_GET_FD_BY_ID: ("get_id", [((5, 8), "id")]),
    Cmd.LINK_GET_NEXT_ID: ("get_id", [((5, 8), "next_id")]),
    Cmd.ENABLE_STATS: ("enable_stats", [((5, 8), "type")]),
    Cmd.ITER_CREATE: ("iter_create", [((5, 8), "flags")]),
    Cmd.LINK_DETACH: ("link_detach", [((5, 9), "link_fd")]),
}

# The same of what OBJ_GET_INFO_BY_FD fills in.
INFOS: dict[type[ctypes.Structure], Known] = {
    abi.ProgInfo: [
        ((4, 13), "xlated_prog_insns"),
        ((4, 15), "name"),
        ((4, 16), "netns_ino"),
        ((4, 18), "jited_func_lens"),
        ((5, 0), "prog_tags"),
        ((5, 1), "run_cnt"),
        ((5, 12), "recursion_misses"),
        ((5, 16), "verified_insns"),
        ((6, 0), "attach_btf_id"),
    ],
    abi.MapInfo: [
        ((4, 13), "map_flags"),
        ((4, 15), "name"),
        ((4, 16), "netns_ino"),
        ((4, 18), "btf_value_type_id"),
        ((5, 16), "map_extra"),
    ],
    abi.BtfInfo: [((4, 18), "id"), ((5, 11), "kernel_btf")],
    abi.LinkInfo: [((5, 8), "details")],
}


def refusal(cmd: Cmd, attr: Attr, release: Release) -> int:
    """The errno for a command: it is not known, or a byte is set behind what is known; or 0.

    CHECK_ATTR looks behind a command's last field, and bpf(2) itself behind the whole union.
    """
    member, known = COMMANDS[cmd]
    end = _end(type(getattr(attr, member)), known, release)
    union = max(
        _end(type(getattr(attr, name)), fields, release) for name, fields in COMMANDS.values()
    )
    union = (union + 7) // 8 * 8
    if any(bytes(attr)[union:]):
        return errno.E2BIG
    return errno.EINVAL if not end or any(bytes(attr)[end:union]) else 0


def info_bytes(kind: type[ctypes.Structure], release: Release) -> int:
    """How many bytes a release has of an info record; behind them it takes zeros alone."""
    return _end(kind, INFOS[kind], release)


def _end(kind: type[ctypes.Structure], known: Known, release: Release) -> int:
    """Where the last field ends that a release knows; 0 where it knows none."""
    names = [name for since, name in known if since <= release]
    field = getattr(kind, names[-1]) if names else None
    return field.offset + field.size if field else 0
