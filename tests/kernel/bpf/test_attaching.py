"""Programs are attached as their sections say, by a link that detaches them when it is closed."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from compiled import compiled
from since import needs_option, since

from pybpfthrottle.bpf import links, loader, maps, tc
from pybpfthrottle.bpf.abi import AttachType, LinkType, MapType
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.specs import MapSpec, ObjectSpec
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.linux.cgroup import Cgroup

CGROUP_PROGRAMS = {
    "in_cgroup_egress": AttachType.CGROUP_INET_EGRESS,
    "in_cgroup_ingress": AttachType.CGROUP_INET_INGRESS,
    "in_sock_create": AttachType.CGROUP_INET_SOCK_CREATE,
    "in_sock_release": AttachType.CGROUP_INET_SOCK_RELEASE,
    "in_post_bind4": AttachType.CGROUP_INET4_POST_BIND,
    "in_post_bind6": AttachType.CGROUP_INET6_POST_BIND,
    "in_bind4": AttachType.CGROUP_INET4_BIND,
    "in_connect6": AttachType.CGROUP_INET6_CONNECT,
    "in_sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "in_recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "in_getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "in_getsockname6": AttachType.CGROUP_INET6_GETSOCKNAME,
    "in_sockops": AttachType.CGROUP_SOCK_OPS,
    "in_sysctl": AttachType.CGROUP_SYSCTL,
    "in_getsockopt": AttachType.CGROUP_GETSOCKOPT,
    "in_setsockopt": AttachType.CGROUP_SETSOCKOPT,
    "in_dev": AttachType.CGROUP_DEVICE,
}

pytestmark = since("5.9")


@pytest.fixture
def load() -> Iterator[Any]:
    """Loads one program, whichever of the two objects has it."""
    with ExitStack() as stack:

        def one(name: str) -> Program:
            return stack.enter_context(_load(name)).programs[name]

        yield one


def _load(name: str) -> Object:
    sections = elf.read_object(compiled("object_sections"), name="sections")
    return loader.load(sections if name in sections.programs else typed(), [name])


def typed() -> ObjectSpec:
    """The programs that need types to be loaded, and kinds that the other object does not have."""
    return elf.read_object(compiled("attaching"), name="typed")


@pytest.fixture
def interface() -> Iterator[str]:
    """An interface of the test's own."""
    name = f"t{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "link", "add", name, "type", "veth", "peer", f"{name}p"], check=True)
    yield name
    subprocess.run(["ip", "link", "del", name], check=True)


@pytest.fixture
def netns() -> Iterator[str]:
    """The path of a network namespace of the test's own."""
    name = f"t{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield f"/run/netns/{name}"
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.parametrize("name", CGROUP_PROGRAMS)
def test_programs_of_cgroups_attach_where_their_section_says(scratch: Cgroup, load: Any, name: str):
    """The path of a cgroup is enough, and closing the link detaches the program."""
    program = load(name)
    with program.attach(cgroup=scratch.path) as link:
        info = link.info()
    assert (info.type, info.program_id) == (LinkType.CGROUP, program.info().id)
    assert (info.attach_type, info.cgroup_id) == (CGROUP_PROGRAMS[name], scratch.id)
    with pytest.raises(FileNotFoundError):
        links.open_by_id(info.id)


def test_a_cgroup_may_be_a_descriptor(scratch: Cgroup, load: Any):
    """A descriptor of a cgroup is taken in place of its path, and stays the caller's."""
    fd = scratch.open()
    try:
        with load("in_cgroup_egress").attach(cgroup=fd) as link:
            assert link.info().cgroup_id == scratch.id
        assert os.fstat(fd)
    finally:
        os.close(fd)


def test_what_a_section_leaves_open_is_said_by_the_caller(scratch: Cgroup, load: Any):
    """A program in "cgroup/skb" attaches to the direction that is asked for."""
    program = load("in_cgroup_skb")
    for hook in (AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS):
        with program.attach(cgroup=scratch.path, attach_type=hook) as link:
            assert link.info().attach_type == hook


@pytest.mark.parametrize(
    ("name", "kind", "attach_type"),
    [
        ("in_xdp", LinkType.XDP, AttachType.XDP),
        pytest.param("in_xdp_frags", LinkType.XDP, AttachType.XDP, marks=since("5.18")),
        pytest.param("tcx_ingress", LinkType.TCX, AttachType.TCX_INGRESS, marks=since("6.6")),
        pytest.param("tcx_egress", LinkType.TCX, AttachType.TCX_EGRESS, marks=since("6.6")),
    ],
)
def test_an_interface_is_given_by_name_or_index(
    interface: str, load: Any, name: str, kind: LinkType, attach_type: AttachType
):
    """Both name the same interface, which the link tells."""
    program = load(name)
    index = int(Path(f"/sys/class/net/{interface}/ifindex").read_text())
    for place in (interface, index):
        with program.attach(interface=place) as link:
            info = link.info()
            assert (info.type, info.ifindex, info.attach_type) == (kind, index, attach_type)


