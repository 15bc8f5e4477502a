from __future__ import annotations

import ctypes
import errno

import pytest

from pybpfthrottle.bpf import abi, privileges, programs
from pybpfthrottle.bpf.abi import AttachType, Cmd, ProgType
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.obj import asm

CGROUP_FD = 17
INGRESS = AttachType.CGROUP_INET_INGRESS


def program(type=ProgType.CGROUP_SKB, attach_type=INGRESS, attach_to=None):
    """A program of a kind."""
    return programs.load(
        asm.return_imm(1),
        type=type,
        license="GPL",
        name="main",
        expected_attach_type=attach_type,
        attach_to=attach_to,
    )


def test_the_attach_type_with_number_zero_is_one(kernel):
    """CGROUP_INET_INGRESS is 0, and an attach type like any other."""
    with program() as one, one.attach(cgroup=CGROUP_FD):
        (attr,) = kernel.given(Cmd.LINK_CREATE)
    assert (attr.link_create.target_fd, attr.link_create.attach_type) == (CGROUP_FD, INGRESS)
    assert attr.link_create.prog_fd == one.fd or one.fd < 0


def test_a_link_owns_one_descriptor(kernel, tmp_path):
    """What is opened to attach is closed, and closing the link closes the rest."""
    with program() as one:
        before = kernel.still_open()
        link = one.attach(cgroup=tmp_path)
        assert kernel.still_open() == before + 1
        link.close()
        link.close()
        assert kernel.still_open() == before


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({}, "'main' needs cgroup="),
        ({"cgroup": 5, "interface": "lo"}, "'main' cannot be attached by interface="),
        ({"netns": "/proc/self/ns/net"}, "'main' cannot be attached by netns="),
    ],
)
def test_the_place_has_to_suit_the_program(kernel, places, words):
    """A place that is missing, or one too many, is a TypeError that says which."""
    with program() as one, pytest.raises(TypeError, match=words):
        one.attach(**places)
    assert kernel.given(Cmd.LINK_CREATE) == []


@pytest.mark.parametrize("type", [ProgType.CGROUP_SKB, ProgType.SCHED_CLS, ProgType.SK_SKB])
def test_what_is_left_open_has_to_be_said(kernel, type):
    """A type of program with several attach types needs one, and the choices are named."""
    with program(type, None) as one, pytest.raises(TypeError, match="attach_type=AttachType"):
        one.attach(cgroup=CGROUP_FD)


@pytest.mark.parametrize(
    ("type", "attach_type", "remedy"),
    [
        (ProgType.SOCKET_FILTER, None, "SO_ATTACH_BPF"),
        (ProgType.SYSCALL, None, "test_run"),
        (ProgType.XDP, AttachType.XDP_DEVMAP, "DEVMAP"),
        (ProgType.EXT, None, "load it with targets="),
        (1000, None, "type 1000"),
    ],
)
def test_what_no_link_attaches_says_what_to_use(kernel, type, attach_type, remedy):
    """A kind of program that cannot be attached is one clear error with its remedy."""
    with program(type, attach_type) as one, pytest.raises(AttachError, match=remedy) as caught:
        one.attach()
    assert "cannot attach 'main'" in str(caught.value)
    assert caught.value.errno == 0


@pytest.mark.parametrize("type", list(ProgType)[1:], ids=lambda known: known.name)
def test_each_type_of_program_is_attached_or_has_a_remedy(kernel, type):
    """No type of program is forgotten: attach says for each what it needs, or what to do."""
    words = "needs [a-z]+=|attach_type=AttachType|not supported; "
    with program(type, None) as one, pytest.raises((TypeError, AttachError), match=words):
        one.attach()


def test_an_older_kernel_is_told_of(kernel):
    """EINVAL names the release with such links, and what an older kernel has."""
    kernel.refuse(Cmd.LINK_CREATE, errno.EINVAL)
    with (
        program() as one,
        pytest.raises(AttachError, match=r"need Linux 5\.7; .* links"),
    ):
        one.attach(cgroup=CGROUP_FD)
    with program(ProgType.SCHED_CLS, AttachType.TCX_INGRESS) as one:
        with pytest.raises(AttachError, match=r"to interface 3: .*need Linux 6\.6"):
            one.attach(interface=3)


def test_missing_capabilities_are_named(kernel, monkeypatch):
    """EPERM names the capabilities that this type of program needs."""
    kernel.refuse(Cmd.LINK_CREATE, errno.EPERM)
    monkeypatch.setattr(privileges, "effective_capabilities", lambda: 0)
    with program() as one, pytest.raises(AttachError, match="CAP_NET_ADMIN") as caught:
        one.attach(cgroup=CGROUP_FD)
    assert caught.value.errno == errno.EPERM
    assert isinstance(caught.value.__cause__, PermissionError)


def test_a_program_that_was_loaded_for_a_function_takes_no_place(kernel):
    """A tracing program is attached without a name, to where it was loaded for."""
    with program(ProgType.TRACING, AttachType.TRACE_FENTRY, "do_exit") as one:
        kernel.handlers[Cmd.RAW_TRACEPOINT_OPEN] = lambda _: kernel.create()
        with one.attach():
            (attr,) = kernel.given(Cmd.RAW_TRACEPOINT_OPEN)
    assert attr.raw_tracepoint.name == 0


@pytest.mark.parametrize(
    ("kind", "places", "words"),
    [
        ((ProgType.TRACING, AttachType.TRACE_FENTRY, "do_exit"), {"cookie": 1}, "cookie= .* 6.0"),
        ((ProgType.CGROUP_SKB, INGRESS), {"cgroup": CGROUP_FD, "first": True}, "first= .* 6.17"),
    ],
)
def test_an_option_that_is_newer_is_told_of(kernel, kind, places, words):
    """EINVAL names the release with the option, where the links are older than that."""
    kernel.refuse(Cmd.LINK_CREATE, errno.EINVAL)
    with program(*kind) as one, pytest.raises(AttachError, match=words):
        one.attach(**places)


@pytest.mark.parametrize(
    ("kind", "places", "words"),
    [
        ((ProgType.EXT, None, "one"), {"cookie": 1}, "cannot be attached by cookie="),
        ((ProgType.TRACING, AttachType.TRACE_ITER, "task"), {"interface": 1}, "by interface="),
        ((ProgType.KPROBE, None), {"function": ["a", "b"]}, "takes one function"),
        ((ProgType.TRACEPOINT, None), {"function": "a"}, "by function="),
    ],
)
def test_an_option_has_to_suit_the_program(kernel, kind, places, words):
    """What a kind of program does not take is refused, and not left out."""
    with program(*kind) as one, pytest.raises(TypeError, match=words):
        one.attach(**places)


def test_iterators_visit_one_place(kernel):
    """Two restrictions at once, and an order that there is not, are refused."""
    with program(ProgType.TRACING, AttachType.TRACE_ITER, "cgroup") as one:
        with pytest.raises(TypeError, match="visits one place"):
            one.iterate(cgroup=CGROUP_FD, pid=1)
        with pytest.raises(TypeError, match="order='sideways' is not one of self, down"):
            one.iterate(cgroup=CGROUP_FD, order="sideways")
        one.attach(cgroup=CGROUP_FD).close()
    (attr,) = kernel.given(Cmd.LINK_CREATE)
    assert attr.link_create.iter_info_len == ctypes.sizeof(abi.IterInfo)
