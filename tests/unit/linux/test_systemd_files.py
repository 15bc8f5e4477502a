"""What is written for systemd, and read from it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from pybpfthrottle import unitfiles
from pybpfthrottle.cli import services
from pybpfthrottle.cli.commands.bare import cli
from pybpfthrottle.errors import ServiceError
from pybpfthrottle.linux import systemd
from pybpfthrottle.linux.notify import notify
from pybpfthrottle.unitfiles import Program

ROOT = Path(__file__).resolve().parents[3]
# What is there on every machine, for systemd to find it executable.
PROGRAM = Program(["/bin/sh"])


@pytest.mark.parametrize(
    "name",
    [
        *("nginx", "nginx.service", "a@b.service", "backup@.service", "a\\x2db.service"),
        *("org.example:1", "x" * 212),
    ],
)
def test_names_of_services(name):
    """The suffix may be left out."""
    assert systemd.service_name(name) == name.removesuffix(".service") + ".service"


@pytest.mark.parametrize(
    "name",
    [
        *("", "..", "../x", "/etc/passwd", "a/b", "a b", "a\nExecStart=x", "a%n", "a$b", 'a"b'),
        *("a'b", "a;b", "\u00e4", "@x", "a@b@c", "x" * 213, ".service", "a\x00b", "a\x1b[2J"),
        *("x.socket", "x.slice", "x.timer", "-a b"),
    ],
)
@pytest.mark.parametrize("more", [("--upload-limit", "1M", "--dry-run"), ("--remove",)])
def test_other_names_are_refused(name, more):
    """Before anything is written or deleted, with a clear error."""
    with pytest.raises(ServiceError) as refused:
        unitfiles.limit_service(systemd.service_name(name))
    done = CliRunner().invoke(cli, ["drop-in", *more, "--", name])
    assert str(done.exception) == str(refused.value)


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("--upload-limit=5M", "--upload-limit=5M"),
        ("100%", "100%%"),
        ("a b", '"a b"'),
        ("$HOME", '"$$HOME"'),
        ('"', '"\\""'),
        ("a\\b", '"a\\\\b"'),
        ("a\nb", '"a\\x0ab"'),
        ("", '""'),
        ("'", '"\'"'),
        ("\udcff", '"\\xff"'),
    ],
)
def test_words_are_quoted(word, written):
    """As systemd reads them (man 5 systemd.service)."""
    assert unitfiles.quoted(word) == written


def test_a_variable_has_no_dollar_escaped():
    """In Environment= a $ is itself."""
    strange = Program(["/bin/x"], {"PYTHONPATH": '/a $b%"'})
    assert 'Environment="PYTHONPATH=/a $b%%\\""' in unitfiles.daemon(strange).splitlines()


@pytest.fixture
def written(tmp_path):
    """Each unit that is written, as a file."""
    units = {
        "pybpfthrottle.service": unitfiles.daemon(PROGRAM),
        "pybpfthrottle-limit-web.service": unitfiles.limit(PROGRAM, "web.service", ["-u=5M"]),
        "web.service.d/50-pybpfthrottle.conf": unitfiles.drop_in(
            "web.service", "/bin/sh", optional=False
        ),
        "web.service": "[Service]\nExecStart=/bin/true\n",
    }
    for name, text in units.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_systemd_understands_them(written):
    """It has nothing to say about them, but that the manual is not installed here."""
    units = [str(path) for path in sorted(written.glob("*.service"))]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if str(written) in line or "web" in line]
    assert [line for line in said if "pybpfthrottle" in line or "web" in line] == []


@pytest.mark.parametrize(
    ("unit", "words"),
    [("pybpfthrottle.service", "daemon"), ("pybpfthrottle-limit-web.service", "a limit")],
)
def test_the_figure_in_the_docs_is_right(written, unit, words):
    """`systemd-analyze security` gives it; newer releases may weigh a little differently."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(written / unit)],
        capture_output=True,
        text=True,
    )
    level = float(re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)[1])
    page = (ROOT / "docs/guides/service.md").read_text()
    stated = float(re.search(rf"([\d.]+) for the service of {words}\b", page)[1])
    assert abs(level - stated) <= 0.3


