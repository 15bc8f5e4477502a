"""Events of real programs as typed records, by ring and perf buffers, and commands back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from compiled import compiled
from since import since

from pybpfthrottle import bpf
from pybpfthrottle.bpf.loader import Object
from pybpfthrottle.bpf.perfbuf import PerfBuffer
from pybpfthrottle.bpf.tracing import sampling
from pybpfthrottle.bpf.userring import UserRingBuffer

PACKET = bytes(64)
PAGE = os.sysconf("SC_PAGE_SIZE")
EVENT_BYTES = 64


def loaded(*names: str) -> Object:
    """An object with programs that send events."""
    return bpf.load(bpf.read_object(compiled("events")), names)


def send(live: Object, name: str, count: int = 1) -> None:
    """Have a program send so many events."""
    live.programs[name].test_run(PACKET, repeat=count)


@pytest.fixture
def array() -> Iterator[Object]:
    """An object whose program sends events by a perf buffer."""
    with loaded("to_array") as live:
        yield live


def check(record: Any, sequence: int) -> None:
    """A record has what the program wrote, each in the form of its type."""
    assert record.sequence == sequence
    assert (record.error, record.kind, record.name) == (-2, "CLOSED", "a name")
    assert (record.place.port, record.place.address) == (443, (127, 0, 0, 1))
    assert (record.last, record.numbers) == (True, (0, 0, 7))


@since("5.10")
def test_a_ring_buffer_gives_what_it_was_declared_with():
    """Without a codec, records of a ring declared with a struct are named tuples of it."""
    with loaded("to_ring") as live, bpf.RingBuffer(live.maps["ring"]) as ring:
        send(live, "to_ring", 3)
        for sequence, record in enumerate(ring.read(0)):
            check(record, sequence)
        assert live.variables["sequence"].get() == 3
        with pytest.raises(LookupError, match="no struct 'nothing'"):
            live.record("nothing")


@since("5.10")
def test_records_without_a_copy():
    """A record that is the ring's memory is given back when the next one is asked for."""
    with loaded("small_to_ring") as live, bpf.RingBuffer(live.maps["ring"], memoryview) as ring:
        send(live, "small_to_ring", 3)
        seen, unread = [], []
        for view in ring.read(0):
            seen.append(int.from_bytes(view[:8], "little"))
            unread.append(ring.unread_bytes())
        assert (seen, unread) == ([0, 1, 2], [96, 64, 32])
        assert ring.unread_bytes() == 0


class TestPerfBuffers:
    """Perf buffers of the CPUs."""

    def test_records_are_typed(self, array: Object):
        """A codec of the object's types leaves out what the kernel puts behind a record."""
        with PerfBuffer(array.maps["array"], array.record("event")) as events:
            send(array, "to_array", 200)
            records = sorted(events.read(0))
            assert len(records) == 200
            for sequence, record in enumerate(records):
                check(record, sequence)
            assert list(events.read(0)) == []

    @pytest.mark.parametrize("record", [bytes, memoryview])
    def test_the_buffer_begins_anew(self, array: Object, record: Any):
        """Records that go on at the beginning of a buffer are whole, however often that happens."""
        with PerfBuffer(array.maps["array"], record, pages=1) as events:
            for first in range(0, 600, 20):
                send(array, "to_array", 20)
                found = [bytes(data)[:EVENT_BYTES] for data in events.read(0)]
                numbers = sorted(int.from_bytes(data[:8], "little") for data in found)
                assert numbers == list(range(first, first + 20))
            assert events.lost == 0

    def test_what_is_lost_is_counted_and_told(self, array: Object):
        """Where a buffer has no room, the number of lost events is told with the next record."""
        told: list[tuple[int, int]] = []
        with PerfBuffer(
            array.maps["array"], bytes, pages=1, on_lost=lambda cpu, n: told.append((cpu, n))
        ) as events:
            os.sched_setaffinity(0, {min(cpus := os.sched_getaffinity(0))})
            try:
                send(array, "to_array", 500)
                kept = len(list(events.read(0)))
                send(array, "to_array")
                kept += len(list(events.read(0)))
            finally:
                os.sched_setaffinity(0, cpus)
            assert 0 < kept < 501
            assert events.lost == 501 - kept
            assert told == [(min(cpus), events.lost)]

    def test_a_watermark_wakes_later(self, array: Object):
        """With a watermark nobody is woken for one record; a read that times out still sees it."""
        with PerfBuffer(array.maps["array"], bytes, watermark_bytes=PAGE) as events:
            send(array, "to_array")
            assert not events._epoll.poll(0)
            assert len(list(events.read(0))) == 1
            os.sched_setaffinity(0, {min(cpus := os.sched_getaffinity(0))})
            try:
                send(array, "to_array", 100)
            finally:
                os.sched_setaffinity(0, cpus)
            assert events._epoll.poll(5)
            assert len(list(events.read(0))) == 100

    def test_cpus_come_and_go(self, array: Object, monkeypatch: pytest.MonkeyPatch):
        """A CPU that goes online gets a buffer; that of one that went is given back when empty."""
        both = sampling.online()
        monkeypatch.setattr(sampling, "online", lambda: both[:1])
        with PerfBuffer(array.maps["array"], bytes) as events:
            assert events.cpus() == both[:1]
            monkeypatch.setattr(sampling, "online", lambda: both)
            events._looked_s -= 10
            assert list(events.read(0)) == []
            assert events.cpus() == both
            os.sched_setaffinity(0, {both[0]})
            try:
                send(array, "to_array")
            finally:
                os.sched_setaffinity(0, both)
            monkeypatch.setattr(sampling, "online", lambda: both[1:])
            for expected in (both, both[1:]):
                events._looked_s -= 10
                found = list(events.read(0))
                assert (events.cpus(), len(found)) == (expected, expected == both)

    def test_what_is_wrong(self, array: Object):
        """Another map, and a number of pages that is none, are refused."""
        with pytest.raises(TypeError, match="not PERF_EVENT_ARRAY"):
            PerfBuffer(array.maps["object.bss"])
        with pytest.raises(ValueError, match="no power of two"):
            PerfBuffer(array.maps["array"], pages=3)


