"""Reading a ring buffer: what programs submit to a BPF_MAP_TYPE_RINGBUF, in order. Linux 5.8.

The kernel maps a page with the reader's position, one with the writers', and then the data twice
in a row, so that no record has to be put together of two parts.

A program reserves a record by moving the writers' position on, and commits it by clearing the busy
bit of its header, both with release semantics. A reader has to load them with acquire semantics,
and to store its position with release semantics when it has copied the record. Python has no such
loads and stores. But it reads and writes an aligned word at once, on x86 and s390 plain accesses
have this order, and for other machines there is ``_barrier``: to take and give back a lock is an
atomic exchange on either side.

Source: kernel/bpf/ringbuf.c and Documentation/bpf/ringbuf.rst of the kernel.
"""

from __future__ import annotations

import mmap
import select
import time
from threading import Lock
from typing import Any, Callable, Iterator, Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.codecs import CodecLike, codec_for
from pybpfthrottle.bpf.maps import Map

_LENGTH = abi.BPF_RINGBUF_DISCARD_BIT - 1
# A program submits what it has reserved within microseconds.
_BUSY_PAUSE_S = 0.0001

_lock = Lock()


class RingBuffer:
    """The records of a ring buffer; ``close`` or ``with`` ends it. One reader a map at a time.

    Records are bytes, or what ``record`` makes of them: a codec, or what ``codecs.codec_for``
    takes. The map stays the owner of its descriptor, and must not be closed before this. Raises
    TypeError for a map of another type, and OSError.
    """

    def __init__(self, of: Map[Any, Any], record: CodecLike = bytes) -> None:
        if of.spec.type != MapType.RINGBUF:
            raise TypeError(f"map {of.spec.name!r} has type {of.spec.type}, not RINGBUF")
        self._codec = codec_for(record, 0)
        self._size = of.spec.max_entries
        page = mmap.PAGESIZE
        # Only the reader's page may be mapped for writing.
        self._own = mmap.mmap(of.fd, page)
        try:
            self._rest = mmap.mmap(
                of.fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
            )
        except OSError:
            self._own.close()
            raise
        self._read_to = memoryview(self._own).cast("Q")
        self._written_to = memoryview(self._rest)[:page].cast("Q")
        self._data = memoryview(self._rest)[page:]
        self._headers = self._data.cast("I")
        self._epoll = select.epoll()
        self._epoll.register(of.fd, select.EPOLLIN)

    def fileno(self) -> int:
        """Return a descriptor for select and asyncio; it is readable when there may be records."""
        return self._epoll.fileno()

    def read(self, timeout_s: Optional[float] = None) -> Iterator[Any]:
        """Records as they come, until none has come for ``timeout_s``; None waits for ever.

        0 gives the records that are there. Each is consumed when it is given. One that a program
        has reserved and not yet submitted holds up those behind it.
        """
        end = _deadline(timeout_s)
        while True:
            record = self._next()
            if record is not None:
                yield self._codec.decode(record)
                end = _deadline(timeout_s)
            elif not self._wait(end):
                return

    def consume(self, callback: Callable[[Any], object], timeout_s: float = 0) -> int:
        """Call back with each record that ``read`` gives, and tell how many there were."""
        count = 0
        for record in self.read(timeout_s):
            callback(record)
            count += 1
        return count

    def unread_bytes(self) -> int:
        """Return how many bytes of the buffer are taken, by records and their headers."""
        return self._written_to[0] - self._read_to[0]

    def close(self) -> None:
        """Unmap the buffer. Records that were not read stay in the map."""
        if not self._own.closed:
            for view in (self._headers, self._data, self._written_to, self._read_to):
                view.release()
            self._own.close()
            self._rest.close()
            self._epoll.close()

    def __enter__(self) -> RingBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self) -> Optional[bytes]:
        """Consume and return the next record that is not discarded; None if there is none yet."""
        while not self._is_held_up():
            position = self._read_to[0]
            at = position % self._size
            header = self._headers[at // 4]
            length = header & _LENGTH
            begin = at + abi.BPF_RINGBUF_HDR_SZ
            record = bytes(self._data[begin : begin + length])
            _barrier()
            self._read_to[0] = position + (length + abi.BPF_RINGBUF_HDR_SZ + 7) // 8 * 8
            if not header & abi.BPF_RINGBUF_DISCARD_BIT:
                return record
        return None

    def _is_held_up(self) -> bool:
        """Return whether there is no record, or the next one is not committed."""
        position = self._read_to[0]
        if position == self._written_to[0]:
            return True
        _barrier()
        busy = self._headers[position % self._size // 4] & abi.BPF_RINGBUF_BUSY_BIT
        _barrier()
        return bool(busy)

    def _wait(self, end: Optional[float]) -> bool:
        """Wait until a record is committed or discarded. Return whether one is."""
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not self._epoll.poll(left):
                return False
            if not self._is_held_up():
                return True
            if left == 0:
                return False
            time.sleep(_BUSY_PAUSE_S)  # a reserved record makes the buffer readable as well


def _deadline(timeout_s: Optional[float]) -> Optional[float]:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _barrier() -> None:
    with _lock:
        pass
