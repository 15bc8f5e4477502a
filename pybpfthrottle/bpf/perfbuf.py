"""Reading perf buffers: what programs send by bpf_perf_event_output, a buffer for each CPU.

The kernel maps a page with both positions, and then the data once: a record may be in two parts.
Records of one CPU are in order, those of several are not.

Source: man 2 perf_event_open.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from contextlib import suppress
from functools import partial
from typing import Any, Callable, Iterator, Optional

from pybpfthrottle.bpf import perf, perf_abi
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.codecs import CodecLike
from pybpfthrottle.bpf.errors import BpfError
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.perf_abi import PerfEventAttr
from pybpfthrottle.bpf.readers import Reader, codec_of
from pybpfthrottle.bpf.tracing import events, sampling

_HEADER = struct.Struct("=IHH")
_LOST = struct.Struct("=QQ")
_SIZE_BYTES = 4  # before the data of a record
# How often it is looked whether a CPU has come or gone.
_LOOK_S = 1.0


class PerfBuffer(Reader):
    """The records of a perf event array, of all CPUs; ``close`` or ``with`` ends it.

    ``record`` is as for ``RingBuffer``; the kernel may put up to seven bytes behind a record, which
    a codec with a size leaves out. With ``memoryview`` records are valid until the next one is
    asked for. Each CPU has a buffer of ``pages`` pages, a power of two. The reader is woken by each
    record, or when ``watermark_bytes`` are there. ``lost`` counts the records for which a buffer
    had no room; ``on_lost`` is called with the CPU and their number as the reader finds it out.

    CPUs that go online get a buffer within a second while this is read. One reader a map at a time.
    Linux 4.4. Raises TypeError for a map of another type, ValueError for a number of pages that is
    no power of two, and BpfError.
    """

    _look_s = _LOOK_S

    def __init__(
        self,
        of: Map[Any, Any],
        record: Optional[CodecLike] = None,
        *,
        pages: int = 64,
        watermark_bytes: int = 0,
        on_lost: Optional[Callable[[int, int], object]] = None,
    ) -> None:
        if of.spec.type != MapType.PERF_EVENT_ARRAY:
            raise TypeError(f"map {of.spec.name!r} has type {of.spec.type}, not PERF_EVENT_ARRAY")
        if pages < 1 or pages & pages - 1:
            raise ValueError(f"{pages} pages are no power of two")
        self.lost = 0
        self._map = of.typed("I", "I")
        self._codec = codec_of(of, record)
        self._pages, self._watermark, self._on_lost = pages, watermark_bytes, on_lost
        self._buffers: dict[int, _Buffer] = {}
        self._looked_s = 0.0
        self._epoll = select.epoll()
        try:
            self._look()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """Return a descriptor for select and asyncio; it is readable when there may be records."""
        return self._epoll.fileno()

    def cpus(self) -> list[int]:
        """Return the CPUs that have a buffer."""
        return sorted(self._buffers)

    def close(self) -> None:
        """Release the buffers, and what is in them. Programs get ENOENT from then on."""
        for cpu in list(self._buffers):
            self._release(cpu)
        self._epoll.close()

    def __enter__(self) -> PerfBuffer:
        return self

    def _look(self) -> None:
        """Give a buffer to each CPU that is online, and take those of others back."""
        self._looked_s = time.monotonic()
        online = set(sampling.online())
        for cpu in sorted(online - self._buffers.keys()):
            if cpu < self._map.spec.max_entries:
                self._open(cpu)
        for cpu in self._buffers.keys() - online:
            if self._buffers[cpu].is_empty():
                self._release(cpu)

    def _open(self, cpu: int) -> None:
        attr = PerfEventAttr(
            type=perf_abi.PERF_TYPE_SOFTWARE,
            config=perf_abi.PERF_COUNT_SW_BPF_OUTPUT,
            sample_type=perf_abi.PERF_SAMPLE_RAW,
            sample_period=1,
            wakeup_events=self._watermark or 1,
            flags=perf_abi.ATTR_WATERMARK if self._watermark else 0,
        )
        try:
            buffer = _Buffer(perf.open_event(attr, cpu=cpu), self._pages)
        except OSError as error:
            raise BpfError(
                f"cannot open a perf buffer on CPU {cpu}: {events.why(error)}",
                errno=error.errno or 0,
            ) from error
        self._buffers[cpu] = buffer
        self._epoll.register(buffer.fd, select.EPOLLIN)
        self._map[cpu] = buffer.fd
        perf.ioctl(buffer.fd, perf_abi.PERF_EVENT_IOC_ENABLE)

    def _release(self, cpu: int) -> None:
        buffer = self._buffers.pop(cpu)
        with suppress(OSError, KeyError):  # the map may be closed already
            del self._map[cpu]
        with suppress(OSError):
            self._epoll.unregister(buffer.fd)
        buffer.close()

    def _available(self) -> Iterator[Any]:
        if time.monotonic() - self._looked_s > _LOOK_S:
            self._look()
        decode = self._codec.decode if self._codec else None
        size = getattr(self._codec, "size", None)
        for cpu, buffer in list(self._buffers.items()):
            for data in buffer.records(partial(self._lose, cpu)):
                if decode is None:
                    yield data
                else:
                    yield decode(bytes(data[:size]))

    def _lose(self, cpu: int, count: int) -> None:
        self.lost += count
        if self._on_lost is not None:
            self._on_lost(cpu, count)

    def _poll(self, timeout_s: Optional[float]) -> bool:
        """Wait, and look for new CPUs meanwhile."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left = _LOOK_S if end is None else min(_LOOK_S, max(0.0, end - time.monotonic()))
            if self._epoll.poll(left):
                return True
            if end is not None and time.monotonic() >= end:
                # With a watermark there may be records that nobody is woken for.
                return not self._is_held_up()
            self._look()
            if not self._is_held_up():
                return True

    def _is_held_up(self) -> bool:
        return all(buffer.is_empty() for buffer in self._buffers.values())


