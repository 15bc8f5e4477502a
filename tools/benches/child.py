"""A process of a transfer: started in a namespace, read line by line, and ended without fail."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from contextlib import ExitStack
from typing import Any, Optional

from benches.surroundings import ENVIRONMENT, READY

# For what is not the transfer itself: starting Python, connecting, the first byte.
PATIENCE_S = 30.0
_GRACE_S = 5.0


class TransferError(Exception):
    """A transfer did not come about; the text is the reason."""


class Child:
    """One of ours in a namespace. It ends with its standard input, and so with this process."""

    def __init__(self, stack: ExitStack, command: list[str]) -> None:
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            bufsize=0,
            # Ctrl-C is for this process; it ends the others.
            start_new_session=True,
        )
        self._data = b""
        stack.callback(self._end)

    @property
    def pid(self) -> int:
        """The process id; a command that nsenter runs has the same."""
        return self._popen.pid

    def line(self, timeout_s: float = PATIENCE_S, *, beside: Optional[Child] = None) -> bytes:
        """The next line of output. Raises TransferError, also if ``beside`` says anything."""
        deadline_s = time.monotonic() + timeout_s
        # select() takes no descriptor above 1023, and there may be many.
        waiting = select.poll()
        for process in filter(None, (self, beside)):
            waiting.register(process.output(), select.POLLIN)
        while b"\n" not in self._data:
            left_ms = max(0.0, deadline_s - time.monotonic()) * 1000
            ready = [fd for fd, _ in waiting.poll(left_ms)]
            if self.output() in ready:
                chunk = os.read(self.output(), 1 << 16)
                if not chunk:
                    raise TransferError(self.reason())
                self._data += chunk
            elif ready and beside:
                raise TransferError(beside.reason())
            elif not ready:
                raise TransferError(f"no output within {timeout_s:.0f} s")
        line, _, self._data = self._data.partition(b"\n")
        return line

    def report(self, timeout_s: float = PATIENCE_S, *, beside: Optional[Child] = None) -> Any:
        """The next line of output, which is JSON."""
        return json.loads(self.line(timeout_s, beside=beside))

    def ready(self) -> None:
        """Wait until it says so."""
        line = self.line().decode(errors="replace")
        if line != READY:
            raise TransferError(f"unexpected output: {line}")

    def stop(self) -> None:
        """Ask for its last report."""
        if self._popen.stdin:
            self._popen.stdin.close()
            self._popen.stdin = None

    def output(self) -> int:
        """The descriptor that its lines come from."""
        assert self._popen.stdout
        return self._popen.stdout.fileno()

    def reason(self) -> str:
        """Why it ended, in its own words where it has some."""
        assert self._popen.stderr
        lines = self._popen.stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"it ended with status {self._popen.wait()}"

    def _end(self) -> None:
        self.stop()
        try:
            # Our limit takes its cgroup away when its command has ended.
            self._popen.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.communicate()
