"""Signals as a queue that can be waited for, instead of interruptions anywhere."""

from __future__ import annotations

import os
import select
import signal
from contextlib import contextmanager
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

    def wait(self, timeout_s: float) -> list[signal.Signals]:
        """The signals that came, in order, after at most this time; an empty list if none did."""
        ready, _, _ = select.select([self._read], [], [], max(0.0, timeout_s))
        if not ready:
            return []
        came = (signal.Signals(number) for number in os.read(self._read, 4096))
        return [number for number in came if number in self._before]
