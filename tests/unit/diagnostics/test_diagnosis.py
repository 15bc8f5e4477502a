"""Parts of the diagnosis that need no kernel: logs, netlink, reports, and what a check does."""

from __future__ import annotations

import errno
import os
import struct
from contextlib import ExitStack

import pytest

from pybpfthrottle.bpf import features, privileges, syscall
from pybpfthrottle.bpf.abi import Cmd
from pybpfthrottle.diagnostics import kernel, kernel_log, report
from pybpfthrottle.diagnostics.check import Check, Outcome, Setup, passed, skipped
from pybpfthrottle.diagnostics.examine import examine
from pybpfthrottle.diagnostics.kernel_log import Line
from pybpfthrottle.linux import netlink, own_cgroups


def check(attempt, *needs: str) -> Check:
    """A check of a test."""
    return Check("own", "section", "title", "meaning", "remedy", attempt, needs)


def test_a_check_is_skipped_where_one_that_it_needs_was() -> None:
    """The result says which one."""
    with ExitStack() as stack:
        setup = Setup(stack, results={"other": skipped("no reason")})
        result = check(lambda setup: passed("never"), "other").run(setup)
    assert result.outcome is Outcome.SKIP
    assert "other" in result.text


def test_an_error_that_nobody_foresaw_is_a_warning() -> None:
    """The examination goes on."""

    def attempt(setup):
        raise OSError(5, "Input/output error")

    with ExitStack() as stack:
        result = check(attempt).run(Setup(stack))
    assert result.outcome is Outcome.WARN
    assert "Input/output error" in result.text


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (b"6,1234,98765432,-;bpf: message\n KEY=value\n", Line(98.765432, "bpf: message")),
        (b"4,1,0,-;a;b", Line(0.0, "a;b")),
        (b"nonsense", None),
        (b"1,2,x,-;text", None),
    ],
)
def test_a_record_of_the_log_is_read(record: bytes, expected) -> None:
    """Priority, sequence, microseconds and flags stand before the message."""
    assert kernel_log.parse_record(record) == expected


def test_telling_lines_are_the_newest_first() -> None:
    """BPF, capabilities and denials are, and nothing else is."""
    lines = [
        Line(1, "bpf: Invalid argument"),
        Line(2, "usb 1-1: new device"),
        Line(3, 'audit: type=1400 apparmor="DENIED" operation="bpf"'),
        Line(4, "avc:  denied  { prog_load } for pid=1"),
        Line(5, "eth0: link up"),
    ]
    assert [line.at_s for line in kernel_log.telling(lines)] == [4, 3, 1]


def test_a_line_has_its_time() -> None:
    """Seconds since the start of the kernel become a date."""
    assert str(Line(10.0, "text")).endswith(" text")
    assert len(str(Line(10.0, "text")).split()) == 3


def test_attributes_are_aligned() -> None:
    """Netlink attributes begin at multiples of four bytes; a broken tail ends them."""
    data = struct.pack("=HH5s3x", 9, 1, b"mq\0\0\0") + struct.pack("=HHI", 8, 0x8002, 7)
    found = netlink.attributes(data + b"\x01\0\0\0\0")
    assert found == {1: b"mq\0\0\0", 2: struct.pack("=I", 7)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loaded by alice 3 minutes ago", "loaded by <user> 3 minutes ago"),
        ("/home/alice/x and malice", "/home/<user>/x and malice"),
        ("user-alice.slice, alice_job", "user-<user>.slice, <user>_job"),
        ("to 1.2.3.4:80, 10.0.0.1:", "to <address>:80, <address>:"),
        ("secret-10.0.0.1.service", "secret-<address>.service"),
        ("2001:db8:0:0:0:0:0:1:443", "<address>:443"),
        ("MAC=52:54:00:12:34:56:52:54:00:12:34:57:08:00", "MAC=<address>"),
        ("from 192.0.2.7 to 2001:db8::1", "from <address> to <address>"),
        ("at fe80::1%eth0 (52:54:00:12:34:56)", "at <address>%eth0 (<address>)"),
        ("Linux 6.12.117 at 12:34:56, 14.0.6", "Linux 6.12.117 at 12:34:56, 14.0.6"),
        ("owner: user 1000", "owner: user 1000"),
    ],
)
def test_a_report_names_nobody(monkeypatch, text: str, expected: str) -> None:
    """User names and addresses are taken out, versions and times are not."""
    monkeypatch.setenv("SUDO_USER", "alice")
    assert report.redact(text) == expected


