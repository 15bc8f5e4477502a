"""What was done to packets, in memory that the keeper and its owner share.

Delays are counted in steps of 4 microseconds up to 4 ms, and beyond in steps of at most a 512th.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from pybpfthrottle.conditions.model import Injected

_STEP_SHIFT = 12  # 4.096 us
_LINEAR, _HALF = 1024, 512
_OCTAVES = 16  # up to 4 minutes
_STEPS = _LINEAR + _HALF * _OCTAVES
_WORD_BYTES = 8
_NS_PER_S = 1_000_000_000


class Count(IntEnum):
    """What is counted, in packets as they were on the wire."""

    SEEN = 0
    DELIVERED = 1
    LOST = 2
    DUPLICATED = 3
    REORDERED = 4
    CORRUPTED = 5
    LATE_DROPPED = 6
    FULL_DROPPED = 7
    REFUSED = 8
    FAILED_ANSWERS = 9


class Tally:
    """Counts, and how long packets were on their way. It owns its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, (len(Count) + _STEPS) * _WORD_BYTES)
        self.counts = memoryview(self._memory).cast("Q")

    @classmethod
    def create(cls) -> Tally:
        """Return a new one, of zeros. Raises OSError."""
        fd = os.memfd_create("pybpfthrottle-tally")
        try:
            os.truncate(fd, (len(Count) + _STEPS) * _WORD_BYTES)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def delivered(self, delay_ns: int, count: int) -> None:
        """Count packets that were given back."""
        counts = self.counts
        counts[Count.DELIVERED] += count
        counts[_FIRST + step_of(delay_ns)] += count

    def injected(self, full: int = 0, undelayed: int = 0) -> Injected:
        """Return what was done so far, in packets as they were on the wire.

        The keeper has not seen those that are ``full``, since its queue had no room for them, and
        those that passed ``undelayed``.
        """
        # The keeper does without, and has to start soon.
        from pybpfthrottle.conditions.model import Injected

        counts = self.counts
        too_late, refused = counts[Count.LATE_DROPPED], counts[Count.REFUSED]
        no_room = counts[Count.FULL_DROPPED] + full
        return Injected(
            seen=counts[Count.SEEN] + full,
            delivered=counts[Count.DELIVERED],
            lost=counts[Count.LOST],
            duplicated=counts[Count.DUPLICATED],
            reordered=counts[Count.REORDERED],
            corrupted=counts[Count.CORRUPTED],
            failed_answers=counts[Count.FAILED_ANSWERS],
            late_dropped=too_late + no_room + refused,
            too_late=too_late,
            no_room=no_room,
            refused=refused,
            passed_undelayed=undelayed,
            delay_p50_s=self.delay_s(0.5),
            delay_p99_s=self.delay_s(0.99),
        )

    def delay_s(self, share: float) -> Optional[float]:
        """Return the delay that a share of the packets did not exceed, None if there are none."""
        steps = self.counts[_FIRST:].tolist()
        wanted = sum(steps) * share
        if not wanted:
            return None
        step = next(step for step, sum_ in enumerate(accumulate(steps)) if sum_ >= wanted)
        return middle_of(step) / _NS_PER_S

    def close(self) -> None:
        """Close it."""
        self.counts.release()
        self._memory.close()
        os.close(self.fd)


_FIRST = len(Count)


def step_of(delay_ns: int) -> int:
    """Return the step that a delay is counted in."""
    value = max(delay_ns, 0) >> _STEP_SHIFT
    if value < _LINEAR:
        return value
    octave = value.bit_length() - 10
    return min(_LINEAR + (octave - 1) * _HALF + (value >> octave) - _HALF, _STEPS - 1)


def middle_of(step: int) -> float:
    """Return the middle of a step in nanoseconds."""
    if step < _LINEAR:
        return (step + 0.5) * (1 << _STEP_SHIFT)
    octave, value = divmod(step - _LINEAR, _HALF)
    return (value + _HALF + 0.5) * (1 << _STEP_SHIFT + octave + 1)
