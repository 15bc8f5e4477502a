"""A process that downloads in a child, whenever it is told to, and whether it is limited."""

from __future__ import annotations

import subprocess

from lab import Lab

from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.model import Rate

# The limit; without it a download gets 30 times that.
RATE = Rate.parse("300K")
SECONDS = 1
# What passes at once, before a limit takes hold, and what is on its way then.
BURST = 400_000


class Shell:
    """A process that downloads, in a child, when it is told to."""

    _CURL = "curl -sN -o /dev/null -w '%{size_download}\\n'"

    def __init__(self, own: Lab, scratch: Cgroup, shell: str = "sh") -> None:
        curl = f"{self._CURL} --max-time {SECONDS} {own.url}"
        command = own.inside(shell, "-c", f"while read x; do {curl}; done")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: scratch.move_in(0),
        )
        self.pid = self._process.pid

    def downloads(self) -> int:
        """How many bytes it gets in SECONDS."""
        assert self._process.stdin
        assert self._process.stdout
        print(file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def is_limited(self) -> bool:
        """Whether it does not get more than the limit allows; without it gets 30 times that."""
        return self.downloads() < RATE.bytes_per_s * SECONDS * 1.1 + BURST

    def end(self) -> None:
        """End it."""
        self._process.communicate(timeout=30)
