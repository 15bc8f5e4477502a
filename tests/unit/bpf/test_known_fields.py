"""What is created on a kernel that looks at every byte behind what it knows, as all kernels do."""

from __future__ import annotations

import ctypes
import errno

import known_fields
import pytest
from fake_kernel import FakeKernel

from pybpfthrottle.bpf import abi, maps, programs, syscall
from pybpfthrottle.bpf.abi import AttachType, Attr, Cmd, MapType, ProgType
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.bpf.obj.specs import MapSpec
from pybpfthrottle.bpf.programs import SourceInfo

RELEASES = [(4, 14), (4, 15), (4, 17), (4, 19), (5, 4), (5, 10), (6, 1), (6, 12)]
LONGEST = "fifteen_letters"


@pytest.fixture(params=RELEASES, ids=lambda release: ".".join(map(str, release)))
def kernel(request, monkeypatch):
    """A kernel of each release, which checks every byte."""
    checking = FakeKernel()
    checking.release = request.param
    for cmd in known_fields.COMMANDS:
        refuse_unknown(checking, cmd)
    monkeypatch.setattr(syscall, "bpf", checking)
    yield checking
    checking.close_all()


def refuse_unknown(kernel: FakeKernel, cmd: Cmd) -> None:
    """Have a command refused as far as the release does not know it."""

    def handler(attr: Attr) -> None:
        number = known_fields.refusal(cmd, attr, kernel.release)
        if number:
            raise syscall.error(number, cmd)

    kernel.handlers[cmd] = handler


def test_a_map_with_all_that_may_be_left_out_is_created(kernel) -> None:
    """A name of the greatest length, and BTF: what a kernel does not know is zeros to the end."""
    spec = MapSpec(LONGEST, MapType.ARRAY, 4, 4, 1, value_type=2)
    maps.create(spec, btf_fd=9).close()
    created = kernel.given(Cmd.MAP_CREATE)[-1].map_create
    assert created.map_name == (LONGEST.encode() if kernel.release >= (4, 15) else b"")
    assert created.btf_fd == (9 if kernel.release >= (4, 18) else 0)


def test_a_program_with_all_that_may_be_left_out_is_loaded(kernel) -> None:
    """The same of a program's name, attach type and source."""
    source = SourceInfo(9, bytes(abi.FuncInfo(0, 1)), bytes(abi.LineInfo(0, 1, 1, 1)))
    programs.load(
        asm.return_imm(1),
        type=ProgType.CGROUP_SKB,
        license="GPL",
        name=LONGEST,
        expected_attach_type=AttachType.CGROUP_INET_EGRESS,
        source=source,
    ).close()
    loaded = kernel.given(Cmd.PROG_LOAD)[-1].prog_load
    assert loaded.prog_name == (LONGEST.encode() if kernel.release >= (4, 15) else b"")
    assert loaded.expected_attach_type == int(kernel.release >= (4, 17))
    assert loaded.prog_btf_fd == (9 if kernel.release >= (5, 0) else 0)


@pytest.mark.parametrize("cmd", known_fields.COMMANDS)
def test_each_byte_behind_a_command_is_looked_at(cmd: Cmd) -> None:
    """The check finds any byte that is set behind a command's last field, in any release."""
    known = known_fields.COMMANDS[cmd][1]
    for release in (since for since, _ in known):
        clean = [at for at in range(ctypes.sizeof(Attr)) if not refused(cmd, at, release)]
        assert clean == list(range(len(clean)))
        assert 4 <= len(clean) <= ctypes.sizeof(Attr)


def refused(cmd: Cmd, at: int, release) -> int:
    """The answer where one byte alone is set."""
    data = bytearray(ctypes.sizeof(Attr))
    data[at] = 1
    number = known_fields.refusal(cmd, Attr.from_buffer(data), release)
    assert number in (0, errno.EINVAL, errno.E2BIG)
    return number
