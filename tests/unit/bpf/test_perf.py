"""The second door to the kernel, and what is attached through it, on kernels that are made up."""

from __future__ import annotations

import errno
import os
import re

import pytest

from pybpfthrottle.bpf import perf, perf_abi, privileges, programs, syscall
from pybpfthrottle.bpf.abi import Cmd, ProgType
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.bpf.tracing import events, kernel_probes, sampling, tracefs, usdt, user_probes


class Events:
    """Perf events that are made up: descriptors, and the commands that were done on them."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.opened = []
        self.done = []

    def open_event(self, attr, *, pid=-1, cpu=-1):
        """Open an event, as a descriptor of something else."""
        self.opened.append((attr.type, attr.config, attr.config2, pid))
        return self.kernel.create()

    def ioctl(self, fd, request, argument=0):
        """Take down a command."""
        self.done.append((request, argument))


@pytest.fixture
def made_up(kernel, monkeypatch):
    """A kernel with the types 6 and 7 of probes, whose return bits are 0."""
    made = Events(kernel)
    monkeypatch.setattr(perf, "open_event", made.open_event)
    monkeypatch.setattr(perf, "ioctl", made.ioctl)
    files = {"kprobe/type": "6\n", "uprobe/type": "7\n", "kprobe/format/retprobe": "config:0\n"}
    monkeypatch.setattr(perf, "read", lambda path: files[path.partition("devices/")[2]])
    return made


def program(type=ProgType.KPROBE, section="kprobe", **more):
    """A program of a kind."""
    return programs.load(
        asm.return_imm(0), type=type, license="GPL", name="main", section=section, **more
    )


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 298), ("aarch64", 241), ("s390x", 331)])
def test_each_machine_has_its_number(machine, number):
    """The second door has numbers for the machines that the first one has them for."""
    assert syscall.number_of("perf_event_open", perf._NUMBERS, machine, bits=64) == number
    assert perf._NUMBERS.keys() == syscall._NUMBERS.keys()


def test_a_probe_is_a_link(kernel, made_up):
    """A link is made for the event, which needs no descriptor of its own from then on."""
    with program() as one:
        before = kernel.still_open()
        with one.attach(function="do_exit+4", cookie=3):
            (attr,) = kernel.given(Cmd.LINK_CREATE)
            assert attr.link_create.perf_event.bpf_cookie == 3
            assert kernel.still_open() == before + 1
        assert kernel.still_open() == before
    assert made_up.opened == [(6, 0, 4, -1)]
    assert [request for request, _ in made_up.done] == [perf_abi.PERF_EVENT_IOC_ENABLE]


def test_before_links_the_event_takes_the_program(kernel, made_up):
    """Before Linux 5.15 ioctl attaches; the event's descriptor stands for a link. No cookies."""
    kernel.refuse(Cmd.LINK_CREATE, errno.EINVAL)
    with program(section="kretprobe/do_exit", attach_to="do_exit") as one:
        before = kernel.still_open()
        with one.attach():
            assert kernel.still_open() == before + 1
            assert made_up.done == [
                (perf_abi.PERF_EVENT_IOC_SET_BPF, one.fd),
                (perf_abi.PERF_EVENT_IOC_ENABLE, 0),
            ]
        assert made_up.opened == [(6, 1, 0, -1)]
        with pytest.raises(AttachError, match=r"with a cookie: .*5\.15"):
            one.attach(cookie=1)
        assert kernel.still_open() == before


@pytest.mark.parametrize(
    ("files", "capabilities", "words"),
    [
        ({"perf_event_paranoid": "3\n"}, 0, "lacks CAP_PERFMON.*perf_event_paranoid is 3"),
        ({"lockdown": "none integrity [confidentiality]\n"}, -1, "locked down .confidentiality"),
        ({"lockdown": "[none] integrity\n"}, -1, "security module or a seccomp filter"),
    ],
)
def test_a_refusal_says_why(monkeypatch, files, capabilities, words):
    """EACCES is explained by what the process lacks, or by what may have refused."""
    monkeypatch.setattr(privileges, "effective_capabilities", lambda: capabilities)
    monkeypatch.setattr(perf, "read", lambda path: files.get(os.path.basename(path), ""))
    error = OSError(errno.EACCES, "Permission denied", "perf_event_open")
    assert re.search(words, events.why(error))