class _Buffer:
    """The buffer of one CPU, with the event that fills it."""

    def __init__(self, fd: int, pages: int) -> None:
        self.fd = fd
        self._size = pages * mmap.PAGESIZE
        try:
            self._memory = mmap.mmap(fd, self._size + mmap.PAGESIZE)
        except BaseException:
            os.close(fd)
            raise
        self._words = memoryview(self._memory)[: mmap.PAGESIZE].cast("Q")
        self._data = memoryview(self._memory)[mmap.PAGESIZE :]

    def is_empty(self) -> bool:
        """Return whether there is no record."""
        return self._words[_HEAD] == self._words[_TAIL]

    def records(self, lose: Callable[[int], None]) -> Iterator[memoryview]:
        """Return the records that are there, each given back when the next is asked for."""
        words, data, mask, size = self._words, self._data, self._size - 1, self._size
        header = _HEADER.unpack_from
        head = words[_HEAD]
        while (tail := words[_TAIL]) != head:
            at = tail & mask
            kind, _, length = header(data, at)
            end = at + length
            if kind == perf_abi.PERF_RECORD_SAMPLE:
                at += perf_abi.HEADER_BYTES + _SIZE_BYTES
                try:
                    yield data[at:end] if end <= size else self._joined(at, end)
                finally:
                    words[_TAIL] = tail + length
                continue
            if kind == perf_abi.PERF_RECORD_LOST:
                at += perf_abi.HEADER_BYTES
                whole = data[at:end] if end <= size else self._joined(at, end)
                words[_TAIL] = tail + length
                lose(_LOST.unpack_from(whole)[1])
                continue
            words[_TAIL] = tail + length

    def _joined(self, begin: int, end: int) -> memoryview:
        """Return what goes on at the beginning of the buffer."""
        if begin >= self._size:
            return self._data[begin - self._size : end - self._size]
        return memoryview(bytes(self._data[begin:]) + bytes(self._data[: end - self._size]))

    def close(self) -> None:
        """Unmap the buffer and close the event."""
        self._words.release()
        # One that a caller keeps would keep the memory mapped; it must not fail for that.
        with suppress(BufferError):
            self._data.release()
            self._memory.close()
        os.close(self.fd)


_HEAD = perf_abi.DATA_HEAD_OFFSET // 8
_TAIL = perf_abi.DATA_TAIL_OFFSET // 8
