"""The ring buffer reader, on records that real programs submit."""

from __future__ import annotations

import ctypes
import select
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from compiled import compiled

from pybpfthrottle.bpf import loader, maps
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.obj import elf
from pybpfthrottle.bpf.obj.specs import MapSpec
from pybpfthrottle.bpf.ringbuf import RingBuffer

PACKET = bytes(14 + 50)
BYTES_A_RECORD = 8 + 16


class Event(ctypes.Structure):
    _fields_ = (("sequence", ctypes.c_uint64), ("length", ctypes.c_uint32))


class Ring:
    """A ring buffer of 4096 bytes, and the programs that write into it."""

    def __init__(self, loaded: loader.Object) -> None:
        self.map = loaded.maps["ring"]
        self._programs = loaded.programs

    def submit(self, count: int = 1) -> int:
        """Submit records that are numbered; the last program's verdict, 0 if there was room."""
        return self._programs["submit"].test_run(PACKET, repeat=count).retval

    def discard(self) -> None:
        """Reserve a record and discard it."""
        assert self._programs["discard"].test_run(PACKET).retval == 0

    def output(self, length: int) -> None:
        """Put a record of so many zeros in."""
        context = struct.pack("=3I", 0, 0, length)
        assert self._programs["output"].test_run(PACKET, context=context).retval == 0


@pytest.fixture
def ring() -> Iterator[Ring]:
    """An empty ring buffer."""
    with loader.load(elf.read_object(compiled("ring"), name="ring")) as loaded:
        yield Ring(loaded)


def numbers(records: Any) -> list[int]:
    """The sequence numbers of records."""
    return [record.sequence for record in records]


def test_records_come_in_order_and_once(ring: Ring) -> None:
    """What was submitted is read in order, and not again."""
    with RingBuffer(ring.map, Event) as reader:
        ring.submit(5)
        records = list(reader.read(0))
        assert numbers(records) == [0, 1, 2, 3, 4]
        assert {record.length for record in records} == {len(PACKET)}
        assert list(reader.read(0)) == []


def test_discarded_records_are_passed_over(ring: Ring) -> None:
    """A record that its program discarded is not given, and what is behind it is."""
    with RingBuffer(ring.map, Event) as reader:
        ring.submit()
        ring.discard()
        ring.submit()
        ring.discard()
        assert numbers(reader.read(0)) == [0, 1]
        assert reader.unread_bytes() == 0


def test_records_of_any_length_are_whole(ring: Ring) -> None:
    """Records whose length is no multiple of eight follow each other, round and round."""
    with RingBuffer(ring.map) as reader:
        for turn in range(20):
            for length in range(64):
                ring.output(length)
                assert [len(record) for record in reader.read(0)] == [length], turn


def test_a_record_that_wraps_around_is_whole(ring: Ring) -> None:
    """Many rounds of the buffer lose and mix nothing: it is read 24 bytes at a time."""
    with RingBuffer(ring.map, Event) as reader:
        for first in range(0, 1000, 100):
            assert ring.submit(100) == 0
            assert numbers(reader.read(0)) == list(range(first, first + 100))


def test_a_full_buffer_has_room_once_it_is_read(ring: Ring) -> None:
    """A program finds no room until a reader has moved on; what it submitted is there."""
    with RingBuffer(ring.map, Event) as reader:
        assert ring.submit(1000) == 1
        assert reader.unread_bytes() == 4096 // BYTES_A_RECORD * BYTES_A_RECORD
        count = len(list(reader.read(0)))
        assert count == 4096 // BYTES_A_RECORD
        assert ring.submit() == 0
        assert numbers(reader.read(0)) == [count]


def test_each_record_is_consumed_as_it_is_given(ring: Ring) -> None:
    """A reader that stops early leaves the rest for the next one."""
    with RingBuffer(ring.map, Event) as reader:
        ring.submit(3)
        assert next(reader.read(0)).sequence == 0
    with RingBuffer(ring.map, Event) as reader:
        assert numbers(reader.read(0)) == [1, 2]


def test_read_waits_for_a_record(ring: Ring) -> None:
    """A record that is submitted while the reader waits wakes it."""
    with RingBuffer(ring.map, Event) as reader:
        timer = threading.Timer(0.1, ring.submit)
        timer.start()
        begin = time.monotonic()
        assert next(reader.read(10)).sequence == 0
        assert 0.05 < time.monotonic() - begin < 5
        timer.join()


def test_a_discarded_record_does_not_end_the_wait(ring: Ring) -> None:
    """A record that is discarded while the reader waits is passed over, and the next one read."""
    with RingBuffer(ring.map, Event) as reader:
        timers = [threading.Timer(0.1, ring.discard), threading.Timer(0.2, ring.submit)]
        for timer in timers:
            timer.start()
        assert next(reader.read(10)).sequence == 0
        for timer in timers:
            timer.join()


def test_read_ends_when_none_comes(ring: Ring) -> None:
    """Without records read ends after its time, and not much earlier or later."""
    with RingBuffer(ring.map) as reader:
        begin = time.monotonic()
        assert list(reader.read(0.1)) == []
        assert 0.09 < time.monotonic() - begin < 2


def test_a_callback_gets_each_record(ring: Ring) -> None:
    """Consume calls back with each record and counts them."""
    seen: list[Any] = []
    with RingBuffer(ring.map, Event) as reader:
        ring.submit(4)
        assert reader.consume(seen.append) == 4
        assert reader.consume(seen.append, timeout_s=0.01) == 0
    assert numbers(seen) == [0, 1, 2, 3]


def test_the_descriptor_is_readable_when_there_are_records(ring: Ring) -> None:
    """fileno() serves select and asyncio."""
    with RingBuffer(ring.map) as reader:
        assert select.select([reader], [], [], 0)[0] == []
        ring.submit()
        assert select.select([reader], [], [], 1)[0] == [reader]
        list(reader.read(0))
        assert select.select([reader], [], [], 0)[0] == []


def test_a_busy_record_holds_up_those_behind_it(ring: Ring) -> None:
    """A record that is reserved and not submitted is not given, and waiting for it ends in time."""
    with RingBuffer(ring.map, Event) as reader:
        ring.submit()
        data = bytearray(bytes(reader._data))
        header = struct.unpack_from("=I", data)[0]
        busy = bytearray(data)
        struct.pack_into("=I", busy, 0, header | 1 << 31)
        real, reader._headers = reader._headers, memoryview(busy).cast("I")
        begin = time.monotonic()
        assert list(reader.read(0.05)) == []
        assert time.monotonic() - begin < 2
        reader._headers = real
        assert numbers(reader.read(0)) == [0]


def test_closing_twice_closes_once(ring: Ring) -> None:
    """A closed reader can be closed again."""
    reader = RingBuffer(ring.map)
    reader.close()
    reader.close()


def test_another_type_of_map_is_refused() -> None:
    """A reader of another map is a TypeError that says so."""
    with maps.create(MapSpec("m", MapType.HASH, 4, 8, 1)) as found:
        with pytest.raises(TypeError, match="not RINGBUF"):
            RingBuffer(found)
