"""Notifications on the desktops of users who are logged in, by notify-send, if there is one.

Each is sent by a process of the user's own, which is given up after a while; nothing waits for it.
"""

from __future__ import annotations

import html
import os
import pwd
import shutil
import stat
import subprocess
import time
from contextlib import suppress
from typing import Iterator

_USERS = "/run/user"
# Where no user can have put another program of that name.
_PATH = "/usr/bin:/bin"
_PATIENCE_S = 10.0
_MOST = 16

_running: list[tuple[subprocess.Popen[bytes], float]] = []


def notify(title: str, text: str) -> int:
    """Show a notification to each user with a session bus; return how many it was sent to."""
    reap()
    program = shutil.which("notify-send", path=_PATH)
    sent = 0
    for user in _users() if program else ():
        if len(_running) < _MOST:
            with suppress(OSError, subprocess.SubprocessError, KeyError):
                _running.append((_start(str(program), user, title, text), time.monotonic()))
                sent += 1
    return sent


def reap() -> None:
    """Take notice of those that have ended, and end those that a user's bus holds up."""
    for process, since_s in list(_running):
        if process.poll() is None and time.monotonic() - since_s > _PATIENCE_S:
            process.kill()
        if process.poll() is not None:
            _running.remove((process, since_s))


def _users() -> Iterator[int]:
    """Yield the users whose bus is there, and theirs."""
    with suppress(OSError):
        for name in sorted(filter(str.isdigit, os.listdir(_USERS))):
            with suppress(OSError):
                status = os.lstat(f"{_USERS}/{name}/bus")
                if stat.S_ISSOCK(status.st_mode) and status.st_uid == int(name):
                    yield int(name)


def _start(program: str, user: int, title: str, text: str) -> subprocess.Popen[bytes]:
    """Raises OSError, SubprocessError, or KeyError for an unknown user."""
    runtime = f"{_USERS}/{user}"
    # Notifications may have markup; titles may not.
    command = [program, "--app-name=pybpfthrottle", "--", title, html.escape(text, quote=False)]
    changes = user != os.geteuid()
    return subprocess.Popen(
        command,
        env={
            "PATH": _PATH,
            "XDG_RUNTIME_DIR": runtime,
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={runtime}/bus",
        },
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        user=user if changes else None,
        group=pwd.getpwuid(user).pw_gid if changes else None,
        extra_groups=[] if changes else None,
    )