def test_a_report_does_not_name_the_host(monkeypatch) -> None:
    """Neither in full nor in short."""
    names = ("Linux", "tower.example.org", "6.1", "#1", "x86_64")
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(names))
    assert report.redact("tower: tower.example.org towers") == "<host>: <host> towers"
    assert report.redact("tower-1") == "<host>-1"


def test_the_configuration_comes_from_the_first_file(monkeypatch, tmp_path) -> None:
    """A file that is missing or damaged is passed over."""
    damaged, good = tmp_path / "config.gz", tmp_path / "config"
    damaged.write_bytes(b"no gzip")
    good.write_text("# CONFIG_BPF_JIT is not set\nCONFIG_BPF=y\nCONFIG_HZ=250\n")
    monkeypatch.setattr(kernel, "config_files", lambda: ["/nowhere", str(damaged), str(good)])
    assert kernel.configuration() == (str(good), {"CONFIG_BPF": "y", "CONFIG_HZ": "250"})


def test_no_configuration_is_no_failure(monkeypatch) -> None:
    """Where it cannot be read the check is skipped."""
    monkeypatch.setattr(kernel, "config_files", lambda: ["/nowhere"])
    [config] = [check for check in kernel.CHECKS if check.id == "kernel.config"]
    with ExitStack() as stack:
        assert config.run(Setup(stack)).outcome is Outcome.SKIP


@pytest.fixture
def refusing(monkeypatch):
    """Makes a kernel that refuses some commands when they are meant seriously, to root."""

    def make(refused: dict[Cmd, int], *, always: bool = False) -> None:
        def bpf(cmd, attr):
            serious = attr.prog_load.insn_cnt if cmd is Cmd.PROG_LOAD else attr.map_create.key_size
            if cmd in refused and (serious or always):
                raise syscall.error(refused[cmd], cmd)
            number = errno.EINVAL if cmd in (Cmd.MAP_CREATE, Cmd.PROG_LOAD) else errno.EBADF
            raise syscall.error(number, cmd)

        def create_empty(parent):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(syscall, "bpf", bpf)
        monkeypatch.setattr(privileges, "effective_capabilities", lambda: (1 << 64) - 1)
        monkeypatch.setattr(own_cgroups, "create_empty", create_empty)
        features.forget()

    yield make
    features.forget()


def test_a_kernel_without_cgroup_bpf_is_the_cause(monkeypatch, refusing) -> None:
    """It takes no cgroup_skb program, and its configuration tells why."""
    refusing({Cmd.PROG_LOAD: errno.EINVAL})
    monkeypatch.setattr(kernel, "configuration", lambda: ("/boot/config", {"CONFIG_BPF": "y"}))
    found = examine()
    assert found.conclusion.id == "kernel-without-cgroup-bpf"
    reasons = [reason.text for reason in found.reasons()]
    assert "/boot/config lacks CONFIG_BPF_SYSCALL" in reasons[1]


def test_a_kernel_that_refuses_for_no_visible_reason_has_a_fault(monkeypatch, refusing) -> None:
    """Its configuration has everything, and yet it takes no program."""
    refusing({Cmd.PROG_LOAD: errno.EINVAL})
    monkeypatch.setattr(kernel, "configuration", lambda: None)
    assert examine().conclusion.id == "kernel-refuses-program"


def test_a_locked_kernel_is_the_cause(monkeypatch, tmp_path, refusing) -> None:
    """The capabilities are there, commands are refused, and lockdown is in force."""
    refusing({Cmd.MAP_CREATE: errno.EPERM, Cmd.PROG_LOAD: errno.EPERM}, always=True)
    lockdown = tmp_path / "lockdown"
    lockdown.write_text("none integrity [confidentiality]\n")
    monkeypatch.setattr(kernel, "LOCKDOWN", str(lockdown))
    found = examine()
    assert found.conclusion.id == "lockdown"
    assert "the kernel is locked down" in [reason.text for reason in found.reasons()]
