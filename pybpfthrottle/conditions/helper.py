"""The helper: puts bad networks in force for processes of those who may not do so themselves.

It listens on a Unix socket, asks the kernel who is at the other end (SO_PEERCRED), and does nothing
to a process that is not that user's own. A process that becomes another user's, as by a set-uid
program, is let go: at once where the kernel reports executions (Linux 5.8), else within a quarter
of a second. Each connection has one network, which ends with it.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
import time
from contextlib import suppress
from typing import Any, Callable, Collection, Mapping, Optional, Sequence

from pybpfthrottle import diversion, registry
from pybpfthrottle.backends.protocol import Executions
from pybpfthrottle.backends.protocol import get as get_backend
from pybpfthrottle.conditions.network import Asked, Network, begin
from pybpfthrottle.conditions.remote import LONGEST_LINE, owner_of
from pybpfthrottle.errors import Error, ProcessError, SettingsError, ThrottleError
from pybpfthrottle.linux import process
from pybpfthrottle.logger import Logger
from pybpfthrottle.model import Target
from pybpfthrottle.supervisor import Chore, Frequent, Supervisor, next_round

log = Logger(__name__)

MOST_NETWORKS = 64
_CREDENTIALS = struct.Struct("=iII")
_PATIENCE_S = 5.0
_LOOK_S = 0.25


class Peer:
    """One client's connection, and its network if it has begun one. As a chore it answers."""

    due_s = float("inf")

    def __init__(self, own: socket.socket, gone: Callable[[Peer], None]) -> None:
        """``gone`` is called when the client has ended."""
        self._own = own
        self._gone = gone
        self._read = b""
        given = own.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, self.uid, _ = _CREDENTIALS.unpack(given)
        self.network: Optional[Network] = None
        self._loopback = False

    def fileno(self) -> int:
        """Return the connection's descriptor."""
        return self._own.fileno()

    def run(self) -> None:
        """Answer what the client asks."""
        data = b""
        with suppress(OSError):
            data = self._own.recv(LONGEST_LINE)
        self._read += data
        if not data or len(self._read) > LONGEST_LINE:
            self._gone(self)
            return
        *lines, self._read = self._read.split(b"\n")
        for line in lines:
            answer = self._answer(line)
            try:
                self._own.sendall((json.dumps(answer) + "\n").encode())
            except OSError:
                self._gone(self)
                return

    def chores(self) -> list[Chore]:
        """Return what is to be done for it: an answer, and what its network needs."""
        return [self, *([] if self.network is None else self.network.chores())]

    def has_some(self, pids: Collection[int]) -> bool:
        """Whether its network is that of one of some processes."""
        if self.network is None or not pids:
            return False
        return any(pid in pids for pid in self.network.throttle.processes())

    def let_others_go(self) -> None:
        """Let go of processes that are not the client's own any more, such as sudo."""
        if self.network is None or self.uid == 0:
            return
        throttle = self.network.throttle
        others = [pid for pid in throttle.processes() if owner_of(pid) != self.uid]
        if others:
            throttle.let_go(others)

    def close(self) -> None:
        """End the connection, and its network."""
        self._own.close()
        network, self.network = self.network, None
        if network is not None:
            network.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
            if not isinstance(asked, dict):
                raise ThrottleError("a request is a JSON object")
            return self._do(asked)
        except (Error, SettingsError) as error:
            return {"error": str(error), "kind": type(error).__name__}
        except (ValueError, TypeError, RecursionError) as error:
            return {"error": f"a request that cannot be read: {error}", "kind": "ThrottleError"}
        except Exception as error:  # from one client: the others go on
            log.exception("A request failed")
            return {"error": f"the helper failed: {error}", "kind": "ThrottleError"}

    def _do(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        what = asked.get("do")
        if what == "begin":
            return self._begin(asked)
        if self.network is None:
            raise ThrottleError("there is no network yet: begin one")
        if what == "set":
            self.network.change(self._wanted(asked, loopback=self._loopback))
        elif what in ("offline", "online"):
            getattr(self.network, what)()
        elif what != "tell":
            raise ThrottleError(f"there is no {what!r} to do")
        return self.network.to_json()

    def _begin(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        if self.network is not None:
            raise ThrottleError("this connection has a network already")
        pid = asked.get("pid")
        if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
            raise ProcessError("give the id of a process")
        # First the process, then its user: a number that is given to another one is noticed.
        target = process.Process(pid)
        self._refuse_others(target)
        self._loopback = bool(asked.get("loopback"))
        wanted = self._wanted(asked, loopback=self._loopback)
        network = begin(Target(pids=(pid,)), wanted, loopback=self._loopback, label="helper")
        try:
            # The network is of whoever had the number when it began.
            self._refuse_others(target)
            if not network.throttle.foothold().marked_at:
                raise ThrottleError(
                    "the helper needs a kernel that can mark the sockets of single processes"
                    " (Linux 5.10): in a whole cgroup there may be those of others"
                )
        except BaseException:
            network.close()
            raise
        self.network = network
        self.let_others_go()
        return network.to_json()

    def _refuse_others(self, target: process.Process) -> None:
        if owner_of(target.pid) != self.uid or not target.alive():
            raise ProcessError(
                f"process {target.pid} is not one of user {self.uid}; the helper does nothing"
                " to those of others"
            )

    def _wanted(self, asked: Mapping[str, Any], *, loopback: bool) -> Asked:
        """Return what network is asked for, as far as this may be had from somebody else.

        Files are not read with the helper's rights, and settings of the machine stay as they are.
        """
        given = asked.get("given") or {}
        if not isinstance(given, dict):
            raise ThrottleError("what is given is a JSON object")
        if {"replay", "replay_upload"} & given.keys():
            raise ThrottleError("the helper reads no traces")
        wanted = Asked.of(str(asked.get("profile", "")), **given)
        if loopback and self.uid != 0 and diversion.needs_diversion(wanted.conditions.diverted()):
            raise ThrottleError(
                "the helper delays nothing on the loopback device: that takes other settings of it"
            )
        return wanted


class Watch(Frequent):
    """Has processes let go that have become another user's. As a chore it looks for them."""

    def __init__(self, peers: Callable[[], Sequence[Peer]]) -> None:
        """``peers`` returns the clients."""
        self._peers = peers
        self._executions: Optional[Executions] = None
        self.due_s = next_round(_LOOK_S)
        try:
            self._executions = get_backend("ebpf").executions()
        except (Error, OSError) as error:
            log.info("Set-uid programs are found only by looking: %s", error)

    def fileno(self) -> int:
        """Return a descriptor that is readable after a process has executed a program, or -1."""
        return -1 if self._executions is None else self._executions.fileno()

    def run(self) -> None:
        """Look at all processes when it is time, and at once if one has executed a program."""
        executed = set() if self._executions is None else set(self._executions.executed())
        is_due = time.monotonic() >= self.due_s
        if is_due:  # a user id may change by a system call too
            self.due_s = next_round(_LOOK_S)
        for peer in self._peers():
            if is_due or peer.has_some(executed):
                peer.let_others_go()

    def close(self) -> None:
        """Look no more."""
        if self._executions is not None:
            self._executions.close()
            self._executions = None


class Helper:
    """Listens, and has a Peer for each client. As a chore it accepts. ``close`` ends all."""

    due_s = float("inf")

    def __init__(self, path: str, *, uid: int) -> None:
        """Listen on a socket for this user, and for root. Raises OSError."""
        self._peers: list[Peer] = []
        self._uid = uid
        self.path = path
        _remove_leftover(path)
        self._own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Whoever connects is asked for by SO_PEERCRED; the file itself stays root's.
        os.fchmod(self._own.fileno(), 0o666)
        before = os.umask(0)
        try:
            self._own.bind(path)
            self._own.listen(8)
        except BaseException:
            self._own.close()
            raise
        finally:
            os.umask(before)
        self._own.settimeout(_PATIENCE_S)
        self._watch = Watch(lambda: self._peers)

    def fileno(self) -> int:
        """Return the descriptor that clients connect to."""
        return self._own.fileno()

    def run(self) -> None:
        """Accept a client; those of others are turned away, and too many."""
        own, _ = self._own.accept()
        own.settimeout(_PATIENCE_S)
        peer = Peer(own, self._forget)
        if peer.uid not in (self._uid, 0) or len(self._peers) >= MOST_NETWORKS:
            peer.close()
            return
        self._peers.append(peer)

    def chores(self) -> list[Chore]:
        """Return what is to be done for all clients."""
        return [self, self._watch, *(chore for peer in self._peers for chore in peer.chores())]

    def serve(self, supervisor: Supervisor, until: Callable[[], bool]) -> None:
        """Answer until ``until`` says that it is enough."""
        registry.tidy_up()
        supervisor.add(self.chores)
        while not until():
            try:
                supervisor.step()
            except Exception:  # from one network: the others go on
                log.exception("A network's chore failed")

    def close(self) -> None:
        """End all networks, and listen no more."""
        for peer in list(self._peers):
            self._forget(peer)
        self._watch.close()
        self._own.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self, peer: Peer) -> None:
        self._peers = [one for one in self._peers if one is not peer]
        try:
            peer.close()
        except (Error, OSError) as error:
            log.warning("A network could not be ended well: %s", error)


def _remove_leftover(path: str) -> None:
    """Remove a socket that nobody listens on any more.

    Raises OSError if somebody does, or if it is something else than a socket.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, "something else than a socket is there", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        try:
            trial.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, "another helper listens there already", path)
