"""Structs of functions that the kernel calls: loaded, attached, replaced, taken back."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import uuid
from contextlib import contextmanager, suppress

import pytest
from compiled import compiled
from since import needs_option, since

from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.errors import AttachError, ExternError, ObjectFileError
from pybpfthrottle.bpf.obj import elf

pytestmark = since("5.13")
BYTES = 50_000
SCHED_EXT = "/sys/kernel/sched_ext"


@pytest.fixture
def spec():
    """The spec of the congestion controls."""
    return elf.read_object(compiled("object_struct_ops"), name="controls")


@pytest.fixture
def loaded(spec):
    """The loaded congestion controls."""
    with loader.load(spec) as found:
        yield found


def transfer(control):
    """Send through a connection with a congestion control. Raises FileNotFoundError."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())
        client.settimeout(20)
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(20)
            client.sendall(bytes(BYTES))
            left = BYTES
            while left:
                left -= len(accepted.recv(left))


@pytest.mark.parametrize(
    ("struct", "control"),
    [
        pytest.param("with_link", "pybpft_link", marks=since("6.4")),
        ("without", "pybpft_plain"),
    ],
)
def test_a_congestion_control_is_used_until_it_is_taken_back(spec, struct, control):
    """Connections have a control of ours while it is attached, with a link and without."""
    for name in {"with_link", "without"} - {struct}:
        spec.maps[name].autoload = False
    with loader.load(spec) as loaded:
        with loaded.struct_ops[struct].attach():
            transfer(control)
            assert loaded.variables["begun"].get() == 1
            assert loaded.variables["acknowledged"].get() > 0
        with pytest.raises(FileNotFoundError):
            transfer(control)


@since("6.4")
def test_a_struct_with_a_link_is_attached_again(loaded):
    """What a link had can be attached again; without one the error says what to do."""
    for name in ("with_link", "without"):
        loaded.struct_ops[name].attach().close()
    with loaded.struct_ops["with_link"].attach():
        transfer("pybpft_link")
    with pytest.raises(AttachError, match="it was attached before; load the object again"):
        loaded.struct_ops["without"].attach()


@since("6.4")
def test_a_link_takes_another_struct(spec):
    """The struct of a link is replaced, as one step, by one of the same name."""
    with loader.load(spec, ["threshold"]) as first, loader.load(spec, ["threshold"]) as second:
        with first.struct_ops["with_link"].attach() as link:
            second.struct_ops["with_link"].replace(link)
            transfer("pybpft_link")
        assert [one.variables["begun"].get() for one in (first, second)] == [0, 1]


@since("6.4")
def test_all_of_an_object_is_attached_at_once(loaded):
    """Attaching an object attaches its structs, and closing that takes them back."""
    with loaded.attach():
        for control in ("pybpft_link", "pybpft_plain"):
            transfer(control)
    with pytest.raises(FileNotFoundError):
        transfer("pybpft_link")


@since("6.4")
def test_a_name_that_is_in_use_is_told(loaded, spec):
    """Two structs of one name cannot be attached, and the error says so."""
    with loaded.struct_ops["with_link"].attach(), loader.load(spec) as again:
        with pytest.raises(AttachError, match=r"'with_link'.* of this name already") as caught:
            again.struct_ops["with_link"].attach()
        assert caught.value.errno == errno.EEXIST


def test_only_the_programs_of_structs_are_loaded(spec):
    """A program that no struct has is not loaded, and says why if it is asked for."""
    assert {name for name, program in spec.programs.items() if program.autoload} == {
        *("begin", "threshold", "undo", "avoid"),
    }
    with pytest.raises(ObjectFileError, match="'unused' is for 0 members"):
        loader.load(spec, ["unused"])


def test_what_the_kernel_lacks_is_named(spec):
    """A struct, or a member that is set, which the kernel does not have is named."""
    needs_option("CONFIG_BPF_JIT", "CONFIG_DEBUG_INFO_BTF", works=True)
    spec.maps["sets_too_much"].autoload = True
    with pytest.raises(ExternError, match=r"'tcp_congestion_ops' has no 'nowhere'"):
        loader.load(spec)
    spec.maps["sets_too_much"].autoload = False
    spec.maps["of_no_kernel"].autoload = True
    with pytest.raises(ExternError, match="no struct_ops 'no_such_ops'"):
        loader.load(spec)


@since("6.12")
def test_a_scheduler_is_given_the_tasks_of_the_machine():
    """A scheduler of sched_ext runs while its link is there, and then the kernel's own does."""
    needs_option("CONFIG_SCHED_CLASS_EXT", works=os.path.isdir(SCHED_EXT))
    with loader.load(elf.read_object(compiled("object_scheduler"), name="sched")) as loaded:
        with loaded.struct_ops["scheduler"].attach():
            assert state() == "enabled"
            subprocess.run(["true"], check=True)
            assert loaded.variables["begun"].get() == 1
            assert loaded.variables["enabled"].get() > 0
        assert state() in ("disabling", "disabled")


def state():
    """Whether sched_ext has a scheduler."""
    with open(f"{SCHED_EXT}/state") as file:
        return file.read().strip()


@since("6.16")
def test_a_queue_is_given_the_packets_of_an_interface():
    """A queueing discipline (Qdisc_ops) has each packet until it is taken off the interface."""
    with queueing() as loaded, interface() as name:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((name, 0))
            subprocess.run(["tc", "qdisc", "add", "dev", name, "root", "pybpft_drop"], check=True)
            for _ in range(3):
                with suppress(OSError):  # ENOBUFS: it was dropped
                    sender.send(bytes(64))
            assert loaded.variables["dropped"].get() >= 3
            assert loaded.variables["begun"].get() >= 1
            subprocess.run(["tc", "qdisc", "del", "dev", name, "root"], check=True)
            sender.send(bytes(64))


@contextmanager
def queueing():
    """The queueing discipline, in force until the end."""
    spec = elf.read_object(compiled("object_qdisc"), name="queue")
    try:
        loaded = loader.load(spec)
    except ExternError as error:
        needs_option("CONFIG_NET_SCH_BPF", works="no struct_ops" not in str(error))
        raise
    with loaded, loaded.struct_ops["queue"].attach():
        yield loaded


@contextmanager
def interface():
    """The name of an interface that is up, and connected to another one."""
    name = f"t{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", f"{name}p"], check=True)
    try:
        for end in (name, f"{name}p"):
            subprocess.run(["ip", "link", "set", end, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)
