"""The record of a throttle in its map: whoever is killed while writing it leaves it readable."""

from __future__ import annotations

from typing import Any, Iterator

import pytest

from pybpfthrottle.backends.ebpf import programs
from pybpfthrottle.backends.ebpf.records import RECORD, ThrottleRecord
from pybpfthrottle.backends.ebpf.registry import RecordMap
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.loader import Loadable
from pybpfthrottle.bpf.maps import Map

OLD, NEW = {"id": "first", "spec": {}}, {"id": "second", "spec": {}}
UPDATES = 3


@pytest.fixture
def live() -> Iterator[Map[Any, Any]]:
    """A map for a record."""
    with Loadable(programs.read("throttle"), []).create(RECORD) as made:
        yield made


class CutError(Exception):
    """Stands for SIGKILL: what comes after it is not done either."""


class Short:
    """A map that takes some updates, and none any more."""

    def __init__(self, live: Map[Any, Any], updates: int) -> None:
        self._typed = live.typed(U32, StructureCodec(ThrottleRecord))
        self._left = updates

    def __getitem__(self, key: int) -> Any:
        return self._typed[key]

    def __setitem__(self, key: int, value: Any) -> None:
        if self._left == 0:
            raise CutError
        self._left -= 1
        self._typed[key] = value


@pytest.mark.parametrize("updates", range(UPDATES + 1))
def test_who_is_killed_while_writing_leaves_the_old_or_the_new(
    live: Map[Any, Any], updates: int
) -> None:
    """After each of its updates the record can be read, and written again."""
    record = RecordMap(live)
    record.write(OLD)
    dying = RecordMap(live)
    dying._map = Short(live, updates)  # type: ignore[assignment]
    if updates < UPDATES:
        with pytest.raises(CutError):
            dying.write(NEW, flags=2)
    else:
        dying.write(NEW, flags=2)
    entry = record.read()
    assert entry is not None
    assert (entry.fields, entry.flags) == ((NEW, 2) if updates > 1 else (OLD, 0))
    assert record.is_at(entry.generation)
    generation = record.write(OLD)
    assert generation % 2 == 0
    assert generation > entry.generation
    again = record.read()
    assert again is not None
    assert again.fields == OLD
