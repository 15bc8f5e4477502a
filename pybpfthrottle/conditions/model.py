"""What can be wrong with a network, as values. Pure; times in seconds, shares from 0 to 1."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Optional, Sequence

from pybpfthrottle.errors import LimitError
from pybpfthrottle.model import Direction

MAX_DELAY_S = 60.0
_MOST_PACKETS = 1 << 32
_LONGEST_PERIOD_S = 366 * 86400.0
BLOCKS = ("refuse", "drop")
# In a seed, so that the two directions do not decide the same.
_OTHER_WAY = 1 << 63
DNS_FAILURES = ("lost", "slow", "servfail")


@dataclass(frozen=True)
class Loss:
    """Which packets get lost.

    By chance or in bursts this is a chain of two states (Gilbert-Elliott): a packet that passed is
    followed by a lost one with the chance ``enter``, and a lost one by one that passes with the
    chance ``leave``. With ``nth`` every n-th packet is lost instead, and nothing is left to chance.
    """

    enter: float = 0.0
    leave: float = 1.0
    nth: int = 0

    def __post_init__(self) -> None:
        check_share("the chance of a loss", self.enter)
        check_share("the chance that a burst of losses ends", self.leave)
        if not 0 <= self.nth < _MOST_PACKETS:
            raise LimitError("every n-th packet can be lost from n = 1 on, up to 2^32")

    @classmethod
    def chance(cls, share: float) -> Loss:
        """Each packet is lost with the same chance, whatever became of the others."""
        return cls(share, 1 - share)

    @classmethod
    def burst(cls, share: float, length: float) -> Loss:
        """A share of the packets is lost, in bursts of ``length`` packets on average.

        Raises LimitError for what cannot be: bursts shorter than a packet, or so many losses that
        their pauses would be shorter than a packet.
        """
        check_share("the share of lost packets", share)
        if not (math.isfinite(length) and length >= 1):
            raise LimitError(f"a burst of losses is 1 packet or longer, not {length:g}")
        leave = 1 / length
        enter = 1.0 if share == 1 else share * leave / (1 - share)
        if enter > 1:
            most = length / (length + 1)
            raise LimitError(
                f"bursts of {length:g} packets can lose at most {most:.1%} of all; ask for longer"
                " bursts, or for less loss"
            )
        return cls(enter, 0.0 if share == 1 else leave)

    @classmethod
    def every(cls, nth: int) -> Loss:
        """Each n-th packet is lost: with 100 the hundredth, the two hundredth, and so on."""
        if nth < 1:
            raise LimitError("every n-th packet can be lost from n = 1 on")
        return cls(nth=nth)

    @property
    def share(self) -> float:
        """The share of packets that are lost in the long run."""
        if self.nth:
            return 1 / self.nth
        return self.enter / (self.enter + self.leave) if self.enter else 0.0

    @property
    def length(self) -> float:
        """How many packets in a row are lost on average."""
        if self.nth:
            return math.inf if self.nth == 1 else 1.0
        return 1 / self.leave if self.leave else math.inf

    @property
    def is_by_chance(self) -> bool:
        """Whether what became of a packet says nothing of the next one."""
        return not self.nth and math.isclose(self.enter + self.leave, 1.0)


@dataclass(frozen=True)
class Impairment:
    """What is done to the packets of one direction.

    Each packet is delayed by ``delay_s`` and a time between minus and plus ``jitter_s``; with
    ``keep_order`` none overtakes another. ``loss``, ``duplicate``, ``reorder`` and ``corrupt`` are
    the shares of packets that are lost, come twice, come early, or with a wrong bit. With
    ``servfail`` the answers of name servers by UDP say that these have failed. The same ``seed``
    makes the same decisions for the same packets.
    """

    delay_s: float = 0.0
    jitter_s: float = 0.0
    keep_order: bool = True
    loss: Optional[Loss] = None
    duplicate: float = 0.0
    reorder: float = 0.0
    corrupt: float = 0.0
    servfail: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for what, seconds in (("a delay", self.delay_s), ("a jitter", self.jitter_s)):
            if not 0 <= seconds <= MAX_DELAY_S:  # NaN too
                raise LimitError(f"{what} is between 0 and {MAX_DELAY_S:g} s, not {seconds:g} s")
        if self.jitter_s > self.delay_s:
            raise LimitError(
                f"a jitter of {self.jitter_s:g} s needs a delay of at least as much, since no"
                " packet can come before it was sent"
            )
        for name in ("duplicate", "reorder", "corrupt"):
            check_share(name, getattr(self, name))
        if self.reorder and not self.delay_s:
            raise LimitError("packets can only come early (reorder) where others have a delay")
        if not 0 <= self.seed < 1 << 64:
            raise LimitError("a seed is a whole number from 0 to 2^64 - 1")

    def __bool__(self) -> bool:
        """Whether anything is done at all."""
        return self != Impairment(keep_order=self.keep_order, seed=self.seed)

    def changed(self, **changes: object) -> Impairment:
        """Return the same with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outage:
    """Nothing gets through for ``down_s`` in each ``period_s``, first at the end of a period."""

    down_s: float
    period_s: float

    def __post_init__(self) -> None:
        if not 0 < self.down_s <= self.period_s <= _LONGEST_PERIOD_S:  # NaN too
            raise LimitError(
                "an outage is shorter than its period, such as 5s/60s, and that is a year at most"
            )

    @property
    def is_forever(self) -> bool:
        """Whether nothing gets through ever: offline."""
        return self.down_s == self.period_s


