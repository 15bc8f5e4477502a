from __future__ import annotations

import errno
import logging
import os

import pytest

from pybpfthrottle.backends.ebpf import attach
from pybpfthrottle.bpf import links, privileges
from pybpfthrottle.bpf.abi import BPF_F_ALLOW_MULTI, AttachType, Cmd, ProgType
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.errors import AttachError, CgroupError
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.settings import AttachPolicy

INGRESS, EGRESS = AttachType.CGROUP_INET_INGRESS, AttachType.CGROUP_INET_EGRESS
FALLBACK = [
    ("DEBUG", "Auto-detecting best BPF attach method"),
    ("DEBUG", "Found OSError with errno 22 in error chain"),
    ("WARNING", "Modern attach failed with EINVAL, falling back to legacy method..."),
    ("INFO", "✅ Successfully attached using legacy method!"),
]


@pytest.fixture
def program(kernel):
    """A loaded program."""
    with Program(
        kernel.create(), name="main", type=ProgType.CGROUP_SKB, expected_attach_type=None
    ) as found:
        yield found


@pytest.fixture
def cgroup(tmp_path):
    """A directory in place of a cgroup: only the kernel could tell."""
    return Cgroup(str(tmp_path))


@pytest.fixture
def lines(caplog):
    """The lines of the log as (level, text), without those that frame each attachment."""
    caplog.set_level(logging.DEBUG, logger=attach.__name__)
    frame = ("Opened cgroup file", "Attached main to", "Successfully attached eBPF")
    return lambda: [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if not record.getMessage().startswith(frame)
    ]


def commands(kernel):
    """The commands that were given, in order."""
    return [call.cmd for call in kernel.calls]


def wrapped(*errors):
    """The last of some exceptions, each raised from the one before it."""
    for cause, error in zip(errors, errors[1:]):
        error.__cause__ = cause
    return errors[-1]


def test_an_errno_is_found_three_deep():
    """The errno of the innermost of three wrapped exceptions is found."""
    error = wrapped(OSError(errno.EINVAL, "x"), ValueError(), RuntimeError(), KeyError())
    assert attach.find_errno(error, errno.EINVAL) == errno.EINVAL


def test_an_errno_is_found_in_the_context():
    """An exception that was raised while another was handled wraps it too."""
    outer = RuntimeError()
    outer.__context__ = OSError(errno.ENOSYS, "x")
    assert attach.find_errno(outer, errno.EINVAL, errno.ENOSYS) == errno.ENOSYS


def test_an_errno_is_found_beside_a_cause():
    """Where an exception has both a cause and another context, both are looked through."""
    outer = RuntimeError()
    outer.__context__ = OSError(errno.EINVAL, "x")
    outer.__cause__ = ValueError()
    assert attach.find_errno(outer, errno.EINVAL) == errno.EINVAL


def test_an_errno_that_is_not_wanted_is_not_found():
    """Other errnos in a chain do not count."""
    error = wrapped(OSError(errno.EPERM, "x"), ValueError())
    assert attach.find_errno(error, errno.EINVAL) is None


def test_the_outermost_errno_is_found_first():
    """Of several wanted errnos the outermost is the answer."""
    error = wrapped(OSError(errno.EINVAL, "x"), OSError(errno.ENOSYS, "y"))
    assert attach.find_errno(error, errno.EINVAL, errno.ENOSYS) == errno.ENOSYS


def test_a_chain_in_a_circle_ends():
    """Exceptions that wrap each other in a circle are looked through once."""
    first, second = ValueError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first
    assert attach.find_errno(first, errno.EINVAL) is None


def test_a_link_is_tried_first(kernel, program, cgroup, lines):
    """Where links work, one is made, and the log says so."""
    attachment = attach.attach(program, cgroup, INGRESS)
    assert attach.rung(attachment) == "link"
    assert Cmd.PROG_ATTACH not in commands(kernel)
    assert lines() == [
        ("DEBUG", "Auto-detecting best BPF attach method"),
        ("INFO", "✅ Successfully attached using modern method (bpf_link_create)"),
    ]
    attachment.detach()


def test_a_link_has_no_flags(kernel, program, cgroup):
    """A link is asked for with flags 0, which every kernel takes."""
    attach.attach(program, cgroup, EGRESS).detach()
    (attr,) = kernel.given(Cmd.LINK_CREATE)
    link = attr.link_create
    assert (link.prog_fd, link.attach_type, link.flags) == (program.fd, EGRESS, 0)


