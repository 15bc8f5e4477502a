"""The demo, where its transfers do not go as they should."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def test_a_transfer_that_does_not_end_is_one_line(tool, own_loopback):
    """A server that no longer answers: what took too long is said, and nothing is left running."""
    process = tool.start("demo", "--loopback", "--seconds", "2", prefix=own_loopback)
    assert any(line.startswith(b"$ get") for line in process.stdout)
    server = _server_of(process.pid)
    os.kill(server, signal.SIGSTOP)
    result = tool.finish(process)
    assert result.status == 1
    assert "the download did not end within 12 s" in result.complaint
    assert not Path(f"/proc/{server}").exists()


def _server_of(demo):
    """The process that serves the demo's transfers."""
    children = Path(f"/proc/{demo}/task/{demo}/children").read_text().split()
    (server,) = [int(pid) for pid in children if b"\0serve\0" in _command_line(pid)]
    return server


def _command_line(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()
