"""A helper: a process of ours beside this one, for what has to be quick and must not wait for it.

It has one end of a Unix socket, by which it is told what to do, and ends when the other end is
closed: so it also ends after its owner was killed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Callable, ClassVar, Iterable, Mapping, Optional, TypeVar

from pybpfthrottle.linux import clock, libc, process
from pybpfthrottle.logger import Logger

if TYPE_CHECKING:
    import subprocess

log = Logger(__name__)

_END_S = 2.0
# Another thread may have read what is waited for: look so often.
_LOOK_S = 0.01
_MOST_STARTS = 5
_MESSAGE_BYTES = 4096
_FIRST = -20  # of all priorities
_WRITING_NS = 50_000
_PR_SET_NAME, _PR_SET_TIMERSLACK = 15, 29
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

H = TypeVar("H", bound="SharedHelper")


class SharedHelper:
    """The owner's side: one helper process for all its users in this process.

    It ends with the last of its users. What it is told before its ``start`` waits in its socket. As
    a chore it replaces a helper that has died. A class of helpers has a ``title`` for people, and
    the ``module`` whose ``main`` is called with the number of the helper's socket.
    """

    title: ClassVar[str]
    module: ClassVar[str]
    _sharing: ClassVar[threading.Lock] = threading.Lock()
    _shared: ClassVar[Optional[SharedHelper]] = None

    # Why it is not there any more.
    ended: Optional[str] = None

    @classmethod
    def join(cls: type[H]) -> H:
        """Return the helper of this process, a new one if there is none.

        Each call needs one of ``leave``. Raises OSError.
        """
        with cls._sharing:
            shared = cls._shared
            # A process that was forked has the handle of its parent's helper.
            if (
                not isinstance(shared, cls)
                or shared._owner != os.getpid()
                or shared.ended is not None
            ):
                shared = cls._shared = cls()
            shared._users += 1
            return shared

    def leave(self) -> None:
        """Give up a helper; without users it ends."""
        with self._sharing:
            self._users -= 1
            if self._users:
                return
            if type(self)._shared is self:
                type(self)._shared = None
        with self._busy:
            if self.ended is None:
                self.ended = "no limit needs it any more"
                self._end_process()
            self._close()

    def __init__(self) -> None:
        """Make its socket. Raises OSError."""
        self._owner = os.getpid()
        self._users = self._starts = 0
        self.due_s = math.inf
        # Changes and the chore may be in different threads.
        self._busy = threading.RLock()
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._connect()

    def start(self) -> None:
        """Begin to start the process, unless it was started. Raises OSError if it is impossible."""
        with self._busy:
            if self._process is None and self.ended is None:
                try:
                    self._spawn()
                except OSError as error:
                    self.ended = str(error)
                    self._end_process()
                    raise

    @property
    def pid(self) -> int:
        """The helper's process id; 0 before its start."""
        return 0 if self._process is None else self._process.pid

    def fileno(self) -> int:
        """Return the descriptor of the socket that the helper reports on."""
        return self._socket.fileno() if self.ended is None else -1

    def run(self) -> None:
        """Do what the helper asks for, or replace it if it has died."""
        with self._busy:
            if self.ended is None and not self._listen():
                self._restart()

    def wait_until(self, is_done: Callable[[], bool], patience_s: float) -> None:
        """Wait for a time at most until the helper has told something."""
        deadline_s = time.monotonic() + patience_s
        while not is_done() and self.ended is None:
            wait_s = deadline_s - time.monotonic()
            if wait_s <= 0:
                return
            # select() takes no descriptor above 1023, and there may be many.
            heard = select.poll()
            heard.register(self._socket, select.POLLIN)
            if heard.poll(min(wait_s, _LOOK_S) * 1000):
                self.run()

    def tell(self, message: Mapping[str, Any], fds: Iterable[int] = ()) -> None:
        """Send the helper a message, and copies of descriptors, unless it has ended for good."""
        if self.ended is not None:
            return
        # It has died, and the next run replaces it; or it hangs, and nobody waits for it.
        with suppress(ConnectionError, BlockingIOError):
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(fds))

    def _hear(self, message: Mapping[str, Any]) -> None:
        """Handle one of the helper's messages."""
        raise NotImplementedError

    def _introduce(self) -> None:
        """Tell a helper that replaces another one all that the other one knew."""
        raise NotImplementedError

    def _abandon(self) -> None:
        """Have the kernel wait no longer for a helper that has ended."""
        raise NotImplementedError

    def _close(self) -> None:
        """Close what was shared with the helper."""
        raise NotImplementedError

    def _connect(self) -> None:
        self._socket, self._other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)

    def _spawn(self) -> None:
        import subprocess  # which takes a moment, and most limits need no helper

        self._starts += 1
        # The helper needs no other package.
        environment = {**os.environ, "PYTHONPATH": process.PACKAGE_ROOT}
        program = f"from {self.module} import main; main({self._other.fileno()})"
        with self._other as other:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-S", "-c", program],
                    pass_fds=[other.fileno()],
                    env=environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except ValueError as error:
                raise OSError(str(error)) from error
        _hurry(self._process.pid)

    def _restart(self) -> None:
        code = self._end_process()
        log.warning("%s has ended (exit status %s)", self.title, code)
        if self._starts >= _MOST_STARTS:
            self.ended = f"{self._starts} times, at last with exit status {code}"
            return
        self._process = None
        try:
            self._connect()
            self.start()
        except OSError as error:
            self.ended = str(error)
            return
        self._introduce()

    def _end_process(self) -> Optional[int]:
        from subprocess import TimeoutExpired

        self._socket.close()
        self._other.close()
        code: Optional[int] = None
        if self._process is not None:
            try:
                code = self._process.wait(_END_S)
            except TimeoutExpired:
                self._process.kill()
                code = self._process.wait()
        self._abandon()
        return code

    def _listen(self) -> bool:
        """Read the helper's messages; return False if it is gone."""
        with suppress(BlockingIOError):
            while True:
                try:
                    data = self._socket.recv(_MESSAGE_BYTES)
                except ConnectionError:
                    return False
                if not data:
                    return False
                self._hear(json.loads(data))
        return True


