"""Programs and links of the real kernel: test runs, infos, statistics, pins, updates."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from compiled import compiled
from since import running, since

from pybpfthrottle.bpf import btf_objects, links, loader, maps, programs
from pybpfthrottle.bpf.abi import AttachType, LinkType, ProgType
from pybpfthrottle.bpf.links import Link
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.obj import asm, elf
from pybpfthrottle.bpf.obj.btf import Btf, Kind
from pybpfthrottle.bpf.program_info import run_statistics
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.linux.cgroup import Cgroup

PACKET = bytes(range(64))
MARK = 77
CONTEXT = struct.pack("=3I", 0, 0, MARK)


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A bpf file system of the test's own."""
    subprocess.run(["mount", "-t", "bpf", "bpf", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def loaded() -> Iterator[Object]:
    """The programs of values.bpf.c."""
    with loader.load(elf.read_object(compiled("values"), name="values")) as found:
        yield found


@pytest.fixture
def cgroup_fd(scratch: Cgroup) -> Iterator[int]:
    """A descriptor of a cgroup of the test's own."""
    fd = scratch.open()
    yield fd
    os.close(fd)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What closes the test's programs and links."""
    with ExitStack() as own:
        yield own


def constant(
    value: int,
    type: ProgType = ProgType.CGROUP_SKB,
    attach_type: AttachType = AttachType.CGROUP_INET_EGRESS,
) -> Program:
    """A program that returns a number."""
    return programs.load(
        asm.return_imm(value),
        type=type,
        license="GPL",
        name=f"return{value}",
        expected_attach_type=attach_type,
    )


def test_a_run_gives_the_packet_and_the_context_back(loaded: Object) -> None:
    """A program's longer packet and changed mark are there after its run."""
    result = loaded.programs["longer"].test_run(PACKET, context=CONTEXT)
    assert result.retval == len(PACKET) + 100
    assert result.data == PACKET + bytes(100)
    assert result.context[:12] == struct.pack("=3I", 0, 0, MARK + 1)


def test_a_run_is_repeated(loaded: Object) -> None:
    """A test run with repeat runs so many times, which the program's counter shows."""
    loaded.programs["count"].test_run(PACKET, repeat=1000)
    assert loaded.maps["counts"].typed(int, int)[0] == 1000 * len(PACKET)


def test_the_maps_of_a_loaded_object_have_names_for_their_fields(loaded: Object) -> None:
    """What a program wrote is read by the names that its source has, also of its variables."""
    loaded.programs["longer"].test_run(PACKET, context=CONTEXT)
    loaded.programs["count"].test_run(PACKET, repeat=3)
    ((key, value),) = loaded.maps["values"].typed_by_btf().items()
    assert key == {"id": MARK, "port": 80}
    assert (value["packets"], value["delta"], value["state"]) == (1, -2, "BUSY")
    assert loaded.maps["values.bss"].typed_by_btf()[0] == {"runs": 3}


def test_a_raw_tracepoint_runs_on_a_cpu_with_arguments() -> None:
    """The context of a raw tracepoint is its arguments, and the CPU can be chosen."""
    code = asm.insn(0x79, dst=0, src=1, off=8) + asm.exit_()
    with programs.load(code, type=ProgType.RAW_TRACEPOINT, license="GPL") as program:
        result = program.test_run(context=struct.pack("=2Q", 1, 42), cpu=0)
        assert result.retval == 42


def test_what_cannot_be_run_is_refused() -> None:
    """A type without test runs is an OSError that names the command."""
    with constant(1, ProgType.CGROUP_DEVICE, AttachType.CGROUP_DEVICE) as program:
        with pytest.raises(OSError, match="BPF_PROG_TEST_RUN") as caught:
            program.test_run(PACKET)
        assert caught.value.errno == 524


def test_a_program_tells_what_it_is(loaded: Object) -> None:
    """The info names the program, its type, its maps, and the length of its code."""
    info = loaded.programs["count"].info()
    assert (info.name, info.type, info.created_by_uid) == ("count", ProgType.SCHED_CLS, 0)
    used = {loaded.maps[name].info().id for name in ("counts", "values.bss")}
    assert set(info.map_ids) == used
    assert info.gpl_compatible
    assert info.xlated_bytes % 8 == 0
    assert info.memory_bytes >= info.xlated_bytes > 100
    assert (info.verified_instructions > 10) == (running() >= (5, 16))
    assert len(info.tag) == 16


@since("5.8")
def test_runs_are_measured_while_statistics_are_enabled(loaded: Object) -> None:
    """The run count grows by the runs inside of run_statistics, and by none after it."""
    program = loaded.programs["longer"]
    with run_statistics():
        program.test_run(PACKET, repeat=10)
        inside = program.info()
    program.test_run(PACKET, repeat=10)
    assert inside.run_count == program.info().run_count == 10
    assert inside.run_time_ns > 0


def test_a_pinned_program_outlives_its_descriptor(bpffs: Path) -> None:
    """A program that is pinned and closed is opened again and runs."""
    with constant(1) as program:
        program.pin(bpffs / "one")
        info = program.info()
    with programs.open_pinned(bpffs / "one") as again:
        assert again.info() == info
        assert again.test_run(PACKET).retval == 1
        assert again.type == ProgType.CGROUP_SKB


def test_a_program_is_listed_and_opened_by_id() -> None:
    """A program's id is among all ids, and opens the same program."""
    with constant(1) as program:
        own = program.info().id
        assert own in list(programs.all_ids())
        with programs.open_by_id(own) as again:
            assert again.info().id == own


@since("5.8")
def test_an_id_that_is_gone_is_not_found() -> None:
    """Opening an id that does not exist is FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        programs.open_by_id((1 << 31) - 1)
    with pytest.raises(FileNotFoundError):
        maps.open_by_id((1 << 31) - 1)
    with pytest.raises(FileNotFoundError):
        links.open_by_id((1 << 31) - 1)


@since("5.8")
def test_a_link_tells_what_it_is(scratch: Cgroup, cgroup_fd: int, stack: ExitStack) -> None:
    """The info of a link to a cgroup names program, cgroup and hook."""
    program = stack.enter_context(constant(1))
    link = stack.enter_context(links.create_link(program, cgroup_fd, program.expected_attach_type))
    info = link.info()
    assert info.type == LinkType.CGROUP
    assert info.program_id == program.info().id
    assert info.cgroup_id == scratch.id
    assert info.attach_type == AttachType.CGROUP_INET_EGRESS
    assert info.id in list(links.all_ids())
    assert info in list(links.all_infos())
    with links.open_by_id(info.id) as again:
        assert again.info() == info


@since("5.7")
def test_a_link_gets_another_program(cgroup_fd: int, stack: ExitStack) -> None:
    """Update replaces the program; with instead_of only if it is that one."""
    first, second, third = (stack.enter_context(constant(n)) for n in (1, 0, 1))
    link = stack.enter_context(links.create_link(first, cgroup_fd, AttachType.CGROUP_INET_EGRESS))
    link.update(second)
    assert link.info().program_id == second.info().id
    link.update(third, instead_of=second)
    assert link.info().program_id == third.info().id
    with pytest.raises(PermissionError):
        link.update(first, instead_of=second)


@since("5.7")
def test_a_pinned_link_stays_attached(cgroup_fd: int, bpffs: Path, stack: ExitStack) -> None:
    """A pinned link outlives its descriptor; opened and forced it is detached for all."""
    program = stack.enter_context(constant(1))
    hook = AttachType.CGROUP_INET_EGRESS
    with links.create_link(program, cgroup_fd, hook) as link:
        link.pin(bpffs / "link")
    own = program.info().id
    assert links.query(cgroup_fd, hook).program_ids == (own,)
    with links.open_pinned(bpffs / "link") as again:
        again.force_detach()
        assert links.query(cgroup_fd, hook).program_ids == ()
        with pytest.raises(OSError, match="BPF_LINK_UPDATE") as caught:
            again.update(program)
        assert caught.value.errno == errno.ENOLINK


def test_a_raw_tracepoint_is_attached(stack: ExitStack) -> None:
    """A link to a raw tracepoint tells its name; one that is not there is refused."""
    program = stack.enter_context(
        programs.load(asm.return_imm(0), type=ProgType.RAW_TRACEPOINT, license="GPL")
    )
    link = stack.enter_context(links.attach_raw_tracepoint(program, "sched_process_exit"))
    info = link.info()
    assert (info.type, info.target) == (LinkType.RAW_TRACEPOINT, "sched_process_exit")
    with pytest.raises(FileNotFoundError):
        links.attach_raw_tracepoint(program, "no_such_tracepoint")


@pytest.fixture
def interface() -> Iterator[int]:
    """The index of an interface of the test's own."""
    name = f"t{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", f"{name}p"], check=True)
    yield int(Path(f"/sys/class/net/{name}/ifindex").read_text())
    subprocess.run(["ip", "link", "del", name], check=True)


