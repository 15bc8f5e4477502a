"""Max-min fairness: who wants little gets it, and the others get equal parts of the rest. Pure."""

from __future__ import annotations

from typing import Sequence

from pybpfthrottle.shares import Want, fill

# Below this share of its part a member is not held back. What it wants is then what it moves, and
# some more, so that it can grow: 1 / 1.25 is well below.
_HELD_BACK = 0.9
_ROOM = 1.25


def parts(total: int, demands: Sequence[int]) -> list[int]:
    """Return the part of each member of a total; what nobody wants is divided equally.

    The sum is at most the total, and lacks at most one for each member.
    """
    found = [int(part) for part in fill(total, [Want(1, 0, demand) for demand in demands])]
    left = total - sum(found)
    return [part + left // len(demands) for part in found]


def demand(moved: int, part: int, total: int) -> int:
    """Return what a member wants that has moved so much per second while it had a part."""
    return total if moved >= _HELD_BACK * part else min(int(moved * _ROOM), total)
