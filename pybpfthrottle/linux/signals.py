"""Signals as a queue that can be waited for, instead of interruptions anywhere."""

from __future__ import annotations

import math
import os
import signal
from contextlib import contextmanager, suppress
from typing import Any, Iterable, Iterator


@contextmanager
def held_back() -> Iterator[None]:
    """Signals come after it: what is made is also registered, what is begun is also ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class SignalQueue:
    """While it is entered, these signals are queued.

    One that was ignored before stays ignored, but for SIGCHLD: without it no child's status can
    be had.
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
        """Return a descriptor that is readable when a signal has come."""
        return self._read

    def run(self) -> None:
        """Take in the signals that have come, for ``take``."""
        with suppress(BlockingIOError):
            came = (signal.Signals(number) for number in os.read(self._read, 4096))
            self._came += [number for number in came if number in self._before]

    def take(self) -> list[signal.Signals]:
        """Return the signals that have come since it was asked last, in order."""
        came, self._came = self._came, []
        return came
