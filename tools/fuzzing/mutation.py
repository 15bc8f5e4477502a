"""Changes at random that leave most of an input as it was, so that more of it is read."""

from __future__ import annotations

from random import Random
from typing import Sequence

# Limits of types, and what is one beyond.
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_MOST_CHANGES = 4
_LONGEST_SLICE = 32


def changed(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Return an input with a few changes; ``others`` are inputs to take parts from."""
    result = bytearray(data)
    for _ in range(random.randint(1, _MOST_CHANGES)):
        if not result:
            break
        random.choice(_CHANGES)(random, result, random.choice(others))
    return bytes(result)


def _flip(random: Random, data: bytearray, _: bytes) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set_byte(random: Random, data: bytearray, _: bytes) -> None:
    data[random.randrange(len(data))] = random.randrange(256)


def _set_number(random: Random, data: bytearray, _: bytes) -> None:
    width = random.choice((1, 2, 4, 8))
    at = random.randrange(len(data)) // width * width
    number = random.choice(_NUMBERS) & ((1 << 8 * width) - 1)
    room = len(data[at : at + width])
    data[at : at + room] = number.to_bytes(width, "little")[:room]


def _delete(random: Random, data: bytearray, _: bytes) -> None:
    at = random.randrange(len(data))
    del data[at : at + random.randint(1, _LONGEST_SLICE)]


def _repeat(random: Random, data: bytearray, _: bytes) -> None:
    at = random.randrange(len(data))
    data[at:at] = data[at : at + random.randint(1, _LONGEST_SLICE)]


def _cut_off(random: Random, data: bytearray, _: bytes) -> None:
    # Most often near the end, so that the rest is still of use.
    del data[len(data) - min(len(data), int(random.expovariate(1 / 16)) + 1) :]


def _take(random: Random, data: bytearray, other: bytes) -> None:
    if other:
        begin, at = random.randrange(len(other)), random.randrange(len(data))
        taken = other[begin : begin + random.randint(1, _LONGEST_SLICE)]
        data[at : at + random.choice((0, len(taken)))] = taken


_CHANGES = (_flip, _set_byte, _set_number, _set_number, _delete, _repeat, _cut_off, _take)
