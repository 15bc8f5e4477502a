"""User ring buffers: records from Python to a program, which takes them out by a helper.

The kernel maps a page with the program's position, one with the writer's, and then the data twice
in a row. Linux 6.1; source: kernel/bpf/ringbuf.c of the kernel.
"""

from __future__ import annotations

import mmap
from typing import Any, Optional

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.codecs import RAW, CodecLike
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.readers import codec_of
from pybpfthrottle.bpf.ringbuf import barrier

_HEADER = abi.BPF_RINGBUF_HDR_SZ


class UserRingBuffer:
    """The writer of a user ring buffer; ``close`` or ``with`` ends it. One writer a map at a time.

    ``record`` is as for ``RingBuffer``. The map stays the owner of its descriptor. Raises TypeError
    for a map of another type, and OSError.
    """

    def __init__(self, of: Map[Any, Any], record: Optional[CodecLike] = None) -> None:
        if of.spec.type != MapType.USER_RINGBUF:
            raise TypeError(f"map {of.spec.name!r} has type {of.spec.type}, not USER_RINGBUF")
        self._codec = codec_of(of, record) or RAW
        self._size = of.spec.max_entries
        page = mmap.PAGESIZE
        # The program's page may only be read.
        self._taken = mmap.mmap(of.fd, page, mmap.MAP_SHARED, mmap.PROT_READ)
        try:
            self._rest = mmap.mmap(of.fd, page + 2 * self._size, offset=page)
        except OSError:
            self._taken.close()
            raise
        self._taken_to = memoryview(self._taken).cast("Q")
        self._written_to = memoryview(self._rest)[:page].cast("Q")
        self._data = memoryview(self._rest)[page:]
        self._headers = self._data.cast("Q")

    def send(self, value: Any) -> bool:
        """Put a record in. Return False, without it, where there is no room for it now.

        Raises ValueError for one that never has room.
        """
        data = self._codec.encode(value)
        needed = _HEADER + (len(data) + 7) // 8 * 8
        if needed > self._size:
            raise ValueError(f"a record of {len(data)} bytes is larger than the buffer")
        position = self._written_to[0]
        if needed > self._size - (position - self._taken_to[0]):
            return False
        at = position % self._size
        self._data[at + _HEADER : at + _HEADER + len(data)] = data
        self._headers[at // 8] = len(data)
        barrier()
        # From here on the program sees it: the header must be there before.
        self._written_to[0] = position + needed
        return True

    def close(self) -> None:
        """Unmap the buffer. Records that no program has taken stay in the map."""
        if not self._taken.closed:
            for view in (self._headers, self._data, self._written_to, self._taken_to):
                view.release()
            self._taken.close()
            self._rest.close()

    def __enter__(self) -> UserRingBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
