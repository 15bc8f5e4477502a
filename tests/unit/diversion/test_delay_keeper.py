"""The keeper reads each packet once, in batches, and drops what does not fit into memory."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from pybpfthrottle.conditions.model import Impairment
from pybpfthrottle.diversion import keeper as module
from pybpfthrottle.diversion.impairing import Impairing
from pybpfthrottle.diversion.keeper import Keeper
from pybpfthrottle.diversion.records import DivertKeeper
from pybpfthrottle.diversion.tally import Count, Tally


class Ring:
    """As the real one, it has consumed a record when the next one is asked for."""

    def __init__(self, count: int) -> None:
        self.left = list(range(count))

    def is_empty(self) -> bool:
        """Whether all are consumed."""
        return not self.left

    def records(self):
        """What is left."""
        while self.left:
            yield self.left[0]
            del self.left[0]


@pytest.fixture
def keeper(monkeypatch):
    """A keeper without an owner, which notes what it reads."""
    made = object.__new__(Keeper)
    made.read = Counter()
    made._shared = DivertKeeper()
    made._heap, made._lines = [], {}
    made._wakeups = SimpleNamespace(wake_at=lambda due_ns, else_after_ns: None)
    monkeypatch.setattr(Keeper, "_record", lambda self, record: self.read.update([record]))
    return made


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 128, 200])
def test_each_packet_is_read_once(keeper, count):
    """However many there are, and in turns."""
    keeper._ring = Ring(count)
    turns = 0
    while not keeper._turn():
        turns += 1
    assert keeper.read == Counter(range(count))
    assert keeper._ring.is_empty()
    assert turns >= count // 64


def test_a_packet_that_came_within_a_turn_does_not_look_late(keeper, monkeypatch):
    """The programs note when the first one was taken that was not seen; it was seen."""
    keeper._ring = Ring(1)

    def note(_keeper, _record):
        keeper._shared.oldest_ns = 5

    monkeypatch.setattr(Keeper, "_record", note)
    assert keeper._turn()
    assert keeper._shared.oldest_ns == 0


def test_what_does_not_fit_is_dropped(keeper, monkeypatch):
    """And counted; what is held already stays."""
    monkeypatch.setattr(module, "_MOST_BYTES", 250)
    keeper._held_bytes = keeper._number = 0
    tally = Tally.create()
    try:
        line = SimpleNamespace(tally=tally, impairing=Impairing(Impairment(delay_s=1)))
        packet = SimpleNamespace(count=1, frame=lambda *_: bytes(100))
        for _ in range(3):
            keeper._decide(line, packet, 0, -1, (b"", 0, 0))
        assert len(keeper._heap) == 2
        assert tally.counts[Count.FULL_DROPPED] == 1
    finally:
        tally.close()
