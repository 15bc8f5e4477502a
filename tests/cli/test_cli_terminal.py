"""Terminals as they come: narrow, dumb, full; with a log beside the live line."""

from __future__ import annotations

import os
import re
import signal

import pytest

LIMIT = ("--download-limit", "1M", "--upload-limit", "500K")


def drawn(terminal):
    """The live lines that a terminal was shown."""
    return re.findall(r"\r\x1b\[2K([^\r\n]+)", terminal.text)


@pytest.mark.parametrize("columns", [132, 80, 40, 30])
def test_a_narrow_terminal_shows_both_directions(tool, scratch, columns):
    """In a shorter form, which does not wrap."""
    process, terminal = tool.start_on_terminal(
        *("--cgroup", scratch.cgroup().path, *LIMIT, "--duration", "1.5"), columns=columns
    )
    assert tool.finish(process).status == 0
    lines = [line for line in drawn(terminal) if " in 1." not in line and "Nothing" not in line]
    assert lines
    for line in lines:
        assert len(line) < columns
        assert all(re.search(way, line) for way in ("download|↓", "upload|↑")), line


def test_run_on_eighty_columns(tool):
    """The same for a command."""
    process, terminal = tool.start_on_terminal(
        "run", *LIMIT, "--", "sh", "-c", "exec sleep 1.5 >/dev/null", columns=80
    )
    assert tool.finish(process).status == 0
    assert any("download" in line and "upload" in line for line in drawn(terminal))


@pytest.mark.parametrize("command", ["--cgroup", "run"])
def test_log_lines_begin_on_a_line_of_their_own(tool, scratch, command):
    """The live line is taken away before each."""
    what = (command, scratch.cgroup().path, "--duration", "2.5") if command != "run" else ("run",)
    rest = ("--", "sleep", "2.5") if command == "run" else ()
    process, terminal = tool.start_on_terminal(*what, *LIMIT, "-v", *rest)
    assert tool.finish(process).status == 0
    before_log = re.findall(r"([^\n]*?)INFO ", terminal.text)
    assert len(before_log) > 6
    assert {text.rpartition("\x1b[2K")[2] for text in before_log} == {""}


@pytest.mark.parametrize("arguments", [("--cgroup",), ("run",), ("verify-setup", "--cgroup")])
def test_a_dumb_terminal_gets_lines(tool, scratch, arguments):
    """Emacs' shell and logs of serial lines append only."""
    what = (*arguments, scratch.cgroup().path) if arguments[-1] == "--cgroup" else arguments
    limit = () if "verify-setup" in arguments else (*LIMIT, "--duration", "1.3")
    rest = ("--", "sleep", "1.3") if "run" in arguments else ()
    process, terminal = tool.start_on_terminal(*what, *limit, *rest, environment={"TERM": "dumb"})
    assert tool.finish(process).status == 0
    assert "\x1b" not in terminal.text
    assert "\r" not in terminal.text.replace("\r\n", "")
    assert len(terminal.text.splitlines()) > 1


def test_the_bare_command_on_a_dumb_terminal_is_a_table(tool, eventually):
    """As that of top, line by line until Ctrl-C, not the help."""
    process, terminal = tool.start_on_terminal(environment={"TERM": "dumb"})
    eventually(lambda: "down/s" in terminal.text)
    os.kill(process.pid, signal.SIGINT)
    assert tool.finish(process).status == 130
    assert "\x1b" not in terminal.text
    assert "Usage" not in terminal.text


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cgroup", "CGROUP", *LIMIT, "--duration", "1.3", "--json"),
        ("--cgroup", "CGROUP", *LIMIT, "--duration", "0.3", "-v"),
        ("list",),
        ("list", "--json"),
        ("config", "show", "--json"),
        ("cleanup", "--json"),
        ("cgroup", "tree", "--json"),
        ("bpf", "prog", "list", "--json"),
        ("verify-setup", "--json"),
        ("verify-setup",),
        ("--list-backends",),
        ("--help",),
    ],
    ids=" ".join,
)
def test_a_full_disk_is_a_failure(tool, scratch, arguments):
    """Status 1, and one line that says why; the log is beside it."""
    where = scratch.cgroup().path
    with open("/dev/full", "w") as full:
        result = tool.run(*(where if word == "CGROUP" else word for word in arguments), stdout=full)
    assert result.status == 1
    told = [line for line in result.err.splitlines() if not line.startswith(("INFO", "Nothing"))]
    assert len(told) == 1, told
    assert "cannot write" in told[0]
    assert "No space left on device" in told[0]


def test_a_command_keeps_its_status_where_nothing_can_be_said(tool):
    """What run says is lost; what the command did is not."""
    with open("/dev/full", "w") as full:
        assert tool.run("run", *LIMIT, "--", "true", stderr=full).status == 0


def test_a_full_disk_does_not_fail_the_command_that_is_run(tool):
    """Its status is its own; the failure is said."""
    result = tool.run("run", *LIMIT, "-q", "--json-file", "/dev/full", "--", "sh", "-c", "exit 3")
    assert result.status == 3
    assert "cannot write" in result.complaint
