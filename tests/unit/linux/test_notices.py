"""A quota that is used up is told in the journal and on desktops, whatever is there of these."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from since import needs_machine

from pybpfthrottle.linux import desktop, journal
from pybpfthrottle.notices import Notices
from pybpfthrottle.quota import parse


@dataclass
class Sockets:
    """Where the journal and syslog would listen."""

    journal: socket.socket
    syslog: socket.socket


@pytest.fixture
def listening(tmp_path, monkeypatch):
    """Datagram sockets in place of the journal and of syslog."""
    made = []
    for name, where in (("journal", "_JOURNAL"), ("syslog", "_SYSLOG")):
        receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        receiver.bind(str(tmp_path / name))
        receiver.settimeout(10)
        monkeypatch.setattr(journal, where, str(tmp_path / name))
        made.append(receiver)
    yield Sockets(*made)
    for receiver in made:
        receiver.close()


def fields_of(data: bytes) -> dict[str, str]:
    """The fields of a message in the journal's native protocol."""
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + length], data[8 + length + 1 :]
        found[name.decode()] = value.decode()
    return found


def test_the_journal_gets_fields(listening) -> None:
    """Also a value that has a newline, which cannot pass for another field."""
    assert journal.send("used up", fields={"PYBPFTHROTTLE_RULE": "a\nPRIORITY=0", "X_Y": "z"})
    assert fields_of(listening.journal.recv(9999)) == {
        "MESSAGE": "used up",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "pybpfthrottle",
        "PYBPFTHROTTLE_RULE": "a\nPRIORITY=0",
        "X_Y": "z",
    }


def test_syslog_is_used_where_there_is_no_journal(listening, tmp_path) -> None:
    """One line, whatever the message has."""
    os.unlink(tmp_path / "journal")
    assert journal.send("used\nup", journal.NOTICE)
    assert listening.syslog.recv(9999) == f"<29>pybpfthrottle[{os.getpid()}]: used up".encode()


def test_nobody_who_listens_is_waited_for(listening) -> None:
    """A journal that is stopped takes a few messages, and holds nothing up."""
    begin_s = time.monotonic()
    taken = [journal.send("x" * 4096) for _ in range(2000)]
    assert taken[0]
    assert not taken[-1]
    assert time.monotonic() - begin_s < 10


def test_without_anybody_it_is_not_taken(monkeypatch) -> None:
    """Which is no error."""
    for where in ("_JOURNAL", "_SYSLOG"):
        monkeypatch.setattr(journal, where, "/nonexistent/socket")
    assert not journal.send("used up")


@pytest.fixture
def users(monkeypatch):
    """Two users: one has a bus that is theirs, the other one's belongs to somebody else."""
    needs_machine("root, to become somebody else", found=os.geteuid() == 0)
    # Only root may enter what pytest makes.
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    run, programs, output = top / "run", top / "bin", top / "output"
    for user, owner in ((65534, 65534), (4712, 0)):
        directory = run / str(user)
        directory.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bus:
            bus.bind(str(directory / "bus"))
        os.chown(directory / "bus", owner, owner)
    (run / "no-user").mkdir()
    programs.mkdir()
    monkeypatch.setattr(desktop, "_USERS", str(run))
    monkeypatch.setattr(desktop, "_PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(desktop, "_running", [])
    output.mkdir()
    os.chown(output, 65534, 65534)
    yield programs / "notify-send", output
    for process, _ in desktop._running:
        process.kill()
        process.wait(10)
    shutil.rmtree(top)


def install(program, script: str) -> None:
    """Put a script where notify-send would be."""
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)


def wait_for_all() -> None:
    """Until all notifications were sent."""
    deadline = time.monotonic() + 20
    while desktop._running:
        assert time.monotonic() < deadline
        desktop.reap()
        time.sleep(0.01)


def test_a_user_is_notified_as_that_user(users) -> None:
    """By the user's own bus; nothing of root's environment comes with it. Markup is text."""
    program, output = users
    words = 'id -u; id -g; id -G; echo "$DBUS_SESSION_BUS_ADDRESS"; env | wc -l'
    install(program, f"( {words}; printf '%s\\n' \"$@\" ) >{output}/told 2>&1")
    assert desktop.notify("-Title", "used <b>up</b>") == 1
    wait_for_all()
    user, group, groups, bus, variables, *arguments = (output / "told").read_text().splitlines()
    assert (user, group, groups) == ("65534", "65534", "65534")
    assert bus.endswith("/run/65534/bus")
    assert bus.startswith("unix:path=/")
    assert int(variables) < 8
    assert arguments == [
        *("--app-name=pybpfthrottle", "--", "-Title", "used &lt;b&gt;up&lt;/b&gt;")
    ]


def test_a_desktop_that_hangs_is_given_up(users, monkeypatch) -> None:
    """Later, and nothing waits for it; there are never many of them."""
    install(users[0], "exec sleep 60")
    assert sum(desktop.notify("x", "y") for _ in range(desktop._MOST + 3)) == desktop._MOST
    processes = [process for process, _ in desktop._running]
    monkeypatch.setattr(desktop, "_PATIENCE_S", 0.0)
    wait_for_all()
    assert {process.returncode for process in processes} == {-9}


@pytest.mark.parametrize("lacks", ["program", "directory", "execution"])
def test_without_a_desktop_nobody_is_notified(users, monkeypatch, lacks) -> None:
    """Which is no error."""
    if lacks == "execution":
        install(users[0], "exit 1")

        def refuse(*_, **__):
            raise subprocess.SubprocessError("may not become another user")

        monkeypatch.setattr(desktop.subprocess, "Popen", refuse)
    elif lacks == "directory":
        install(users[0], "exit 1")
        monkeypatch.setattr(desktop, "_USERS", "/nonexistent")
    else:
        monkeypatch.setattr(desktop, "_PATH", "/nonexistent")
    assert desktop.notify("x", "y") == 0


def test_a_quota_that_is_used_up_is_told_once(listening, users) -> None:
    """In each of its periods; while something is left nothing is told."""
    quota = parse({"day": "1K", "then": "warn"})
    notices = Notices()
    noon = 1795694400.0
    assert not notices.tell("video", quota.decide(lambda _: 1023, noon))
    assert notices.tell("video", quota.decide(lambda _: 1024, noon))
    assert not notices.tell("video", quota.decide(lambda _: 4096, noon + 60))
    assert notices.tell("backup", quota.decide(lambda _: 4096, noon))
    assert notices.tell("video", quota.decide(lambda _: 1024, noon + 86400))
    told = fields_of(listening.journal.recv(9999))
    assert told["MESSAGE"].startswith("video has used 1.0 KB of its 1.0 KB a day")
    assert (told["PYBPFTHROTTLE_RULE"], told["PRIORITY"]) == ("video", "4")
    (chore,) = notices.chores()
    chore.run()


def test_without_a_journal_it_is_logged(monkeypatch, users, caplog) -> None:
    """With a hostile name escaped."""
    for where in ("_JOURNAL", "_SYSLOG"):
        monkeypatch.setattr(journal, where, "/nonexistent/socket")
    quota = parse({"day": "1K", "then": "block"})
    assert Notices().tell("a\x1b[31m\nb", quota.decide(lambda _: 1024, 0.0))
    assert "a\\x1b[31m\\nb has used" in caplog.text
