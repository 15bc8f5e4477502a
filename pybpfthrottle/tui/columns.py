"""Columns of text that fit into a width: the less important ones are left out. Pure."""

from __future__ import annotations

from typing import NamedTuple, Sequence


class Cell(NamedTuple):
    """A text, and how it stands out: ``strong``, ``good``, ``bad``, ``weak`` or not at all."""

    text: str
    style: str = ""


class Column(NamedTuple):
    """A column: its head, and how wide it has to be at least, and is to be at most.

    The ones of a low ``rank`` stay the longest.
    """

    head: str
    least: int
    most: int = 0
    rank: int = 0
    right: bool = False


_GAP = 1


def fit(columns: Sequence[Column], width: int) -> dict[int, int]:
    """Return the numbers of the columns that fit, in their order, and how wide each is.

    The most important one always is among them.
    """
    chosen: list[int] = []
    by_rank = sorted(range(len(columns)), key=lambda number: columns[number].rank)
    for number in by_rank:
        if chosen and _least(columns, [*chosen, number]) > width:
            break
        chosen.append(number)
    spare = width - _least(columns, chosen)
    widths = {}
    for number in chosen:
        column = columns[number]
        more = max(0, min(spare, column.most - column.least))
        widths[number] = min(column.least, width) + more
        spare -= more
    return {number: widths[number] for number in sorted(chosen)}


def _least(columns: Sequence[Column], chosen: Sequence[int]) -> int:
    return sum(columns[number].least for number in chosen) + _GAP * (len(chosen) - 1)