@pytest.mark.parametrize(
    ("type", "attach_type", "kind"),
    [
        pytest.param(ProgType.XDP, AttachType.XDP, LinkType.XDP, marks=since("5.9")),
        pytest.param(ProgType.SCHED_CLS, AttachType.TCX_INGRESS, LinkType.TCX, marks=since("6.6")),
    ],
)
def test_an_interface_is_attached_to(
    interface: int, type: ProgType, attach_type: AttachType, kind: LinkType, stack: ExitStack
) -> None:
    """XDP and TCX programs attach to an interface by its index, which the link tells."""
    program = stack.enter_context(constant(2, type, attach_type))
    link: Link = stack.enter_context(links.create_link(program, interface, attach_type))
    info = link.info()
    assert (info.type, info.ifindex, info.attach_type) == (kind, interface, attach_type)


@since("5.11")
def test_the_kernels_own_btf_is_listed() -> None:
    """Among all BTF is vmlinux, and its data is what sysfs has."""
    infos = [btf_objects.info_by_id(number) for number in btf_objects.all_ids()]
    own = next(info for info in infos if info.name == "vmlinux")
    assert own.is_kernel
    data = btf_objects.data_by_id(own.id)
    assert data == Path("/sys/kernel/btf/vmlinux").read_bytes()
    assert len(data) == own.size_bytes
    assert Btf(data).find(Kind.STRUCT, "task_struct")
