"""Runs the programs that configure the kernel, each in the network namespace of a throttle."""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from typing import Any, Optional

from pybpfthrottle.errors import BackendError, NoNamespaceError
from pybpfthrottle.linux import netns, process
from pybpfthrottle.linux.netns import Place
from pybpfthrottle.logger import Logger

log = Logger(__name__)

_PATIENCE_S = 10.0
_CAP_NET_ADMIN = 12


class Commands:
    """Runs programs in one network namespace. ``close`` or ``with`` releases that.

    All methods raise BackendError.
    """

    def __init__(self, place: Optional[Place] = None) -> None:
        """``place`` is the network namespace; None is this process's own.

        With a cookie it is no other one that has got the number. Raises NoNamespaceError if it is
        gone.
        """
        self._resources = ExitStack()
        self._fd = -1
        self.place = place or Place(netns.number())
        number, cookie = self.place
        if number != netns.number() or cookie not in (0, netns.own_cookie()):
            fd = netns.open_by_number(number, cookie)
            if fd is None:
                raise NoNamespaceError(f"there is no network namespace {number} any more")
            self._fd = fd
            self._resources.callback(os.close, fd)

    @property
    def namespace(self) -> int:
        """The number of the namespace."""
        return self.place.number

    @property
    def descriptor(self) -> int:
        """The descriptor of the namespace; -1 if it is this process's own."""
        return self._fd

    def run(self, command: list[str], *, package: str, text: str = "") -> str:
        """Return what a program prints that is given a text.

        ``package`` is what to install if it is missing.
        """
        name = command[0]

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command,
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE_S,
                env={**os.environ, "LC_ALL": "C"},
            )

        try:
            done = run() if self._fd < 0 else netns.inside(self._fd, run)
        except FileNotFoundError as error:
            raise BackendError(f"{name} is not installed: install the package {package}") from error
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"{name} did not answer within {_PATIENCE_S:g} s") from error
        except OSError as error:
            raise BackendError(f"cannot run {name}: {error.strerror}") from error
        if done.returncode:
            raise BackendError(_why(name, done))
        return done.stdout

    def ask(self, command: list[str], *, package: str) -> Any:
        """Return the JSON that a program prints; an empty list for none."""
        answer = self.run(command, package=package)
        try:
            return json.loads(answer or "[]")
        except ValueError as error:
            raise BackendError(f"cannot read what {command[0]} prints: {answer[:80]!r}") from error

    def close(self) -> None:
        """Release the namespace."""
        self._resources.close()
        self._fd = -1

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _why(name: str, done: subprocess.CompletedProcess[str]) -> str:
    """Return why a program has failed, in one line."""
    if not int(process.own_status().get("CapEff", "0"), 16) & 1 << _CAP_NET_ADMIN:
        return f"{name} needs root, or CAP_NET_ADMIN in the network namespace"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = lines[0] if lines else f"it ended with status {done.returncode}"
    return f"{name} failed: {reason}"
