"""The terminal is as it was after the full screen, however that ends."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path
from typing import Callable, Iterator

import pytest

PATIENCE_S = 30.0
# "crash" has the third look fail with what nobody expects.
PROGRAM = """
import sys
from made_up import Top, View, some
source = some()
divisors = iter([1, 1, 0])
if sys.argv[1] == "crash":
    look = source.look
    source.look = lambda: (1 / next(divisors), look())[1]
app = Top(source, View(), interval_s=0.1)
try:
    app.run()
finally:
    app.close()
sys.exit(app.return_code)
"""


class Run:
    """The full screen in a terminal of its own."""

    def __init__(self, how: str) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            here = Path(__file__).parent
            path = os.pathsep.join(map(str, (here, here.parents[2])))
            os.environ.update(TERM="xterm-256color", PYTHONPATH=path)
            os.execv(sys.executable, [sys.executable, "-c", PROGRAM, how])
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(self.terminal)
        self.shown = b""

    def read_until(self, text: bytes) -> None:
        """Read what it shows until that has a text."""
        self._read(lambda: text in self.shown)
        assert text in self.shown

    def read_to_the_end(self) -> None:
        """Read what it shows until it has ended."""
        self._read(lambda: False)

    def _read(self, is_enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_enough():
            assert time.monotonic() < deadline, self.shown
            if select.select([self.terminal], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self.terminal, 1 << 16)
                except OSError:  # its other end is closed
                    return

    def status(self) -> int:
        """Wait for its end; return its exit status, negative for a signal."""
        deadline = time.monotonic() + PATIENCE_S
        while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.pid = 0
        return os.waitstatus_to_exitcode(done[1])

    def close(self) -> None:
        """End it."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        if self.terminal >= 0:
            os.close(self.terminal)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """A run that has begun to show rows."""
    made = Run(request.param)
    try:
        made.read_until(b"rsync")
        yield made
    finally:
        made.close()


def is_given_back(run: Run) -> bool:
    """Whether the last that was shown is what ends the full screen, and the settings are back."""
    found = [run.shown.rfind(b"\x1b[?1049" + end) for end in (b"h", b"l")]
    cursor = [run.shown.rfind(b"\x1b[?25" + end) for end in (b"l", b"h")]
    settings = termios.tcgetattr(run.terminal)
    return -1 < found[0] < found[1] and -1 < cursor[0] < cursor[1] and settings == run.before


@pytest.mark.parametrize("run", ["quit"], indirect=True)
@pytest.mark.parametrize("end", [b"q", b"\x03", signal.SIGTERM, signal.SIGINT])
def test_after_a_regular_end(run: Run, end: object) -> None:
    """By a key or by a signal: nothing is said, and the status is 0."""
    if isinstance(end, bytes):
        os.write(run.terminal, end)
    else:
        os.kill(run.pid, signal.Signals(end))
    run.read_to_the_end()
    assert run.status() == 0
    assert is_given_back(run)
    assert b"Traceback" not in run.shown


@pytest.mark.parametrize("run", ["crash"], indirect=True)
def test_after_a_crash(run: Run) -> None:
    """A bug keeps its traceback, below what was there."""
    run.read_to_the_end()
    assert run.status() == 1
    assert b"ZeroDivisionError" in run.shown
    assert is_given_back(run)


@pytest.mark.parametrize("run", ["quit"], indirect=True)
def test_without_its_terminal_it_ends(run: Run) -> None:
    """As when a remote login is lost."""
    os.close(run.terminal)
    run.terminal = -1
    assert run.status() == 0
