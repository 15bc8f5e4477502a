"""pybpfthrottle switch: have a running instance attach in another way."""

from __future__ import annotations

import os
import time

from pybpfthrottle.cli.watch import SWITCHES
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux.process import Process, links_of

_PATIENCE_S = 5.0
_STEP_S = 0.01


def switch(pid: int, method: str) -> None:
    """Ask an instance by its signal, and wait until it has done so.

    Raises ProcessError if the process is none, or does not do it.
    """
    process = Process(pid)
    if not _handles(pid):
        raise ProcessError(
            f"process {pid} ({process.name}) is no pybpfthrottle that limits something"
        )
    number = next(number for number, wanted in SWITCHES.items() if wanted == method)
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        raise ProcessError(f"there is no process {pid}") from None
    except PermissionError:
        raise ProcessError(f"process {pid} ({process.name}) belongs to another user") from None
    deadline = time.monotonic() + _PATIENCE_S
    # Attached by link it has links, else it has none.
    while bool(links_of(pid)) != (method == "link"):
        if time.monotonic() > deadline or not process.alive():
            raise ProcessError(
                f"process {pid} ({process.name}) did not switch within {_PATIENCE_S:g} s;"
                " it tells why, if it can"
            )
        time.sleep(_STEP_S)


def _handles(pid: int) -> bool:
    """The signals would end any other program: be sure that it is one of ours, and ready."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            ours = b"pybpfthrottle" in file.read()
        with open(f"/proc/{pid}/status") as status:
            caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt"))
    except (OSError, StopIteration):
        return False
    return ours and all(caught >> (number - 1) & 1 for number in SWITCHES)