def test_each_attachment_is_framed_by_what_is_attached_where(program, cgroup, caplog):
    """The log names the cgroup, the program, the mode and the direction."""
    caplog.set_level(logging.DEBUG, logger=attach.__name__)
    attach.attach(program, cgroup, INGRESS).detach()
    mode = "with mode: AllowMultiple (BPF_F_ALLOW_MULTI - allows coexistence)"
    messages = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert messages[0] == ("DEBUG", f'Opened cgroup file: "{cgroup.path}"')
    assert messages[-2:] == [
        ("DEBUG", f'Attached main to "{cgroup.path}" {mode}'),
        ("INFO", "Successfully attached eBPF ingress program"),
    ]


def test_einval_falls_back_to_the_legacy_call(kernel, program, cgroup, lines):
    """Where the kernel has no links (EINVAL), the legacy call is used, and the log says why."""
    kernel.refuse(Cmd.LINK_CREATE, errno.EINVAL)
    attachment = attach.attach(program, cgroup, EGRESS)
    assert attach.rung(attachment) == "legacy"
    assert commands(kernel) == [Cmd.LINK_CREATE, Cmd.PROG_ATTACH]
    assert lines() == FALLBACK
    attachment.detach()


def test_the_legacy_call_lets_others_attach_too(kernel, program, cgroup):
    """The legacy call is made in the mode that replaces nobody's program."""
    attach.attach(program, cgroup, EGRESS, AttachPolicy("legacy")).detach()
    (attr,) = kernel.given(Cmd.PROG_ATTACH)
    call = attr.prog_attach
    assert (call.attach_bpf_fd, call.attach_type) == (program.fd, EGRESS)
    assert call.attach_flags == BPF_F_ALLOW_MULTI


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES, errno.E2BIG, errno.ENOENT])
def test_another_error_is_not_tried_again(kernel, program, cgroup, lines, number):
    """Any error but EINVAL is final, and the log says so."""
    kernel.refuse(Cmd.LINK_CREATE, number)
    with pytest.raises(AttachError) as caught:
        attach.attach(program, cgroup, INGRESS)
    assert caught.value.errno == number
    assert caught.value.__cause__.errno == number
    assert Cmd.PROG_ATTACH not in commands(kernel)
    assert lines() == [
        ("DEBUG", "Auto-detecting best BPF attach method"),
        ("ERROR", "Modern attach failed with non-EINVAL error, not retrying"),
    ]


def test_the_legacy_call_on_request(kernel, program, cgroup, lines):
    """Who asks for the legacy call gets it, without a link being tried."""
    attach.attach(program, cgroup, INGRESS, AttachPolicy("legacy")).detach()
    assert commands(kernel) == [Cmd.PROG_ATTACH, Cmd.PROG_DETACH]
    assert lines() == [
        ("INFO", "Using legacy BPF attach method (bpf_prog_attach)"),
        ("INFO", "✅ Successfully attached using legacy method!"),
    ]


def test_a_link_on_request_does_not_fall_back(kernel, program, cgroup, lines):
    """Who asks for a link gets it or an error."""
    kernel.refuse(Cmd.LINK_CREATE, errno.EINVAL)
    with pytest.raises(AttachError, match=r"does not support BPF links \(Linux 5.7\)") as caught:
        attach.attach(program, cgroup, INGRESS, AttachPolicy("link"))
    assert caught.value.errno == errno.EINVAL
    assert Cmd.PROG_ATTACH not in commands(kernel)
    assert lines() == []


def test_an_unknown_method_is_refused(kernel, program, cgroup):
    """A method that does not exist is an error, and not taken for auto."""
    with pytest.raises((AttachError, ValueError)):
        attach.attach(program, cgroup, INGRESS, AttachPolicy("modern"))
    assert kernel.calls == []