OFFLINE = Outage(1.0, 1.0)


@dataclass(frozen=True)
class Conditions:
    """A network with faults: what is done to each direction's packets, and to connections.

    ``block`` is what happens to new connections: they are refused, or their packets dropped.
    ``dns`` is what happens to answers from port 53: lost, slow (the first is lost, so that the
    question is asked again), or servfail.
    """

    download: Impairment = field(default_factory=Impairment)
    upload: Impairment = field(default_factory=Impairment)
    outage: Optional[Outage] = None
    block: Optional[str] = None
    dns: Optional[str] = None

    def __post_init__(self) -> None:
        for what, value, known in (
            ("block", self.block, BLOCKS),
            ("dns", self.dns, DNS_FAILURES),
        ):
            if value not in (None, *known):
                raise LimitError(f"{what} is {' or '.join(known)}, not {value!r}")

    def __bool__(self) -> bool:
        """Whether anything is wrong with the network."""
        return any(bool(getattr(self, each.name)) for each in fields(self))

    @property
    def is_by_chance(self) -> bool:
        """Whether the seed makes a difference."""
        both = (self.download, self.upload)
        return any(
            (one.loss is not None and not one.loss.nth)
            or one.jitter_s
            or one.duplicate
            or one.reorder
            or one.corrupt
            for one in both
        )

    def impairment(self, direction: Direction) -> Impairment:
        """Return what is done to the packets of a direction."""
        return self.download if direction is Direction.DOWNLOAD else self.upload

    def diverted(self) -> Impairment:
        """Return what is done to packets that come in, with the answers that are to fail."""
        return self.download.changed(servfail=self.dns == "servfail")

    def both_ways(self) -> Conditions:
        """Return the same for where both directions can be impaired: each has half of the delay.

        So a round trip takes as much longer as where what comes in has all of it.
        """
        incoming = self.diverted()
        incoming = incoming.changed(delay_s=incoming.delay_s / 2, jitter_s=incoming.jitter_s / 2)
        return self.changed(
            download=incoming,
            upload=incoming.changed(
                loss=self.upload.loss, servfail=False, seed=self.upload.seed ^ _OTHER_WAY
            ),
        )

    def changed(self, **changes: object) -> Conditions:
        """Return the same with other values."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Injected:
    """What was done to the packets of one direction, counted in packets as large as on the wire.

    ``seen`` are all that came; each was delivered or lost. Of a delay there are the median and
    the 99th percentile, in seconds, as far as it was measured.

    What was not asked for is ``late_dropped``, all that were dropped for want of time or room:
    ``too_late`` for their keeper, ``no_room`` in a queue or the memory of ours, or ``refused`` by
    a device. ``passed_undelayed`` were not held, and ``unread`` are datagrams that arrived, but
    found no room in the buffer of the command's socket, as far as that can be known.
    """

    seen: int = 0
    delivered: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    corrupted: int = 0
    failed_answers: int = 0
    late_dropped: int = 0
    too_late: int = 0
    no_room: int = 0
    refused: int = 0
    passed_undelayed: int = 0
    unread: int = 0
    delay_p50_s: Optional[float] = None
    delay_p99_s: Optional[float] = None

    @classmethod
    def sum_of(cls, several: Sequence[Injected]) -> Injected:
        """Return all together; the delays are those where most was delivered."""
        counts = {
            each.name: sum(getattr(one, each.name) for one in several)
            for each in fields(cls)
            if not each.name.startswith("delay_")
        }
        most = max(several, key=lambda one: one.delivered, default=cls())
        return cls(**counts, delay_p50_s=most.delay_p50_s, delay_p99_s=most.delay_p99_s)


def check_share(what: str, share: float) -> None:
    """Raise LimitError for what is not a share from 0 to 1."""
    if not 0 <= share <= 1:  # NaN too
        raise LimitError(f"{what} is between 0% and 100%, not {share:.6g} (1 is 100%)")