@since("6.6")
def test_a_program_of_tc_attaches_by_tcx(interface: str, load: Any):
    """A program in "tc" is attached to the direction that is asked for."""
    with load("in_tc").attach(interface=interface, attach_type=AttachType.TCX_EGRESS) as link:
        assert link.info().attach_type == AttachType.TCX_EGRESS


@pytest.mark.parametrize(
    ("name", "attach_type"),
    [("in_flow_dissector", AttachType.FLOW_DISSECTOR), ("in_sk_lookup", AttachType.SK_LOOKUP)],
)
def test_a_network_namespace_is_attached_to(
    netns: str, load: Any, name: str, attach_type: AttachType
):
    """The path of a namespace is enough, which the link tells by its inode."""
    with load(name).attach(netns=netns) as link:
        info = link.info()
    assert (info.type, info.attach_type) == (LinkType.NETNS, attach_type)
    assert info.netns_inode == os.stat(netns).st_ino


@since("6.10")
@pytest.mark.parametrize(
    ("name", "attach_type"),
    [
        ("in_stream_parser", AttachType.SK_SKB_STREAM_PARSER),
        ("in_stream_verdict", AttachType.SK_SKB_STREAM_VERDICT),
        ("verdict", AttachType.SK_SKB_VERDICT),
        ("in_sk_msg", AttachType.SK_MSG_VERDICT),
    ],
)
def test_a_map_of_sockets_is_attached_to(load: Any, name: str, attach_type: AttachType):
    """The sockets of a map get the program, which the link tells by the map's id."""
    with maps.create(MapSpec("sockets", MapType.SOCKMAP, 4, 4, 1)) as sockets:
        with load(name).attach(map=sockets) as link:
            info = link.info()
        assert (info.type, info.attach_type) == (LinkType.SOCKMAP, attach_type)
        assert info.map_id == sockets.info().id


def test_a_raw_tracepoint_is_named_by_its_section_or_by_the_caller(load: Any):
    """The section's tracepoint is taken unless another is given."""
    program = load("in_raw_tp")
    with program.attach() as link:
        assert link.info().target == "sched_switch"
    with program.attach(tracepoint="sched_process_exit") as link:
        assert link.info().target == "sched_process_exit"
    with pytest.raises(AttachError, match="to tracepoint no_such_one") as caught:
        program.attach(tracepoint="no_such_one")
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@since("5.11")
def test_a_typed_tracepoint_takes_nothing():
    """A program in tp_btf runs as soon as it is attached, and no more when its link is closed."""
    with loader.load(typed(), ["newtask"]) as loaded:

        def runs() -> int:
            before = loaded.variables["seen"].get()
            thread = threading.Thread(target=os.getpid)
            thread.start()
            thread.join()
            return loaded.variables["seen"].get() - before  # type: ignore[operator]

        assert runs() == 0
        with loaded.programs["newtask"].attach():
            assert runs() >= 1
        assert runs() == 0


@since("5.11")
def test_an_iterator_runs_as_it_is_read():
    """Reading the file of an iterator calls its program for each map, and once at the end."""
    with loader.load(typed(), ["each_map"]) as loaded, loaded.programs["each_map"].attach() as link:
        assert link.info().type == LinkType.ITER
        with link.open_iterator() as file:
            assert file.read() == b""
        assert loaded.variables["seen"].get() >= 1 + len(loaded.maps)


def test_only_an_iterator_is_read(scratch: Cgroup, load: Any):
    """A link of another type is refused as an iterator."""
    with load("in_cgroup_egress").attach(cgroup=scratch.path) as link:
        with pytest.raises(OSError, match="BPF_ITER_CREATE"):
            link.open_iterator()


def test_a_place_that_is_not_there_is_named(load: Any):
    """The error says which program was to be attached, and to what."""
    program = load("in_xdp")
    with pytest.raises(AttachError, match=r"'in_xdp' \(xdp\) to interface no_such_one: no "):
        program.attach(interface="no_such_one")
    with pytest.raises(AttachError, match=r"to cgroup /no/such: .*No such file"):
        load("in_cgroup_egress").attach(cgroup="/no/such")
    with pytest.raises(AttachError, match="to cgroup /proc"):
        load("in_cgroup_egress").attach(cgroup="/proc")


@since("6.6")
def test_programs_of_an_interface_have_an_order(interface: str, load: Any):
    """A program goes before or after another, by program or link, or before all of them."""
    with ExitStack() as stack:

        def attached(**order: Any) -> tuple[Program, Any]:
            program = stack.enter_context(_load("tcx_egress")).programs["tcx_egress"]
            return program, stack.enter_context(program.attach(interface=interface, **order))

        middle, link = attached()
        last, _ = attached(after=middle)
        before, _ = attached(before=link)
        first, _ = attached(first=True)
        index = socket.if_nametoindex(interface)
        order = links.query(index, AttachType.TCX_EGRESS).program_ids
        assert order == tuple(one.info().id for one in (first, before, middle, last))
        with pytest.raises(TypeError, match="goes to one place"):
            attached(first=True, before=middle)
        with pytest.raises(AttachError, match="to interface"):
            attached(before=stack.enter_context(_load("tcx_egress")).programs["tcx_egress"])


