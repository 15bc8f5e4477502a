"""The process that keeps the rules of this machine: there is one at most, and a file says which."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Callable, Optional

from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux import process, run_files
from pybpfthrottle.linux.cgroup import locked
from pybpfthrottle.linux.process import Identity

# Asks it to read its files again, and to leave all limits to the kernel and end.
RELOAD, HAND_OVER = signal.SIGHUP, signal.SIGUSR1
DAEMON, APPLY = "daemon", "apply"

_PATH = os.path.join(run_files.DIRECTORY, "rules.state")
_VERSION = 1
_PATIENCE_S = 10.0
_STEP_S = 0.02


@dataclass(frozen=True)
class Instance:
    """Who keeps the rules of which files or directories.

    ``looked`` grows each time that all of it was put in force; ``mistakes`` are those of newer
    files, which are not used.
    """

    owner: Identity
    kind: str
    sources: tuple[str, ...]
    looked: int = 0
    mistakes: tuple[str, ...] = ()

    def tell(self) -> None:
        """Write it for others. Raises ThrottleError."""
        text = json.dumps({"version": _VERSION, **asdict(self)})
        try:
            run_files.write(_PATH, text)
        except OSError as error:
            raise ThrottleError(
                f"cannot write {_PATH}: {error.strerror}; this needs root and a writable /run"
            ) from error

    def send(self, number: signal.Signals, done: Callable[[Optional[Instance]], bool]) -> None:
        """Send it a signal, and wait until it has done what that asks for. Raises ThrottleError."""
        with suppress(ProcessLookupError):
            os.kill(self.owner.pid, number)
        deadline = time.monotonic() + _PATIENCE_S
        while not done(current()):
            if time.monotonic() > deadline:
                raise ThrottleError(
                    f"process {self.owner.pid}, which keeps the rules, does not answer"
                )
            time.sleep(_STEP_S)

    def reload(self) -> None:
        """Have it read its files again. Raises ThrottleError."""
        self.send(RELOAD, lambda now: now is None or now.looked > self.looked)

    def hand_over(self) -> None:
        """Have it end, and leave the limits in force. Raises ThrottleError."""
        self.send(HAND_OVER, self._has_left)

    def stop(self) -> None:
        """Have it remove its limits and end. Raises ThrottleError."""
        self.send(signal.SIGTERM, self._has_left)

    def _has_left(self, now: Optional[Instance]) -> bool:
        return now is None or now.owner != self.owner


def current() -> Optional[Instance]:
    """Return who keeps the rules now; None if nobody does."""
    try:
        fields = json.loads(run_files.read(_PATH) or "null")
        if not fields or fields.pop("version") != _VERSION:
            return None
        fields["owner"] = Identity(*fields["owner"])
        fields.update({name: tuple(fields[name]) for name in ("sources", "mistakes")})
        found = Instance(**fields)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return None if process.is_gone(found.owner) else found


def claim(kind: str, sources: tuple[str, ...]) -> Instance:
    """Become the one that keeps the rules. Raises ThrottleError if there is one."""
    with locked():
        other = current()
        if other is not None:
            raise ThrottleError(
                f"process {other.owner.pid} keeps the rules of {', '.join(other.sources)} already"
            )
        found = Instance(process.identity(), kind, sources)
        found.tell()
    return found


def leave() -> None:
    """Say that nobody keeps the rules any more."""
    run_files.delete(_PATH)
