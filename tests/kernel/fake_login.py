"""A remote login without ssh, tmux and sudo: real sockets, terminals and processes.

``fake_login.py serve SESSION COMMAND ...`` serves one connection as sshd does: it accepts it, is
moved into the cgroup SESSION, and runs the command on a terminal. ``detach``, ``attach TERMINAL``
and ``daemon`` run a command that has left its session, and show what it says: on a terminal of its
own that is shown on this one or on another one, as by tmux and screen, or on none.
"""

from __future__ import annotations

import os
import pty
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Sequence


def serve(session: str, command: Sequence[str]) -> None:
    """Serve the first connection; who listens is gone then, as after a restart of sshd."""
    Path("/proc/self/comm").write_text(os.environ.get("FAKE_NAME", "fakesshd"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, client = listener.accept()
    if os.fork():
        os._exit(0)
    with open(f"{session}/cgroup.procs", "w") as file:
        file.write("0")
    server = connection.getsockname()
    pid, master = pty.fork()
    if pid == 0:
        ends = f"{client[0]} {client[1]} {server[0]} {server[1]}"
        os.execvpe(command[0], command, {**os.environ, "SSH_CONNECTION": ends})
    with suppress(OSError):  # the other side of the terminal is closed
        while data := os.read(master, 4096):
            connection.sendall(data)
    os.waitpid(pid, 0)


def detach(command: Sequence[str], terminal: str = "") -> None:
    """Run a command on a terminal of its own, by a process that has left this session."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.close(reading)
        shown = os.open(terminal, os.O_RDWR | os.O_NOCTTY) if terminal else os.dup(0)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nowhere, number)
        pid, master = pty.fork()
        if pid == 0:
            os.closerange(3, 64)
            os.execvp(command[0], command)
        with suppress(OSError):
            while data := os.read(master, 4096):
                os.write(shown, data)
                os.write(writing, data)
        os._exit(0)
    _wait(reading, writing)


def daemon(command: Sequence[str]) -> None:
    """Run a command without a terminal, by a process that has left this session."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        for number in (1, 2):
            os.dup2(writing, number)
        os.closerange(3, 64)
        os.execvp(command[0], command)
    os.write(1, _wait(reading, writing))


def _wait(reading: int, writing: int) -> bytes:
    os.close(writing)
    found = b""
    while data := os.read(reading, 4096):
        found += data
    return found


if __name__ == "__main__":
    way, *arguments = sys.argv[1:]
    if way == "serve":
        serve(arguments[0], arguments[1:])
    elif way == "attach":
        detach(arguments[1:], arguments[0])
    elif way == "detach":
        detach(arguments)
    else:
        daemon(arguments)