def test_the_error_of_the_fallback_is_the_one_to_report(kernel, program, cgroup):
    """If the legacy call fails as well, its error is reported: the first was only EINVAL."""
    kernel.refuse(Cmd.LINK_CREATE, errno.EINVAL)
    kernel.refuse(Cmd.PROG_ATTACH, errno.ENOENT)
    with pytest.raises(AttachError, match="the cgroup was removed") as caught:
        attach.attach(program, cgroup, INGRESS)
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOENT, "the cgroup was removed"),
        (errno.E2BIG, "64 programs"),
        (524, "ENOTSUPP"),
    ],
)
def test_refusals_are_explained(kernel, program, cgroup, number, text):
    """A refusal tells what it means, and names the program and the cgroup."""
    kernel.refuse(Cmd.LINK_CREATE, number)
    with pytest.raises(AttachError) as caught:
        attach.attach(program, cgroup, INGRESS)
    assert text in str(caught.value)
    assert f"'main' to {cgroup.path}" in str(caught.value)


@pytest.mark.parametrize(
    ("capabilities", "text"),
    [(0, "lacks CAP_BPF and CAP_NET_ADMIN"), ((1 << 41) - 1, "seccomp filter")],
)
def test_eperm_is_explained_by_what_the_process_may(
    kernel, program, cgroup, monkeypatch, capabilities, text
):
    """EPERM is a lack of capabilities, or with all of them another program that allows none."""
    monkeypatch.setattr(privileges, "effective_capabilities", lambda: capabilities)
    kernel.refuse(Cmd.LINK_CREATE, errno.EPERM)
    with pytest.raises(AttachError, match=text):
        attach.attach(program, cgroup, INGRESS)


@pytest.mark.parametrize("number", [0, errno.EPERM])
def test_no_descriptor_of_the_cgroup_stays_open(kernel, program, cgroup, number):
    """Whether it worked or not, the cgroup's directory is closed again."""
    kernel.refuse(Cmd.LINK_CREATE, number)
    try:
        attach.attach(program, cgroup, INGRESS).detach()
    except AttachError:
        assert number
    opened = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    assert cgroup.path not in [os.readlink(path) for path in opened if os.path.lexists(path)]


def test_a_cgroup_that_is_gone_is_a_cgroup_error(kernel, program, cgroup):
    """A directory that does not exist is a CgroupError, before the kernel is asked."""
    with pytest.raises(CgroupError, match="No such file"):
        attach.attach(program, Cgroup(cgroup.path + "/gone"), INGRESS)
    assert kernel.calls == []


def test_a_link_is_detached_by_closing_it(kernel, program, cgroup):
    """Detaching a link closes its descriptor, once."""
    attachment = attach.attach(program, cgroup, INGRESS)
    assert kernel.still_open() == 2
    attachment.detach()
    attachment.detach()
    assert kernel.still_open() == 1
    assert Cmd.PROG_ATTACH not in commands(kernel)


def test_a_legacy_attachment_is_detached_once(kernel, program, cgroup):
    """Detaching a legacy attachment twice asks the kernel once."""
    attachment = attach.attach(program, cgroup, INGRESS, AttachPolicy("legacy"))
    attachment.detach()
    attachment.detach()
    assert commands(kernel).count(Cmd.PROG_DETACH) == 1


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENODEV, errno.EINVAL])
def test_what_is_detached_already_is_no_error(kernel, program, cgroup, number):
    """A program that someone else took away, or whose cgroup is gone, is detached."""
    kernel.refuse(Cmd.PROG_DETACH, number)
    attach.attach(program, cgroup, INGRESS, AttachPolicy("legacy")).detach()


def test_a_refused_detachment_is_an_error_and_leaks_nothing(kernel, program, cgroup):
    """A detachment that is refused raises, and its descriptors are closed all the same."""
    before = len(os.listdir("/proc/self/fd"))
    attachment = attach.attach(program, cgroup, INGRESS, AttachPolicy("legacy"))
    kernel.refuse(Cmd.PROG_DETACH, errno.EPERM)
    with pytest.raises(PermissionError):
        attachment.detach()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_query_makes_room_for_all(kernel):
    """Where more programs are attached than there was room for, the query is made again."""
    import ctypes

    def answer(attr):
        room, attr.query.prog_cnt = attr.query.prog_cnt, 100
        if room < 100:
            raise OSError(errno.ENOSPC, "No space left on device", "BPF_PROG_QUERY")
        numbers = (ctypes.c_uint32 * 100)(*range(100))
        ctypes.memmove(attr.query.prog_ids, numbers, 400)
        attr.query.attach_flags = 2

    kernel.handlers[Cmd.PROG_QUERY] = answer
    assert links.query(3, INGRESS) == links.Attached(2, tuple(range(100)))
    assert len(kernel.given(Cmd.PROG_QUERY)) == 2