@since("6.7")
def test_a_pair_of_netkit_has_programs_in_an_order():
    """A program of a netkit device goes before another one."""
    name = f"t{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "link", "add", name, "type", "netkit"], capture_output=True)
    needs_option("CONFIG_NETKIT", works=not made.returncode)
    try:
        with ExitStack() as stack:
            last, first = (
                stack.enter_context(_load("netkit_primary")).programs["netkit_primary"]
                for _ in range(2)
            )
            stack.enter_context(last.attach(interface=name))
            stack.enter_context(first.attach(interface=name, before=last))
            found = links.query(socket.if_nametoindex(name), AttachType.NETKIT_PRIMARY)
            assert found.program_ids == tuple(one.info().id for one in (first, last))
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)


@since("6.17")
def test_programs_of_a_cgroup_have_an_order(scratch: Cgroup):
    """A program of a cgroup goes before the one of a link, or before all of them."""
    with ExitStack() as stack:
        programs = [
            stack.enter_context(_load("in_cgroup_egress")).programs["in_cgroup_egress"]
            for _ in range(3)
        ]
        middle, before, first = programs
        link = stack.enter_context(middle.attach(cgroup=scratch.path))
        stack.enter_context(before.attach(cgroup=scratch.path, before=link))
        stack.enter_context(first.attach(cgroup=scratch.path, first=True))
        with pytest.raises(TypeError, match="before or after a link"):
            first.attach(cgroup=scratch.path, after=middle)
        fd = scratch.open()
        stack.callback(os.close, fd)
        found = links.query(fd, AttachType.CGROUP_INET_EGRESS).program_ids
        assert found == tuple(one.info().id for one in (first, before, middle))


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_xdp_has_modes(interface: str, load: Any, mode: str):
    """A driver runs the program itself, or the kernel for it; a veth can do both."""
    with load("in_xdp").attach(interface=interface, mode=mode) as link:
        shown = subprocess.run(
            ["ip", "-d", "link", "show", interface], check=True, capture_output=True, text=True
        ).stdout
        assert ("xdpgeneric" in shown) == (mode == "generic")
        assert link.info().type == LinkType.XDP
    with pytest.raises(TypeError, match="mode='fast' is not one of native, generic, offload"):
        load("in_xdp").attach(interface=interface, mode="fast")
    with pytest.raises(AttachError, match="to interface"):
        load("in_xdp").attach(interface=interface, mode="offload")


@since("6.4")
def test_a_netfilter_program_is_asked(load: Any):
    """A program at a hook of this network namespace is attached for one family and priority."""
    program = load("filter")
    for given in (
        {"hook": "input"},
        {"hook": "output", "family": "ipv6", "priority": 5},
        {"hook": "prerouting", "defragment": True},
    ):
        with program.attach(**given) as link:
            assert link.info().type == LinkType.NETFILTER
    with pytest.raises(TypeError, match="hook='in' is not one of prerouting, "):
        program.attach(hook="in")
    with pytest.raises(AttachError, match="to hook input"):
        program.attach(hook="input", priority=-(2**31))


@pytest.mark.parametrize("attach_type", [AttachType.TCX_INGRESS, AttachType.TCX_EGRESS])
def test_the_tc_of_old_kernels(interface: str, load: Any, attach_type: AttachType):
    """A filter of tc is there until it is detached, and the qdisc that was made for it too."""
    index = socket.if_nametoindex(interface)
    direction = "ingress" if attach_type == AttachType.TCX_INGRESS else "egress"

    def filters() -> str:
        command = ["tc", "filter", "show", "dev", interface, direction]
        return subprocess.run(command, capture_output=True, text=True).stdout

    first = tc.attach(load("in_tc"), index, attach_type)
    with tc.attach(load("in_tc"), index, attach_type, priority=7) as second:
        assert filters().count("in_tc") >= 2
        first.detach()
        first.detach()
        assert "pref 7" in filters()
        with pytest.raises(OSError, match="BPF_OBJ_GET_INFO_BY_FD"):
            second.info()
    assert "in_tc" not in filters()
    shown = subprocess.run(
        ["tc", "qdisc", "show", "dev", interface], capture_output=True, text=True
    )
    # Its maker went first, and left it to the other.
    assert "clsact" in shown.stdout
    with tc.attach(load("in_tc"), index, attach_type):
        pass
    with pytest.raises(OSError, match="No such device"):
        tc.attach(load("in_tc"), 1 << 30, attach_type)
