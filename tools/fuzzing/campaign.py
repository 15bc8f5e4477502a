"""Many inputs, in processes beside each other, and what went wrong with some of them."""

from __future__ import annotations

import os
import signal
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from random import Random
from typing import Iterator, NamedTuple

from fuzzing.subjects import subjects

_NICEST = 19
_AT_A_TIME = 2000
# What is longer than this for one input has no end.
_SECONDS_FOR_ONE = 20


class Crash(NamedTuple):
    """An input by its number, what it has raised, and where."""

    subject: str
    number: int
    what: str
    where: str
    text: str


class Figures(NamedTuple):
    """How many inputs were tried, how long that took on one CPU, and the crashes."""

    inputs: int
    cpu_s: float
    crashes: list[Crash]


class TooLongError(Exception):
    """An input that keeps its reader busy."""


def source(subject: str, seed: int, number: int) -> bytes:
    """Return an input: always the same one for the same numbers."""
    # No secret is made of this.
    return subjects()[subject].make(Random(f"{seed} {subject} {number}"))  # noqa: S311


def run(subject: str, seed: int, first: int, inputs: int, processes: int) -> Iterator[Figures]:
    """Yield the figures of one part after another."""
    parts = range(first, first + inputs, _AT_A_TIME)
    with ProcessPoolExecutor(processes, initializer=os.nice, initargs=(_NICEST,)) as pool:
        yield from pool.map(
            part,
            *zip(*((subject, seed, at, min(_AT_A_TIME, first + inputs - at)) for at in parts)),
        )


def part(subject: str, seed: int, first: int, inputs: int) -> Figures:
    """Try some inputs one after another."""
    begin = time.process_time()
    crashes = [
        crash for number in range(first, first + inputs) for crash in _try(subject, seed, number)
    ]
    return Figures(inputs, time.process_time() - begin, crashes)


def _try(subject: str, seed: int, number: int) -> Iterator[Crash]:
    data = source(subject, seed, number)
    # Of CPU time: on a busy machine, or while it is suspended, the clock says nothing of the input.
    signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, _SECONDS_FOR_ONE)
    try:
        subjects()[subject].use(data)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        yield Crash(subject, number, repr(error), where, traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _too_long(*_: object) -> None:
    raise TooLongError(f"more than {_SECONDS_FOR_ONE} s of CPU")
