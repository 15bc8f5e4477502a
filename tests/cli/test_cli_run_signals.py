"""Signals that reach ``run``, by kill and from a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pybpfthrottle.errors import LaunchError
from pybpfthrottle.linux import cgroup as cgroups
from pybpfthrottle.linux import process
from pybpfthrottle.linux.launch import Command

LIMIT = ("run", "-q", "--download-limit", "1M")
LOOP = "echo ready; while :; do sleep 0.05; done"


def started(tool, script, *, limit=LIMIT, **popen):
    """Start a shell script below the tool, and wait until it is ready."""
    process = tool.start(*limit, "--", "sh", "-c", script, **popen)
    assert process.stdout.readline() == b"ready\n"
    return process


def session_of(pid):
    """The pids of the processes in a session, without zombies."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == pid and state != "Z":
            found.append(int(name))
    return found


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) >> (number - 1) & 1)


PASSED_ON = [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", PASSED_ON)
def test_a_signal_to_the_tool_is_passed_on(tool, number):
    """Those that are sent end a command that does not handle them: 128 + n."""
    process = started(tool, f"ulimit -c 0; {LOOP}")
    process.send_signal(number)
    assert tool.finish(process).status == 128 + number


@pytest.mark.parametrize("name", ["TERM", "HUP", "QUIT", "USR1", "USR2"])
def test_the_commands_own_handler_decides(tool, name):
    """The command's handler runs, and what it exits with is the status."""
    process = started(tool, f"trap 'echo handled; exit 7' {name}; {LOOP}")
    process.send_signal(getattr(signal, f"SIG{name}"))
    result = tool.finish(process)
    assert (result.status, result.out, result.err) == (7, b"handled\n", "")


def test_a_command_that_handles_a_signal_goes_on_with_its_limit(tool, eventually, attached):
    """A command may survive SIGTERM: it stays limited, and a second one may end it."""
    process = started(tool, f"trap 'trap - TERM; echo one' TERM; {LOOP}")
    cgroup = tool.cgroup_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"one\n"
    assert attached(cgroup)
    process.send_signal(signal.SIGTERM)
    assert tool.finish(process).status == 128 + signal.SIGTERM


@pytest.mark.parametrize("after_s", [0, 0.02, 0.05, 0.1, 0.2])
def test_an_interrupt_before_the_command_starts_is_130(tool, eventually, after_s):
    """Ctrl-C ends the child that waits for the limit; that is no failure of ours."""
    process = tool.start(*LIMIT, "--", "sleep", "30", start_new_session=True)
    eventually(lambda: len(session_of(process.pid)) > 1)
    time.sleep(after_s)
    os.killpg(process.pid, signal.SIGINT)
    result = tool.finish(process)
    assert (result.status, result.err) == (130, "")


@pytest.mark.parametrize("way", ["let_go", "check_waits"])
def test_a_child_that_was_interrupted_has_its_status(eventually, way):
    """Whichever notices first: there is no message, and nothing is left to wait for."""
    command = Command(["true"])
    eventually(lambda: not catches(command.pid, signal.SIGINT))
    os.kill(command.pid, signal.SIGINT)
    eventually(lambda: process.has_ended(command.pid))
    with pytest.raises(LaunchError) as raised:
        getattr(command, way)()
    command.abandon()
    assert (str(raised.value), raised.value.status) == ("", 130)
    with pytest.raises(ChildProcessError):
        os.waitpid(command.pid, 0)


def test_an_interrupt_by_kill_is_not_passed_on(tool, tmp_path):
    """SIGINT comes from the terminal to both; sent to the tool alone it ends neither."""
    script = "trap 'exit 9' INT; echo ready; while [ ! -e stop ]; do sleep 0.05; done; exit 4"
    process = started(tool, script)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    (tmp_path / "stop").touch()
    assert tool.finish(process).status == 4


def test_a_hangup_that_the_caller_ignores_ends_nobody(tool, tmp_path):
    """Under nohup neither the tool nor the command ends at SIGHUP."""
    process = started(
        tool,
        "echo ready; while [ ! -e stop ]; do sleep 0.05; done; exit 4",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    (tmp_path / "stop").touch()
    assert tool.finish(process).status == 4


def test_ctrl_c_reaches_the_command(tool):
    """Ctrl-C runs the command's handler; its status and the summary follow."""
    process, terminal = tool.start_on_terminal(
        *("run", "--download-limit", "1M", "--", "sh", "-c"),
        f"trap 'echo handled; exit 9' INT; {LOOP}",
    )
    terminal.wait_for("ready")
    terminal.type(b"\x03")
    assert tool.finish(process).status == 9
    assert "handled" in terminal.text
    assert "pybpfthrottle: download: actual=" in terminal.text.partition("handled")[2]
    assert "Traceback" not in terminal.text


def test_ctrl_c_ends_a_command_that_does_not_handle_it(tool):
    """A command that SIGINT ends gives 130, after the summary."""
    process, terminal = tool.start_on_terminal(
        "run", "--download-limit", "1M", "--", "sh", "-c", "echo ready; exec sleep 60"
    )
    terminal.wait_for("ready")
    terminal.type(b"\x03")
    assert tool.finish(process).status == 130
    assert "pybpfthrottle: download: actual=" in terminal.text


def test_ctrl_c_does_not_end_a_command_that_ignores_it(tool, tmp_path):
    """The tool waits for a command that ignores Ctrl-C, and then prints its summary."""
    process, terminal = tool.start_on_terminal(
        *("run", "--download-limit", "1M", "--", "sh", "-c"),
        "trap '' INT; echo ready; while [ ! -e stop ]; do sleep 0.05; done; exit 4",
    )
    terminal.wait_for("ready")
    terminal.type(b"\x03")
    terminal.wait_for("^C")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    assert "pybpfthrottle: download" not in terminal.text
    (tmp_path / "stop").touch()
    assert tool.finish(process).status == 4
    assert "pybpfthrottle: download: actual=" in terminal.text


def test_ctrl_backslash_is_the_commands_too(tool):
    """Ctrl-Backslash ends the command by SIGQUIT; the tool lives to print its summary."""
    process, terminal = tool.start_on_terminal(
        *("run", "--download-limit", "1M", "--", "sh", "-c"),
        "ulimit -c 0; trap 'exit 8' QUIT; echo ready; while :; do sleep 0.05; done",
    )
    terminal.wait_for("ready")
    terminal.type(b"\x1c")
    assert tool.finish(process).status == 8
    assert "pybpfthrottle: download: actual=" in terminal.text


def test_the_command_reads_from_the_terminal(tool):
    """The command is in the foreground: it may read what is typed."""
    process, terminal = tool.start_on_terminal(
        *LIMIT, "--", "sh", "-c", 'echo ready; read word; echo "read $word"'
    )
    terminal.wait_for("ready")
    terminal.type(b"hello\n")
    assert tool.finish(process).status == 0
    assert "read hello" in terminal.text


def test_the_command_gets_sighup_when_the_terminal_goes_away(tool, eventually, tmp_path):
    """Closing the terminal reaches the command as SIGHUP, and the tool ends with it."""
    process, terminal = tool.start_on_terminal(
        *("run", "--download-limit", "1M", "--", "sh", "-c"),
        f"trap 'echo yes >hup; exit 6' HUP; {LOOP}",
    )
    terminal.wait_for("ready")
    terminal.close()
    assert tool.finish(process).status == 6
    assert eventually(lambda: (tmp_path / "hup").exists())


def test_kill_9_of_the_tool_detaches(tool, eventually, attached):
    """After kill -9 of the tool nothing is attached, and the next start removes the cgroup."""
    tool.cgroups_may_stay = True
    process = started(tool, "echo ready; echo $$; exec sleep 60")
    command = int(process.stdout.readline())
    cgroup = tool.cgroup_of(process)
    process.kill()
    process.wait()
    eventually(lambda: not attached(cgroup))
    assert cgroup.pids() == [command]
    os.kill(command, signal.SIGKILL)
    eventually(lambda: not cgroup.exists() or not cgroup.populated())
    assert tool.run(*LIMIT, "--", "true").status == 0
    assert not cgroup.exists()


@pytest.mark.parametrize("delay_s", [0.05, 0.1, 0.15, 0.2, 0.3])
def test_kill_9_during_the_start_leaves_no_process(tool, eventually, cgroups_of, delay_s):
    """A tool that is killed while it starts leaves no child behind that waits for ever."""
    tool.cgroups_may_stay = True
    process = tool.start(*LIMIT, "--", "true", start_new_session=True)
    time.sleep(delay_s)
    process.kill()
    process.wait()
    eventually(lambda: not any(each.populated() for each in cgroups_of(process.pid)))
    eventually(lambda: not session_of(process.pid))


def test_another_instance_leaves_a_live_cgroup_alone(tool, tmp_path):
    """A cgroup that is empty for the moment, whose tool lives, is not taken for abandoned."""
    root = cgroups.root().path
    script = f"echo $$ >{root}/cgroup.procs; echo ready; while [ ! -e stop ]; do sleep 0.05; done"
    process = started(tool, script)
    cgroup = tool.cgroup_of(process)
    assert not cgroup.populated()
    assert tool.run(*LIMIT, "--", "true").status == 0
    assert cgroup.exists()
    (tmp_path / "stop").touch()
    assert tool.finish(process).status == 0


def test_signals_in_a_row_are_all_passed_on(tool):
    """A burst of signals does not confuse the tool."""
    script = "n=0; trap 'n=$((n+1))' HUP; trap 'echo $((n > 0)); exit 3' TERM; " + LOOP
    process = started(tool, script)
    for _ in range(50):
        process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    result = tool.finish(process)
    assert (result.status, result.out) == (3, b"1\n")


def test_a_stopped_command_is_waited_for(tool):
    """A command that is stopped for a while has not ended."""
    # On a terminal its job would be stopped, too.
    process = started(tool, "echo ready; kill -STOP $$; exit 5", start_new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    os.kill(tool.cgroup_of(process).pids()[0], signal.SIGCONT)
    assert tool.finish(process).status == 5


# As users type it: the tool is a job of this shell, which waits for Enter before it continues it.
SHELL = ("bash", "--norc", "-mc", '"$@"; echo "back $?"; read go; fg >&2; echo "end $?"', "bash")
TIDIES_UP = """
import os, signal, time

def stop(*_):
    time.sleep(0.5)
    os.write(1, b"tidied up\\n")
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTSTP)
    os._exit(5)

signal.signal(signal.SIGTSTP, stop)
os.write(1, b"ready\\n")  # unlike print, a signal handler may do so meanwhile
while True:
    time.sleep(1)
"""
# In the background: where Ctrl-Z stops a child of vfork() before it has executed anything, its
# shell waits for it and cannot stop: who started the shell waits forever, with a limit or not.
SLEEPS = ("sh", "-c", "sleep 2 & echo ready; wait $!; exit 5")
STOPS = {
    "by itself": (("sh", "-c", "echo ready; kill -STOP $$; exit 5"), b""),
    "at Ctrl-Z": (SLEEPS, b"\x1a"),
    "at Ctrl-Z, after it has tidied up": ((sys.executable, "-c", TIDIES_UP), b"\x1a"),
}


@pytest.mark.parametrize("way", STOPS)
def test_a_stopped_command_gives_the_terminal_back(tool, way):
    """Its job is stopped once it is, and goes on with it."""
    command, keys = STOPS[way]
    process, terminal = tool.start_on_terminal(*LIMIT, "--", *command, prefix=SHELL)
    terminal.wait_for("ready")
    terminal.type(keys)
    terminal.wait_for("back 14")  # 128, and SIGTSTP or SIGSTOP
    assert "tidied up" in terminal.text.partition("back")[0] or command[-1] != TIDIES_UP
    terminal.type(b"\n")
    terminal.wait_for("end 5")
    assert tool.finish(process).status == 0


def test_a_command_that_ignores_ctrl_z_keeps_the_terminal(tool):
    """As without the tool."""
    process, terminal = tool.start_on_terminal(
        *(*LIMIT, "--", "sh", "-c", "trap '' TSTP; echo ready; read line; echo got $line; exit 5"),
        prefix=SHELL,
    )
    terminal.wait_for("ready")
    terminal.type(b"\x1a")
    time.sleep(0.5)
    terminal.type(b"a line\n")
    terminal.wait_for("got a line")
    terminal.wait_for("back 5")
    terminal.type(b"\n")
    tool.finish(process)


def test_ctrl_z_before_the_command_starts(tool):
    """It stops the job, or comes too early or late: nobody waits forever for what is stopped."""
    for after_s in (0.1, 0.15, 0.2, 0.25, 0.3):
        process, terminal = tool.start_on_terminal(
            *(*LIMIT, "--", "sh", "-c", "exit 5"),
            prefix=(*SHELL[:2], "-mc", '"$@"; status=$?; [ $status = 5 ] || fg; :', "bash"),
        )
        time.sleep(after_s)
        terminal.type(b"\x1a")
        assert tool.finish(process).status == 0


def test_who_continues_only_the_tool_continues_the_command(tool):
    """As sudo does, whose child it is."""
    script = '"$@"; pid=$(jobs -p); kill -CONT $pid; while kill -0 $pid; do sleep 0.1; done; :'
    process, terminal = tool.start_on_terminal(
        *(*LIMIT, "--", "sh", "-c", "echo ready; kill -STOP $$; exit 5"),
        prefix=(*SHELL[:2], "-mc", script, "bash"),
    )
    terminal.wait_for("Exit 5")
    assert tool.finish(process).status == 0


def test_ctrl_backslash_reaches_the_command_once(tool, tmp_path):
    """The terminal has sent it to both; only one that is sent by kill is passed on."""
    process, terminal = tool.start_on_terminal(
        *("run", "-q", "--download-limit", "1M", "--", "sh", "-c"),
        "trap 'echo quit' QUIT; echo ready; while [ ! -e stop ]; do sleep 0.05; done; exit 4",
    )
    terminal.wait_for("ready")
    terminal.type(b"\x1c")
    terminal.wait_for("quit")
    time.sleep(0.3)
    assert terminal.text.count("quit") == 1
    process.send_signal(signal.SIGQUIT)
    time.sleep(0.3)
    assert terminal.text.count("quit") == 2
    (tmp_path / "stop").touch()
    assert tool.finish(process).status == 4


def test_a_user_signal_does_not_end_the_wait_for_what_outlives_the_command(tool, tmp_path):
    """It means something to the command only."""
    process = started(
        tool,
        "(while [ ! -e stop ]; do sleep 0.05; done) >/dev/null 2>&1 </dev/null & echo ready",
        limit=(*LIMIT, "--wait"),
    )
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    (tmp_path / "stop").touch()
    assert tool.finish(process).status == 0