def _hurry(pid: int) -> None:
    """Have busy processes wait for a helper, from its start on, which takes a tenth of a second."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, _FIRST)
    # With autogroup the CPU is shared by session: the niceness of the helper's session counts.
    with suppress(OSError), open(f"/proc/{pid}/autogroup", "w") as autogroup:
        autogroup.write(str(_FIRST))


def begin(fd: int, name: str) -> socket.socket:
    """Make this process a helper, as quick as may be; return its end of the owner's socket.

    ``name`` is shown by ps, and has 15 characters at most.
    """
    for number in _SIGNALS:  # the owner ends it
        signal.signal(number, signal.SIG_IGN)
    shown = ctypes.create_string_buffer(name.encode())
    libc.prctl(_PR_SET_NAME, ctypes.addressof(shown))
    # By default the kernel coalesces timers within 50 us.
    with suppress(OSError):
        libc.prctl(_PR_SET_TIMERSLACK, 1000)
    return socket.socket(fileno=fd)


def without_collector() -> None:
    """Collect garbage once and never again: collecting takes milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()


class Wakeups:
    """What a helper waits for: messages of its owner, descriptors, and the time of what is due."""

    def __init__(self, owner: socket.socket) -> None:
        self._timer = libc.timerfd_create()
        self._armed_ns = 0
        self._epoll = select.epoll()
        self.add(self._timer)
        self.add(owner.fileno())

    def add(self, fd: int) -> None:
        """Wake up when a descriptor is readable, too."""
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Wake up for a descriptor no more."""
        self._epoll.unregister(fd)

    def wait(self, *, is_idle: bool = True) -> set[int]:
        """Return the descriptors that are readable, at once if the helper is not idle."""
        ready = {fd for fd, _ in self._epoll.poll(-1 if is_idle else 0)}
        if self._timer in ready:
            with suppress(BlockingIOError):
                os.read(self._timer, 8)
        return ready

    def wake_at(self, due_ns: int, *, else_after_ns: int = 0) -> None:
        """Wake up at a time of CLOCK_MONOTONIC; if that is 0 once more after a while, or never."""
        if due_ns == self._armed_ns:
            return
        wait_ns = max(due_ns - clock.monotonic_ns(), 1) if due_ns else else_after_ns
        libc.timerfd_settime(self._timer, wait_ns)
        self._armed_ns = due_ns

    def wake_soon(self) -> None:
        """Wake up when whoever writes a record has had a moment to do so.

        The helper may have interrupted it, on the same CPU.
        """
        self.wake_at(clock.monotonic_ns() + _WRITING_NS)


def listen(owner: socket.socket, fds: int = 8) -> Optional[tuple[Any, list[int]]]:
    """Return the owner's next message, and its descriptors; None if the owner is gone."""
    data, received, _, _ = socket.recv_fds(owner, _MESSAGE_BYTES, fds)
    return (json.loads(data), list(received)) if data else None


def report(owner: socket.socket, **what: Any) -> None:
    """Tell the owner something, unless it does not listen."""
    with suppress(OSError):
        owner.send(json.dumps(what).encode(), socket.MSG_DONTWAIT)
