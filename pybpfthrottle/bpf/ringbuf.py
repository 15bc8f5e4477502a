"""Reading a ring buffer: what programs submit to a BPF_MAP_TYPE_RINGBUF, in order. Linux 5.8.

The kernel maps a page with the reader's position, one with the writers', and then the data twice
in a row, so that no record has to be put together of two parts.

A program reserves a record by moving the writers' position on, and commits it by clearing the busy
bit of its header, both with release semantics. A reader has to load them with acquire semantics,
and to store its position with release semantics when it has copied the record. Python has no such
loads and stores. But it reads and writes an aligned word at once, on x86 and s390 plain accesses
have this order, and for other machines there is ``barrier``: to take and give back a lock is an
atomic exchange on either side.

Source: kernel/bpf/ringbuf.c and Documentation/bpf/ringbuf.rst of the kernel.
"""

from __future__ import annotations

import mmap
import os
import select
from contextlib import suppress
from threading import Lock
from typing import Any, Iterator, Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.codecs import CodecLike
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.readers import Reader, codec_of

_LENGTH = abi.BPF_RINGBUF_DISCARD_BIT - 1
_BUSY, _DISCARDED = abi.BPF_RINGBUF_BUSY_BIT, abi.BPF_RINGBUF_DISCARD_BIT
_HEADER = abi.BPF_RINGBUF_HDR_SZ
# Whose loads and stores are ordered without our help.
_ORDERED = os.uname().machine in ("x86_64", "i386", "i486", "i586", "i686", "s390x")

_lock = Lock()


class RingBuffer(Reader):
    """The records of a ring buffer; ``close`` or ``with`` ends it. One reader a map at a time.

    Records are what ``record`` makes of them: a codec such as ``Object.record`` returns, or what
    ``codecs.codec_for`` takes. Without one they are bytes, unless the map was declared with a type
    of values. With ``memoryview`` they are the ring's own memory, not copied, and valid until the
    next one is asked for. One that a program has reserved and not yet submitted holds up those
    behind it. The map stays the owner of its descriptor, and must not be closed before this. Raises
    TypeError for a map of another type, and OSError.
    """

    def __init__(self, of: Map[Any, Any], record: Optional[CodecLike] = None) -> None:
        if of.spec.type != MapType.RINGBUF:
            raise TypeError(f"map {of.spec.name!r} has type {of.spec.type}, not RINGBUF")
        self._codec = codec_of(of, record)
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

    def unread_bytes(self) -> int:
        """Return how many bytes of the buffer are taken, by records and their headers."""
        return self._written_to[0] - self._read_to[0]

    def close(self) -> None:
        """Unmap the buffer. Records that were not read stay in the map."""
        if not self._own.closed:
            for view in (self._headers, self._data, self._written_to, self._read_to):
                view.release()
            self._own.close()
            # A record that a caller keeps would keep the memory mapped; that is no failure.
            with suppress(BufferError):
                self._rest.close()
            self._epoll.close()

    def __enter__(self) -> RingBuffer:
        return self

    # The speed of reading is decided here: no call, and no attribute, that need not be.
    def _available(self) -> Iterator[Any]:
        read_to, written_to, headers = self._read_to, self._written_to, self._headers
        memory, data, page, mask = self._rest, self._data, mmap.PAGESIZE, self._size - 1
        decode = None if self._codec is None else self._codec.decode
        while (position := read_to[0]) != written_to[0]:
            if not _ORDERED:
                barrier()
            at = position & mask
            header = headers[at >> 2]
            if header & _BUSY:
                return
            if not _ORDERED:
                barrier()
            length = header & _LENGTH
            following = position + (length + _HEADER + 7 & ~7)
            at += _HEADER
            if header & _DISCARDED:
                read_to[0] = following
            elif decode is None:
                # The ring's own memory: it is given back when the next record is asked for.
                try:
                    yield data[at : at + length]
                finally:
                    if not _ORDERED:
                        barrier()
                    read_to[0] = following
            else:
                at += page
                record = memory[at : at + length]
                if not _ORDERED:
                    barrier()
                read_to[0] = following
                yield decode(record)

    def _poll(self, timeout_s: Optional[float]) -> bool:
        return bool(self._epoll.poll(timeout_s))

    def _is_held_up(self) -> bool:
        """Return whether there is no record, or the next one is not committed."""
        position = self._read_to[0]
        if position == self._written_to[0]:
            return True
        barrier()
        busy = self._headers[position % self._size // 4] & _BUSY
        barrier()
        return bool(busy)


def barrier() -> None:
    """Keep what is behind it from being done before what is in front of it."""
    with _lock:
        pass
