"""What is told of programs, types and links on kernels that know less of them than we do."""

from __future__ import annotations

import ctypes
import errno
import json

import known_fields
import pytest
from click.testing import CliRunner

from pybpfthrottle.bpf import abi, btf_objects, features, program_info, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.bpf.program_info import ProgramInfo
from pybpfthrottle.cli import bpf_show
from pybpfthrottle.cli.commands.bpf import bpf

TYPES = b"the bytes of some types"


def tell(kernel, kind, release, fill) -> None:
    """Have OBJ_GET_INFO_BY_FD fill in a record as a release does, which checks every byte."""

    def handler(attr: Attr) -> None:
        room = attr.info.info_len
        known = known_fields.info_bytes(kind, release)
        if any(ctypes.string_at(attr.info.info, room)[known:]):
            raise syscall.error(errno.E2BIG, Cmd.OBJ_GET_INFO_BY_FD)
        fill(kind.from_address(attr.info.info))

    kernel.handlers[Cmd.OBJ_GET_INFO_BY_FD] = handler
    kernel.handlers[Cmd.BTF_GET_FD_BY_ID] = lambda attr: kernel.create()


def some_types(info: abi.BtfInfo) -> None:
    """As many bytes of the types as there is room for, and their size."""
    ctypes.memmove(info.btf or None, TYPES, min(info.btf_size, len(TYPES)))
    info.btf_size, info.id = len(TYPES), 7
    if info.name_len:
        ctypes.memmove(info.name, b"vmlinux\0", 8)


@pytest.mark.parametrize(("release", "name"), [((4, 18), ""), ((5, 10), ""), ((5, 11), "vmlinux")])
def test_types_are_read_where_they_have_no_names(kernel, release, name: str) -> None:
    """Before Linux 5.11 a BTF has no name, and asking for one is E2BIG."""
    tell(kernel, abi.BtfInfo, release, some_types)
    assert btf_objects.info_by_id(7) == (7, name, len(TYPES), False)
    assert btf_objects.data_by_id(7) == TYPES
    assert kernel.still_open() == 0


@pytest.mark.parametrize("release", [(4, 14), (4, 17), (4, 18), (6, 12)])
def test_a_program_without_functions_has_no_addresses(kernel, release) -> None:
    """Where nothing is compiled, or before Linux 4.18, none are asked for."""
    tell(kernel, abi.ProgInfo, release, lambda info: None)
    assert program_info.function_addresses(3) == ()
    assert program_info.line_records(3) == []


def test_what_4_14_does_not_tell_of_a_program_is_null(kernel) -> None:
    """Neither the time of the boot nor root is made of zeros that the kernel has not written."""
    info = ProgramInfo(1, "", 8, "ab", load_time_ns=0, created_by_uid=0)
    record = bpf_show.program_record(info)
    assert record["loaded_at"] is None
    assert record["uid"] is None
    known = bpf_show.program_record(info._replace(load_time_ns=1))
    assert known["loaded_at"] > 0
    assert known["uid"] == 0
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("command", "cmd", "since"),
    [
        (["link", "list"], Cmd.LINK_GET_NEXT_ID, "5.8"),
        (["link", "show", "3"], Cmd.LINK_GET_FD_BY_ID, "5.8"),
        (["prog", "list"], Cmd.PROG_GET_NEXT_ID, "4.13"),
    ],
)
def test_a_kernel_that_cannot_list_says_since_when_it_can(kernel, command, cmd, since) -> None:
    """The release is named in place of an errno."""
    kernel.refuse(cmd, errno.EINVAL)
    done = CliRunner().invoke(bpf, command)
    assert str(done.exception) == (
        f"cannot show a {'link' if command[0] == 'link' else 'program'}:"
        f" this kernel does not support BPF_{cmd.name} (Linux {since})"
    )


@pytest.mark.parametrize(
    ("number", "known"),
    [(errno.EBADF, True), (errno.EPERM, True), (errno.EINVAL, False)],
)
def test_who_may_not_ask_does_not_make_an_old_kernel(kernel, number: int, known: bool) -> None:
    """Only what the kernel says of a command that it does not have tells that it is old."""
    kernel.refuse(Cmd.PROG_QUERY, number)
    assert features.QUERY.available() is known