@pytest.fixture
def manager(tmp_path):
    """A socket on which a service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(10)
        yield listening


def test_the_service_manager_is_told(manager, monkeypatch):
    """As sd_notify does."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    for state in ("READY=1", "RELOADING=1", "STOPPING=1"):
        notify(state)
    assert manager.recv(4096) == b"READY=1"
    assert re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=\d+", manager.recv(4096))
    assert manager.recv(4096) == b"STOPPING=1"


def test_a_manager_with_an_abstract_address_is_told(monkeypatch):
    """An address that begins with @."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        name = f"pybpfthrottle-@-test-{os.getpid()}"
        listening.bind(f"\0{name}")
        listening.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("READY=1")
        assert listening.recv(4096) == b"READY=1"


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "nonsense"])
def test_without_a_manager_nothing_happens(monkeypatch, address):
    """Also if it has gone."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


@pytest.fixture
def systemctl(tmp_path, monkeypatch):
    """Have a program in place of systemctl, and systemd run."""

    def answer(script):
        path = tmp_path / "systemctl"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr(systemd, "runs", lambda: True)

    return answer


def test_the_sockets_of_a_service(systemctl):
    """Those that start it; timers are none, and an instance's serve others as well."""
    systemctl("echo web.socket web.timer other.socket")
    assert systemd.sockets_of("web.service") == ["web.socket", "other.socket"]
    assert systemd.sockets_of("web@1.service") == []
    systemctl("echo no bus >&2; exit 1")
    assert systemd.sockets_of("web.service") == []


def test_a_service_that_systemd_does_not_know_is_refused(systemctl, monkeypatch, tmp_path):
    """Nothing is written for it."""
    monkeypatch.setattr(services, "UNITS", tmp_path / "units")
    systemctl("echo LoadState=not-found")
    with pytest.raises(ServiceError, match="systemd has no service web"):
        services.add("web.service", services.Limit(["-u=1M"], optional=False), dry_run=False)
    assert not (tmp_path / "units").exists()


def test_files_of_others_stay(systemctl, monkeypatch, tmp_path):
    """A drop-in of the same name that somebody has written is neither replaced nor deleted."""
    monkeypatch.setattr(services, "UNITS", tmp_path)
    foreign = tmp_path / "web.service.d/50-pybpfthrottle.conf"
    foreign.parent.mkdir()
    foreign.write_text("[Service]\nNice=5\n")
    systemctl("echo LoadState=loaded")
    with pytest.raises(ServiceError, match="was not written by pybpfthrottle"):
        services.add("web.service", services.Limit(["-u=1M"], optional=False), dry_run=False)
    with pytest.raises(ServiceError, match="was not written by pybpfthrottle"):
        services.remove("web.service", dry_run=False)
    assert foreign.read_text() == "[Service]\nNice=5\n"


def test_a_program_of_somebody_else_is_not_run_by_root(monkeypatch, tmp_path):
    """Who owns the files would be root at the next start."""
    monkeypatch.setattr(services.process, "PACKAGE_ROOT", str(tmp_path))
    services._refuse_others_program(PROGRAM)
    tmp_path.chmod(0o777)
    with pytest.raises(ServiceError, match="others than root may change"):
        services._refuse_others_program(PROGRAM)
    tmp_path.chmod(0o755)
    os.chown(tmp_path, 1, 1)
    with pytest.raises(ServiceError, match="for all users first"):
        services._refuse_others_program(PROGRAM)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["web"], "no limit"),
        (["web", "--remove", "-u", "1M"], "cannot be combined"),
        (["web", "-u", "0"], "out of range"),
        (["web", "-u", "1M", "--to", "nonsense"], "nonsense"),
    ],
)
def test_wrong_usage(arguments, words):
    """It is said what is wrong."""
    done = CliRunner().invoke(cli, ["drop-in", *arguments])
    assert done.exit_code == 2
    assert words in done.output


def test_a_dry_run_shows_both_files():
    """And each option that was given is in them, whatever it has."""
    done = CliRunner().invoke(
        cli, ["drop-in", "web", "-d", "1M", "--loopback", "--except", "10.0.0.0/8", "--dry-run"]
    )
    assert done.exit_code == 0
    assert "--unit=web.service --download-limit=1M --loopback --except=10.0.0.0/8\n" in done.output
    assert "# /etc/systemd/system/web.service.d/50-pybpfthrottle.conf" in done.output
