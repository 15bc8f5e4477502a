"""Runs nft: its commands are changes that happen as a whole or not at all, its answers are JSON."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from contextlib import ExitStack
from typing import Optional

from pybpfthrottle.backends.nftables.rules import FAMILY, Listing
from pybpfthrottle.errors import BackendError
from pybpfthrottle.linux import netns, process

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
_CAP_NET_ADMIN = 12


class Nft:
    """Runs nft in one network namespace. ``close`` or ``with`` releases that.

    All methods raise BackendError.
    """

    def __init__(self, namespace: Optional[int] = None) -> None:
        """``namespace`` is the number of the network namespace; None is this process's own."""
        self._resources = ExitStack()
        self._fd = -1
        self.namespace = netns.number() if namespace is None else namespace
        if self.namespace != netns.number():
            fd = netns.open_by_number(self.namespace)
            if fd is None:
                raise BackendError(f"there is no network namespace {self.namespace} any more")
            self._fd = fd
            self._resources.callback(os.close, fd)

    def change(self, commands: str) -> None:
        """Carry out commands, all or none."""
        log.debug("nft in network namespace %d:\n%s", self.namespace, commands.rstrip())
        self._run(["-f", "-"], commands)

    def check(self, commands: str) -> None:
        """Have the kernel accept commands, and carry out none of them."""
        self._run(["--check", "-f", "-"], commands)

    def table(self, name: str) -> Optional[Listing]:
        """Return what is in a table, or None if there is no such table."""
        try:
            return self._list("table", FAMILY, name)
        except BackendError:
            tables = self._list("tables", FAMILY)
            if any(one.get("table", {}).get("name") == name for one in tables):
                raise
            return None

    def close(self) -> None:
        """Release the namespace."""
        self._resources.close()
        self._fd = -1

    def __enter__(self) -> Nft:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _list(self, *what: str) -> Listing:
        answer = self._run(["-j", "list", *what])
        try:
            listing: Listing = json.loads(answer)["nftables"]
        except (KeyError, TypeError, ValueError) as error:
            raise BackendError(f"cannot read what nft prints: {answer[:80]!r}") from error
        return listing

    def _run(self, arguments: list[str], commands: str = "") -> str:
        command = ["nft", *arguments]

        def run() -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                command,
                input=commands,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE_S,
                env={**os.environ, "LC_ALL": "C"},
            )

        try:
            done = run() if self._fd < 0 else netns.inside(self._fd, run)
        except FileNotFoundError as error:
            raise BackendError("nft is not installed: install the package nftables") from error
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"nft did not answer within {_PATIENCE_S:g} s") from error
        except OSError as error:
            raise BackendError(f"cannot run nft: {error.strerror}") from error
        if done.returncode:
            raise BackendError(_why(done))
        return done.stdout


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """Return why nft has failed, in one line."""
    if not int(process.own_status().get("CapEff", "0"), 16) & 1 << _CAP_NET_ADMIN:
        return "nft needs root, or CAP_NET_ADMIN in the network namespace"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = lines[0] if lines else f"it ended with status {done.returncode}"
    return f"nft failed: {reason}"
