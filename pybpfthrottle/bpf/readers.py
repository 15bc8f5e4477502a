"""What readers of events have in common: iteration, callbacks, asyncio, and waiting."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, AsyncIterator, Callable, Iterator, Optional

from pybpfthrottle.bpf.codecs import RAW, Codec, CodecLike, codec_for
from pybpfthrottle.bpf.maps import Map

# After so many records others on the same asyncio loop have a turn.
_TURN = 256
# A program submits what it has reserved within microseconds.
BUSY_PAUSE_S = 0.0001


class Reader(ABC):
    """A reader of events; ``close`` or ``with`` ends it."""

    # How often a reader on asyncio has a look without being woken; None for never.
    _look_s: Optional[float] = None

    @abstractmethod
    def fileno(self) -> int:
        """Return a descriptor for select and asyncio; it is readable when there may be records."""

    @abstractmethod
    def close(self) -> None:
        """Release what the reader has."""

    @abstractmethod
    def _available(self) -> Iterator[Any]:
        """Return the records that are there; each is consumed when it is given."""

    @abstractmethod
    def _poll(self, timeout_s: Optional[float]) -> bool:
        """Wait until there may be records. Return whether there are."""

    @abstractmethod
    def _is_held_up(self) -> bool:
        """Return whether no record can be read now."""

    def read(self, timeout_s: Optional[float] = None) -> Iterator[Any]:
        """Records as they come, until none has come for ``timeout_s``; None waits for ever.

        0 gives the records that are there. Each is consumed when it is given.
        """
        while True:
            yield from self._available()
            if not self._wait(deadline(timeout_s)):
                return

    def consume(self, callback: Callable[[Any], object], timeout_s: float = 0) -> int:
        """Call back with each record that ``read`` gives, and tell how many there were.

        What the callback raises ends this. The record that it was given is consumed then, and
        those behind it are not.
        """
        count = 0
        for record in self.read(timeout_s):
            callback(record)
            count += 1
        return count

    def __iter__(self) -> Iterator[Any]:
        """Records as they come, for ever."""
        return self.read()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Records as they come, on an asyncio loop; others have a turn in between."""
        import asyncio

        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.fileno(), ready.set)
        try:
            while True:
                for count, record in enumerate(self._available(), 1):
                    yield record
                    if count % _TURN == 0:
                        await asyncio.sleep(0)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(ready.wait(), self._look_s)
                ready.clear()
                # One that is reserved and not submitted makes the buffer readable as well.
                await asyncio.sleep(BUSY_PAUSE_S if self._is_held_up() else 0)
        finally:
            loop.remove_reader(self.fileno())

    def _wait(self, end: Optional[float]) -> bool:
        """Wait until a record can be read. Return whether one can."""
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not self._poll(left):
                return False
            if not self._is_held_up():
                return True
            if left == 0:
                return False
            time.sleep(BUSY_PAUSE_S)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def codec_of(of: Map[Any, Any], record: Optional[CodecLike]) -> Optional[Codec[Any]]:
    """Return the codec of a reader's records; None for those that are memory as it is.

    Where none is given it is that of the map's declaration, ``__type(value, struct event)``, or
    else that of bytes.
    """
    if record is memoryview:
        return None
    if record is None:
        return of.record if of.record is not None else RAW
    return codec_for(record, 0)


def deadline(timeout_s: Optional[float]) -> Optional[float]:
    """Return when a time from now is over, by the monotonic clock; None for never."""
    return None if timeout_s is None else time.monotonic() + timeout_s