@since("5.10")
@pytest.mark.parametrize("kind", ["ring", "array"])
class TestReading:
    """The ways to read, which both kinds of buffers have."""

    @pytest.fixture
    def live(self, kind: str) -> Iterator[Object]:
        """An object whose program sends small records."""
        with loaded(f"small_to_{kind}") as live:
            yield live

    def reader(self, live: Object, kind: str) -> Any:
        """A reader of small records."""
        make: Any = {"ring": bpf.RingBuffer, "array": PerfBuffer}[kind]
        return make(live.maps[kind], "QQII")

    def test_a_loop(self, live: Object, kind: str):
        """Plain iteration goes on for ever; a loop ends it, and the next goes on behind it."""
        with self.reader(live, kind) as events:
            send(live, f"small_to_{kind}", 3)
            for sequence, *_ in events:
                if sequence == 1:
                    break
            assert [sequence for sequence, *_ in events.read(0)] == [2]

    def test_a_callback_that_raises(self, live: Object, kind: str):
        """What a callback raises is raised; its record is consumed, and those behind it are not."""

        def fail(record: Any) -> None:
            raise RuntimeError(f"record {record[0]}")

        with self.reader(live, kind) as events:
            send(live, f"small_to_{kind}", 3)
            with pytest.raises(RuntimeError, match="record 0"):
                events.consume(fail)
            seen: list[int] = []
            assert events.consume(lambda record: seen.append(record[0])) == 2
            assert seen == [1, 2]

    def test_a_timeout(self, live: Object, kind: str):
        """A read ends when no record has come for so long."""
        with self.reader(live, kind) as events:
            begin = time.monotonic()
            assert list(events.read(0.05)) == []
            assert time.monotonic() - begin >= 0.05

    def test_asyncio(self, live: Object, kind: str):
        """Records come on an asyncio loop, on which other tasks go on; a task can be cancelled."""

        async def read(events: Any, seen: list[int]) -> None:
            async for sequence, *_ in events:
                seen.append(sequence)

        async def main() -> list[int]:
            seen: list[int] = []
            with self.reader(live, kind) as events:
                task = asyncio.ensure_future(read(events, seen))
                for _ in range(3):
                    await asyncio.sleep(0)
                    send(live, f"small_to_{kind}", 300)
                deadline = time.monotonic() + 10
                while len(seen) < 900 and time.monotonic() < deadline:
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            return sorted(seen)

        assert asyncio.run(main()) == list(range(900))

    @pytest.mark.timed
    def test_latency(self, live: Object, kind: str):
        """A record is there at once on an asyncio loop: half of the records within 20 ms."""

        async def main() -> list[float]:
            delays = []
            with self.reader(live, kind) as events:
                stream = events.__aiter__()
                for _ in range(50):
                    task = asyncio.ensure_future(stream.__anext__())
                    await asyncio.sleep(0.001)
                    send(live, f"small_to_{kind}")
                    _, sent_ns, *_ = await task
                    delays.append((time.monotonic_ns() - sent_ns) / 1e9)
                await stream.aclose()
            return sorted(delays)

        assert asyncio.run(main())[25] < 0.02


@since("6.1")
def test_commands_to_a_program():
    """A program takes out what Python puts into a user ring buffer; a full one takes no more."""
    with loaded("take_commands") as live, UserRingBuffer(live.maps["commands"], "Q") as commands:
        for _ in range(3):
            sent = 0
            while commands.send(sent):
                sent += 1
            assert sent == 4096 // 16
            send(live, "take_commands")
        assert live.variables["taken"].get() == 3 * sent
        assert live.variables["sum"].get() == 3 * sum(range(sent))
        with pytest.raises(TypeError, match="not USER_RINGBUF"):
            UserRingBuffer(live.maps["object.bss"])
    with loaded("take_commands") as live, UserRingBuffer(live.maps["commands"]) as commands:
        with pytest.raises(ValueError, match="larger than the buffer"):
            commands.send(bytes(4096))
