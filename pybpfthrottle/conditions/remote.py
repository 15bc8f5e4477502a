"""A bad network that the helper puts in force, for whoever may not do so: its client's side."""

from __future__ import annotations

import json
import os
import socket
from typing import Any, Optional

from pybpfthrottle.conditions.network import Done, Offline
from pybpfthrottle.errors import Error, LimitError, ProcessError, ThrottleError
from pybpfthrottle.model import Direction

# Names the helper's socket.
VARIABLE = "PYBPFTHROTTLE_NETWORK_HELPER"
USUAL_SOCKET = "/run/pybpfthrottle-network.sock"
PATIENCE_S = 30.0
LONGEST_LINE = 1 << 16
_KINDS: dict[str, type[Error]] = {"LimitError": LimitError, "ProcessError": ProcessError}


def socket_path() -> str:
    """Return where the helper listens, as far as that is known here."""
    return os.environ.get(VARIABLE) or USUAL_SOCKET


class RemoteNetwork:
    """What ``network.Network`` is, in the hands of a helper. It ends with this process."""

    def __init__(
        self, pid: int, profile: str = "", *, path: str = "", loopback: bool = False, **given: Any
    ) -> None:
        """Have the helper put it in force for a process of this user, and what that starts.

        Raises LimitError, ProcessError or ThrottleError, as the helper says, and ThrottleError if
        there is no helper.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(PATIENCE_S)
            self._socket.connect(path or socket_path())
            self._lines = self._socket.makefile("r", encoding="utf-8")
            self._ask("begin", pid=pid, profile=profile, given=given, loopback=loopback)
        except OSError as error:
            self._socket.close()
            where = path or socket_path()
            raise ThrottleError(f"no helper listens on {where}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def set(self, **given: Any) -> None:
        """Make it another network, see Network.set."""
        self._ask("set", profile="", given=given)

    def profile(self, name: str, **given: Any) -> None:
        """Make it the network of a profile, see Network.profile."""
        self._ask("set", profile=name, given=given)

    def offline(self) -> Offline:
        """Have nothing get through until ``online``, see Network.offline."""
        self._ask("offline")
        return Offline(self)

    def online(self) -> None:
        """End ``offline``."""
        self._ask("online")

    def injected(self) -> dict[Direction, Done]:
        """Return what was done to the packets of each direction until now."""
        told = self._ask("tell")
        return {direction: Done.from_json(told[str(direction)]) for direction in Direction}

    def to_json(self) -> dict[str, Any]:
        """Return what is asked for and what was done, for JSON."""
        return self._ask("tell")

    def close(self) -> None:
        """End it. Doing so twice is no error."""
        for one in (getattr(self, "_lines", None), self._socket):
            if one is not None:
                one.close()

    def __enter__(self) -> RemoteNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: str, **more: Any) -> dict[str, Any]:
        try:
            self._socket.sendall((json.dumps({"do": what, **more}) + "\n").encode())
            line = self._lines.readline(LONGEST_LINE)
        except (OSError, ValueError) as error:
            raise ThrottleError(f"the helper does not answer: {error}") from error
        if not line:
            raise ThrottleError("the helper has ended, and the bad network with it")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _KINDS.get(answer.get("kind", ""), ThrottleError)(answer["error"])
        return answer


def owner_of(pid: int) -> Optional[int]:
    """Return the user of a process if all its user ids are the same, or None."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            ids = next(line.split()[1:] for line in file if line.startswith("Uid:"))
    except (OSError, StopIteration):
        return None
    return int(ids[0]) if len(set(ids)) == 1 else None