def test_a_refused_event_leaves_nothing_open(kernel, made_up, monkeypatch):
    """A profile on several CPUs that fails on the last closes the others."""
    monkeypatch.setattr(sampling, "online", lambda: [0, 1, 2])

    def open_event(attr, *, pid, cpu):
        if cpu == 2:
            raise OSError(errno.ENODEV, "No such device", "perf_event_open")
        return kernel.create()

    monkeypatch.setattr(perf, "open_event", open_event)
    with program(ProgType.PERF_EVENT, "perf_event") as one:
        before = kernel.still_open()
        with pytest.raises(AttachError, match="No such device"):
            one.attach(frequency_hz=99)
        assert kernel.still_open() == before


def test_no_tracefs_is_said(monkeypatch):
    """Where tracefs is not mounted and may not be, the error says how to mount it."""

    def refused(kind):
        raise PermissionError(errno.EPERM, "Operation not permitted", "fsmount")

    monkeypatch.setattr(tracefs, "_PLACES", ("/nowhere",))
    monkeypatch.setattr(perf, "mount_nowhere", refused)
    with pytest.raises(AttachError, match="as root: mount -t tracefs"):
        tracefs.tracepoint_id("sched/sched_switch")


def test_a_kernel_without_probes_is_told(kernel, monkeypatch, tmp_path):
    """Where there are neither events for probes nor tracefs's files, the option is named."""
    (tmp_path / "events").mkdir()
    monkeypatch.setattr(tracefs, "_PLACES", (str(tmp_path),))
    monkeypatch.setattr(events, "device_type", lambda device: None)
    with program() as one, pytest.raises(AttachError, match="no kprobes"):
        one.attach(function="do_exit")
    with program(section="uprobe") as one:
        with pytest.raises(AttachError, match="CONFIG_UPROBE_EVENTS"):
            one.attach(binary="/proc/self/exe", offset=64)


def test_an_unknown_section_goes_by_what_is_given(kernel, made_up):
    """A program without a section, as one that is opened by its id, is told by its place."""
    with program(section=None) as one:
        one.attach(function="do_exit", returns=True).close()
        one.attach(binary="/proc/self/exe", offset=64).close()
        with pytest.raises(TypeError, match=r"cannot be attached by frequency_hz="):
            one.attach(function="do_exit", frequency_hz=5)
    assert [kind for kind, *_ in made_up.opened] == [6, 7]


@pytest.mark.parametrize(
    ("text", "place"),
    [("do_exit", ("do_exit", 0)), ("a.isra.0+0x10", ("a.isra.0", 16)), ("b+8", ("b", 8))],
)
def test_places_of_the_kernel(text, place):
    """A function, and an offset in either notation."""
    assert kernel_probes.place_of(text) == place


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("libc.so.6:malloc", ("libc.so.6", "malloc", 0)),
        ("/bin/a:b+0x4", ("/bin/a", "b", 4)),
        ("/bin/a:operator+", ("/bin/a", "operator+", 0)),
    ],
)
def test_targets_of_user_space(text, target):
    """A binary, a function, and an offset; a C++ name may end as an offset begins."""
    assert user_probes.target_of(text) == target
    with pytest.raises(AttachError, match="write BINARY:FUNCTION"):
        user_probes.target_of("malloc")


@pytest.mark.parametrize(
    ("arguments", "machine", "expected"),
    [
        ("8@%rdi", "EM_X86_64", [(0, 1, 112, False, 0)]),
        ("-4@$-9 1@%al", "EM_X86_64", [(2**64 - 9, 0, 0, True, 32), (0, 1, 80, False, 56)]),
        ("-4@-1204(%rbp)", "EM_X86_64", [(2**64 - 1204, 2, 32, True, 32)]),
        ("8@x0 -4@[sp, 12] 4@5", "EM_AARCH64", [
            (0, 1, 0, False, 0), (12, 2, 248, True, 32), (5, 0, 0, False, 32),
        ]),
    ],
)  # fmt: skip
def test_arguments_of_probes(arguments, machine, expected):
    """Constants, registers and memory are told apart, with their sizes and signs."""
    spec = usdt.spec(arguments, machine, cookie=7)
    found = [usdt._ARGUMENT.unpack_from(spec, 16 * number) for number in range(len(expected))]
    assert found == expected
    assert usdt._END.unpack(spec[16 * 12 :]) == (7, len(expected))


def test_arguments_that_are_not_supported():
    """A place that cannot be described is named."""
    for arguments, machine in (("8@%xmm0", "EM_X86_64"), ("8@%r1", "EM_S390")):
        with pytest.raises(AttachError, match="not supported"):
            usdt.spec(arguments, machine, 0)
