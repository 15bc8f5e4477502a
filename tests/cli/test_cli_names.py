"""Names that others chose reach the terminal and the log as text, whatever they hold."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

NASTY = "\x1b[31mx\ny[bold red]\u202e"
SHOWN = "\\x1b[31mx\\ny[bold red]\\u202e"
LIMIT = ("--download-limit", "1M", "--upload-limit", "1M")
# Takes a name for itself, has a socket, and waits.
NAMED = """
import os, socket, sys, time
with open("/proc/self/comm", "wb") as file:
    file.write(os.fsencode(sys.argv[1]))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
print("ready", flush=True)
time.sleep(60)
"""
# The kernel keeps 15 bytes.
COMM = "\x1b[31mx\ny[bold]"
COMM_SHOWN = "\\x1b[31mx\\ny[bold]"


def is_text(shown):
    """Whether only text and the ends of lines are there."""
    return all(line.isprintable() for line in shown.split("\n"))


@pytest.fixture
def named(scratch, tool):
    """A process that has given itself a nasty name, in a cgroup that has one too."""
    cgroup = scratch.cgroup(name=f"{scratch.name()}{NASTY}".replace("\n", "\t"))
    process = subprocess.Popen(
        [tool.python, "-c", NAMED, COMM], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    cgroup.move_in(process.pid)
    yield process.pid, cgroup
    process.kill()
    process.communicate()


@pytest.fixture
def text(tool):
    """Run the tool; what it shows, which is text, lines and all."""

    def run(*arguments, **options):
        result = tool.run(*arguments, **options)
        shown = result.text + result.err
        assert is_text(shown), shown
        return shown

    return run


@pytest.mark.parametrize("log", [[], ["-v"], ["-vv"]])
def test_a_process_that_is_limited(text, named, log):
    """In what is said of it, the log, and the summary."""
    pid, _ = named
    shown = text("--pid", str(pid), *LIMIT, "--duration", "1.3", *log)
    assert f"Limiting process {pid} ({COMM_SHOWN})" in shown
    assert (f"PID {pid} ({COMM_SHOWN}) download: " in shown) == bool(log)


@pytest.mark.parametrize("log", [[], ["-v"], ["-vv"]])
def test_a_cgroup_that_is_limited(text, named, log):
    """Its path is as others made it."""
    _, cgroup = named
    shown = text("--cgroup", cgroup.path, *LIMIT, "--duration", "1.3", *log)
    assert "Limiting /" in shown
    assert "\\x1b[31mx\\ty[bold red]\\u202e" in shown


@pytest.mark.parametrize("options", [["--move-cgroup"], ["--whole-cgroup"], ["--each"]])
def test_other_ways_to_limit(text, named, options):
    """Their notes and prefixes have the names, too."""
    shown = text("--pid", str(named[0]), *LIMIT, "--duration", "0.3", "-vv", *options)
    assert "\\x1b[31mx" in shown


def test_a_terminal_and_json(tool, named):
    """What is drawn on a terminal is text; each JSON event is one line."""
    process, terminal = tool.start_on_terminal(
        "--pid", str(named[0]), *LIMIT, "--duration", "1.3", "-v"
    )
    assert tool.finish(process).status == 0
    assert is_text(terminal.text.replace("\r", "").replace("\x1b[2K", ""))
    result = tool.run("--pid", str(named[0]), *LIMIT, "--duration", "0.3", "--json")
    events = [json.loads(line) for line in result.text.splitlines()]
    assert events[0]["target"].count(COMM) == 1


def test_commands_that_look(text, tool, named):
    """Those that list, show, change and remove, and those that say what is attached."""
    pid, cgroup = named
    label = f"l{pid}{NASTY}"
    process = tool.start(
        "--pid", str(pid), *LIMIT, "--label", label, "--json", stdout=subprocess.PIPE
    )
    assert process.stdout.readline()
    with_cgroup = tool.start("--cgroup", cgroup.path, *LIMIT, "--stack", "--json")
    assert with_cgroup.stdout.readline()
    shown = text("list")
    assert COMM_SHOWN in shown
    assert f"l{pid}{SHOWN}" in shown
    assert COMM_SHOWN in text("show", label)
    assert COMM_SHOWN in text("sockets", "--pid", str(pid))
    assert "already limited" in text("--pid", str(pid), *LIMIT)
    text("set", label, "--upload-limit", "2M")
    text("cgroup", "show", cgroup.path)
    assert "\\u202e" in text("cgroup", "tree")
    for options in (["prog"], ["map"], ["link"]):
        text("bpf", *options, "list")
    assert COMM_SHOWN in text("remove", label)
    for started in (process, with_cgroup):
        started.terminate()
        tool.finish(started)


def test_commands_that_examine(text, tool, named):
    """verify-setup, plain, on a terminal and in its report; and what is missing."""
    _, cgroup = named
    assert "\\u202e" in text("verify-setup", "-v", "--cgroup", cgroup.path)
    text("verify-setup", "--cgroup", cgroup.path, "-q", "--report", "-")
    process, terminal = tool.start_on_terminal("verify-setup", "-v", "--cgroup", cgroup.path)
    # The kernel's log may be longer than a terminal takes unread.
    terminal.wait_for("Symptoms: ")
    tool.finish(process)
    assert "\\u202e" in terminal.text
    assert "\u202e" not in terminal.text
    assert "[31mx" not in terminal.text.replace("\\x1b[31mx", "")
    plain = subprocess.run(
        [tool.python, "-m", "pybpfthrottle.diagnostics", "-v", "--cgroup", cgroup.path],
        env=tool.environment(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout.decode()
    assert is_text(plain)


@pytest.mark.parametrize("log", [[], ["-vv"]])
def test_a_command_that_is_run(text, tool, tmp_path, log):
    """Its name is as the file system has it."""
    path = tmp_path / NASTY
    shutil.copy("/bin/sleep", path)
    shown = text("run", *LIMIT, *log, "--", str(path), "1.2" if not log else "2.5")
    assert (SHOWN in shown) == bool(log)
    assert f"{SHOWN}: command not found" in text("run", *LIMIT, "--", NASTY)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cgroup", f"/sys/fs/cgroup/{NASTY}", *LIMIT],
        ["--unit", NASTY, *LIMIT],
        ["--user", NASTY, *LIMIT],
        ["--exe", f"/{NASTY}", *LIMIT],
        ["--pid", NASTY, *LIMIT],
        ["--download-limit", NASTY],
        [f"--{NASTY}"],
        [NASTY],
        ["show", NASTY],
        ["remove", "--unit", NASTY],
        ["inspect", f"/{NASTY}"],
        ["bpf", "prog", "show", "--name", NASTY],
        ["bpf", "map", "show", f"/{NASTY}"],
        ["cgroup", "show", f"/{NASTY}"],
        ["verify-setup", "--cgroup", f"/{NASTY}"],
    ],
    ids=lambda arguments: arguments[0] if arguments[0] != NASTY else "command",
)
def test_errors(text, arguments):
    """What does not exist is named as text."""
    assert "\\x1b[31mx\\ny" in text(*arguments)


def test_a_config_file(text, tmp_path):
    """Its place and its faults."""
    directory = tmp_path / NASTY / "pybpfthrottle"
    directory.mkdir(parents=True)
    assert SHOWN in text("config", "show", environment={"XDG_CONFIG_HOME": str(tmp_path / NASTY)})
    (directory / "config.toml").write_text('[bpf]\n"\\u001b[31mx" = 1\n')
    text("config", "show", environment={"XDG_CONFIG_HOME": str(tmp_path / NASTY)})


def test_a_mistake_in_choices_is_still_a_list(tool):
    """Click's own lines stay lines."""
    assert "\n\tlink,\n\tlegacy" in tool.run("switch", "1").err
