"""Signals as a queue to wait on, instead of interruptions anywhere."""

from __future__ import annotations

import math
import os
import signal
import struct
from contextlib import contextmanager, suppress
from typing import Any, Iterable, Iterator

from pybpfthrottle.linux import libc, process

# struct signalfd_siginfo: the number, an error, and the code, in 128 bytes.
_SIGINFO = struct.Struct("=Iii116x")
_SI_KERNEL = 0x80  # include/uapi/asm-generic/siginfo.h: from the terminal, among others


@contextmanager
def held_back() -> Iterator[None]:
    """Hold signals back for the duration of the context, so that nothing in it is interrupted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stops_left_to_others() -> Iterator[None]:
    """Let SIGTSTP, as of Ctrl-Z, pass for the duration of the context, unless it is ignored."""
    before = signal.getsignal(signal.SIGTSTP)
    if before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGTSTP, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def stop_as_a_job() -> None:
    """Stop this process until SIGCONT, if a shell controls it as a job.

    Otherwise do nothing: the kernel drops SIGTSTP where no process of the session could continue
    the stopped ones, and a shell without job control may ignore it.
    """
    before = signal.getsignal(signal.SIGTSTP)
    if before is not signal.SIG_IGN and process.terminal_of(os.getpid()):
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # this thread gets it before the call returns
        signal.signal(signal.SIGTSTP, before)


class SignalQueue:
    """Queues these signals within its context.

    Signals that were ignored before stay ignored, except SIGCHLD: while that is ignored, no
    child's status is available.
    """

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._numbers = list(numbers)
        self._before: dict[signal.Signals, Any] = {}
        self._came: list[signal.Signals] = []
        self.due_s = math.inf

    def __enter__(self) -> SignalQueue:
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in self._numbers:
            if number == signal.SIGCHLD or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        """Return a descriptor that is readable when a signal has arrived."""
        return self._read

    def run(self) -> None:
        """Read the signals that have arrived, for ``take``."""
        with suppress(BlockingIOError):
            came = (signal.Signals(number) for number in os.read(self._read, 4096))
            self._came += [number for number in came if number in self._before]

    def take(self) -> list[signal.Signals]:
        """Return the signals that have arrived since the last call, in order."""
        came, self._came = self._came, []
        return came


class SentSignals:
    """Queues these signals within its context, if a process has sent them.

    Signals from the terminal are dropped: the whole process group has got them. Signals that were
    ignored before stay ignored. All are blocked in this thread and the threads that it starts.
    """

    def __init__(self, numbers: Iterable[signal.Signals]) -> None:
        self._numbers = [
            number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
        ]
        self._came: list[signal.Signals] = []
        self.due_s = math.inf

    def __enter__(self) -> SentSignals:
        self._fd = libc.signalfd(self._numbers)
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, self._numbers)
        return self

    def __exit__(self, *_: object) -> None:
        self.run()  # pending signals must not arrive once unblocked
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
        os.close(self._fd)

    def fileno(self) -> int:
        """Return a descriptor that is readable when a signal has arrived."""
        return self._fd

    def run(self) -> None:
        """Read the signals that have arrived, for ``take``."""
        with suppress(BlockingIOError):
            while True:
                number, _, code = _SIGINFO.unpack(os.read(self._fd, _SIGINFO.size))
                if code != _SI_KERNEL:
                    self._came.append(signal.Signals(number))

    def take(self) -> list[signal.Signals]:
        """Return the signals that have arrived since the last call, in order."""
        came, self._came = self._came, []
        return came
