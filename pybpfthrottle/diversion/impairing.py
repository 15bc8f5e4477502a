"""What becomes of each packet: decisions by chance, the same for the same seed and packets.

Each kind of decision has random numbers of its own: to ask for one more of them does not change
which packets the others concern.
"""

from __future__ import annotations

import random
from typing import Any, Callable, Mapping, NamedTuple

from pybpfthrottle.conditions.model import Impairment, Loss

_NS_PER_S = 1_000_000_000
# A packet that comes early has half of the delay. With none at all TCP would measure a round trip
# that is not there, and adapt to it.
_EARLY = 0.5


class Fate(NamedTuple):
    """When a packet is due, in nanoseconds on the kernel's clock, how often, and how it comes."""

    due_ns: int
    copies: int = 1
    is_early: bool = False
    is_damaged: bool = False


LOST = Fate(0, 0)


class Losing:
    """Whether each packet is lost, in order."""

    def __init__(self, loss: Loss, chance: Callable[[], float]) -> None:
        self._loss = loss
        self._chance = chance
        self._count = 0
        self._was_lost = False

    def __call__(self) -> bool:
        """Decide on the next packet."""
        loss = self._loss
        if loss.nth:
            self._count = (self._count + 1) % loss.nth
            return not self._count
        if self._was_lost:
            self._was_lost = self._chance() >= loss.leave
        else:
            self._was_lost = self._chance() < loss.enter
        return self._was_lost


class Impairing:
    """Decides what becomes of the packets of one diversion."""

    def __init__(self, wanted: Impairment) -> None:
        self._last_ns = 0
        self.change(wanted)

    def change(self, wanted: Impairment, *, anew: bool = True) -> None:
        """Decide by something else from now on; the order of packets is kept, if it is to be.

        Chance begins ``anew``, by the seed, or goes on where it is.
        """
        self.wanted = wanted
        self.delay_ns = round(wanted.delay_s * _NS_PER_S)
        self._jitter_ns = round(wanted.jitter_s * _NS_PER_S)
        if anew:
            self._begin(wanted)

    def _begin(self, wanted: Impairment) -> None:
        chances = {
            kind: random.Random(f"{wanted.seed} {kind}")  # noqa: S311 - to be repeated
            for kind in ("loss", "jitter", "duplicate", "reorder", "corrupt", "bit")
        }
        self._is_lost = Losing(wanted.loss, chances["loss"].random) if wanted.loss else None
        self._jitter = chances["jitter"].random
        self._duplicate = chances["duplicate"].random
        self._reorder = chances["reorder"].random
        self._corrupt = chances["corrupt"].random
        self.below = chances["bit"].randrange

    @property
    def splits(self) -> bool:
        """Whether each packet of the wire has a fate of its own."""
        wanted = self.wanted
        return bool(
            (wanted.loss and wanted.loss.share)
            or wanted.duplicate
            or wanted.reorder
            or wanted.corrupt
            or wanted.servfail
            or (wanted.jitter_s and not wanted.keep_order)
        )

    def decide(self, at_ns: int) -> Fate:
        """Return what becomes of the next packet, which came at a time."""
        wanted = self.wanted
        if self._is_lost is not None and self._is_lost():
            return LOST
        delay_ns = self.delay_ns
        if self._jitter_ns:
            delay_ns += round((2 * self._jitter() - 1) * self._jitter_ns)
        copies = 2 if wanted.duplicate and self._duplicate() < wanted.duplicate else 1
        is_damaged = bool(wanted.corrupt) and self._corrupt() < wanted.corrupt
        if wanted.reorder and self._reorder() < wanted.reorder:
            return Fate(at_ns + round(delay_ns * _EARLY), copies, True, is_damaged)
        due_ns = at_ns + delay_ns
        if wanted.keep_order:
            due_ns = self._last_ns = max(due_ns, self._last_ns)
        return Fate(due_ns, copies, False, is_damaged)


def to_json(wanted: Impairment) -> dict[str, Any]:
    """Return an impairment as the keeper is told of it."""
    loss = wanted.loss
    return {
        **{name: getattr(wanted, name) for name in _NAMES},
        "loss": None if loss is None else [loss.enter, loss.leave, loss.nth],
    }


def from_json(told: Mapping[str, Any]) -> Impairment:
    """Return the impairment that was told."""
    loss = told["loss"]
    return Impairment(
        **{name: told[name] for name in _NAMES}, loss=None if loss is None else Loss(*loss)
    )


_NAMES = (
    "delay_s",
    "jitter_s",
    "keep_order",
    "duplicate",
    "reorder",
    "corrupt",
    "servfail",
    "seed",
)
