"""Sections of programs: each is loaded as what its name says, by this package and by bpftool."""

from __future__ import annotations

import pytest
from compiled import compiled
from since import since

from pybpfthrottle.bpf import loader
from pybpfthrottle.bpf.abi import ProgType
from pybpfthrottle.bpf.errors import ObjectFileError
from pybpfthrottle.bpf.obj import elf

SPEC = "object_sections"
PROGRAMS = (
    *("socket_filter", "socket_lenient", "kprobe", "kretprobe", "uprobe"),
    *("uprobe_sleepable", "kprobe_multi", "tc", "classifier", "action"),
    *("tracepoint", "tp", "raw_tp", "raw_tp_writable", "xdp"),
    *("xdp_frags", "xdp_devmap", "xdp_cpumap", "xdp_lenient", "perf_event"),
    *("lwt_in", "lwt_out", "lwt_xmit", "lwt_seg6local", "sockops"),
    *("stream_parser", "stream_verdict", "sk_skb", "sk_msg", "flow_dissector"),
    *("cgroup_ingress", "cgroup_egress", "cgroup_skb", "sock_create", "sock_release"),
    *("sock", "post_bind4", "post_bind6", "bind4", "connect6"),
    *("sendmsg4", "recvmsg6", "getpeername4", "getsockname6", "sysctl"),
    *("getsockopt", "setsockopt", "dev", "sk_lookup", "sk_reuseport"),
    *("sk_reuseport_migrate", "sleeps"),
)
# Than 5.10; before, some are loaded as the type alone.
NEWER = {"uprobe_sleepable": "6.0", "xdp_frags": "5.18", "xdp_cpumap": "5.18", "sleeps": "5.14"}


@pytest.fixture(scope="module")
def spec():
    """A program in each section that needs no target."""
    return elf.read_object(compiled(SPEC), name=SPEC)


def test_all_programs_are_named_here(spec):
    """No program of the fixture is left untested."""
    assert sorted(spec.programs) == sorted(f"in_{name}" for name in PROGRAMS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=since(NEWER[name])) if name in NEWER else name for name in PROGRAMS],
)
def test_the_kernel_has_the_type_that_the_section_says(spec, name):
    """A program is loaded with its type; most types refuse a wrong attach type."""
    with loader.load(spec, [f"in_{name}"]) as loaded:
        (program,) = loaded.programs.values()
        assert program.info().type == spec.programs[program.name].type


def test_a_program_without_a_type_is_refused_with_what_to_do():
    """A section that says nothing is an error only when its program is loaded."""
    spec = elf.read_object(compiled("object_calls"), name="object_calls")
    spec.programs["calls_nothing"].type = ProgType.UNSPEC
    with pytest.raises(ObjectFileError, match=r"spec\.programs\['calls_nothing'\]") as caught:
        loader.load(spec, ["calls_nothing"])
    assert caught.value.section == "tc"
