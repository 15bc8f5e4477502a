"""The vocabulary: what is limited, to what rate, with what result. Pure; to and from JSON."""

from __future__ import annotations

import re
from enum import Enum, IntEnum
from typing import Any, Mapping, Optional

from pybpfthrottle.bpf.obj.plain import Data, NamedTuple, made
from pybpfthrottle.errors import LimitError

_K = 1024
_BYTE_UNITS = {
    "": 1,
    **dict.fromkeys(("k", "kb", "kib"), _K),
    **dict.fromkeys(("m", "mb", "mib"), _K**2),
    **dict.fromkeys(("g", "gb", "gib"), _K**3),
}
_BIT_UNITS = {"kbit": 1000, "mbit": 1000**2, "gbit": 1000**3}
_SIZE_UNITS = {**_BYTE_UNITS, **dict.fromkeys(("t", "tb", "tib"), _K**4)}
_MAX_BYTES = 1000 * _K**4
_NUMBER = r"([0-9]*)\.?([0-9]*)"
_MAX_DIGITS = 30

_BLOCK = "block"

ACCEPTED = (
    "bytes per second with K, M or G (1024-based: 500K, 1.5M, 2GB, 1MB/s),"
    " or bits per second with kbit, mbit or gbit (1000-based: 8mbit),"
    f" or {_BLOCK} to let nothing pass"
)


class Direction(IntEnum):
    """The direction of packets, seen from the process. The values are keys of the BPF maps."""

    DOWNLOAD = 0
    UPLOAD = 1

    def __str__(self) -> str:
        return self.name.lower()


class Rate(NamedTuple):
    """Bytes per second, from 1000 B/s to 100 GB/s; or BLOCKED, which is 0 and lets nothing pass."""

    bytes_per_s: int

    @property
    def is_blocked(self) -> bool:
        """Whether no payload passes."""
        return self.bytes_per_s == 0

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read ``500K``, ``8mbit`` or ``block``; raises LimitError with what is accepted."""
        if text.strip().lower() == _BLOCK:
            return BLOCKED
        found = _Amount.read(text)
        if not (found.digits and (found.unit in _BYTE_UNITS or found.unit in _BIT_UNITS)):
            raise LimitError(_refusal(text, found.written, found.unit))
        if len(found.digits) > _MAX_DIGITS:
            raise LimitError(f"{text!r} is out of range: {RANGE}")
        if found.unit in _BIT_UNITS:
            return cls.of(found.times(_BIT_UNITS[found.unit], 8), text)
        return cls.of(found.times(_BYTE_UNITS[found.unit]), text)

    @classmethod
    def of(cls, bytes_per_s: int, text: Optional[str] = None) -> Rate:
        """Return a rate in range. Raises LimitError, which quotes ``text``."""
        if not MIN_RATE.bytes_per_s <= bytes_per_s <= MAX_RATE.bytes_per_s:
            raise LimitError(f"{text or bytes_per_s} is out of range: {RANGE}")
        return cls(bytes_per_s)

    def __str__(self) -> str:
        return "blocked" if self.is_blocked else format_rate(self.bytes_per_s)

    def written(self) -> str:
        """Return it as ``parse`` reads it, exactly and as short as possible: 1M, 8mbit, block."""
        if self.is_blocked:
            return _BLOCK
        for scale, unit in ((_K**3, "G"), (_K**2, "M"), (_K, "K")):
            if self.bytes_per_s % scale == 0:
                return f"{self.bytes_per_s // scale}{unit}"
        for unit in ("mbit", "kbit"):
            if 8 * self.bytes_per_s % _BIT_UNITS[unit] == 0:
                return f"{8 * self.bytes_per_s // _BIT_UNITS[unit]}{unit}"
        return str(self.bytes_per_s)


class _Amount(NamedTuple):
    """A number and a unit as they were written; ``digits`` is empty where there is no number."""

    written: str
    digits: str
    decimals: int
    unit: str

    @classmethod
    def read(cls, text: str) -> _Amount:
        """Take a text apart."""
        given = text.strip()
        match = re.match(_NUMBER, given)
        whole, fraction = match.groups() if match else ("", "")
        written = match.group() if match else ""
        # Unicode has other digits too, and a K that becomes an ASCII one in lower case.
        digits = whole + fraction if text.isascii() else ""
        return cls(written, digits, len(fraction), _unit(given[len(written) :].strip()))

    def times(self, factor: int, divisor: int = 1) -> int:
        """Return the number, multiplied and divided, without what is behind the point."""
        return int(int(self.digits) * factor // (divisor * 10**self.decimals))


def parse_bytes(text: str) -> int:
    """Read an amount of data: ``500M``, ``1.5GB``, ``2T``. Raises LimitError."""
    found = _Amount.read(text)
    unit = 0 if "/" in text else _SIZE_UNITS.get(found.unit, 0)
    count = found.times(unit) if 0 < len(found.digits) <= _MAX_DIGITS else 0
    if not 0 < count <= _MAX_BYTES:
        raise LimitError(
            f"{text!r} is not an amount of data: give bytes with K, M, G or T (1024-based: 500M,"
            " 1.5G, 2TB), up to 1000T"
        )
    return count


def _unit(given: str) -> str:
    """Return a unit in lower case, without ``/s`` if it cannot mean bits: 8mb/s might."""
    unit = given.lower()
    if not unit.endswith("/s"):
        return unit
    base = given[:-2].rstrip()
    if base == "B":
        return ""
    return unit if base.endswith("b") else base.lower()


def _refusal(text: str, number: str, unit: str) -> str:
    if re.fullmatch(r"[kmg]i?b(ps|/?s)", unit):
        letter = unit[0]
        return (
            f"{text!r} may mean bits or bytes: write {number}{letter}bit for bits"
            f" or {number}{letter.upper()}B for bytes per second"
        )
    return f"{text!r} is not a limit: give {ACCEPTED}"


MIN_RATE = Rate(1000)
BLOCKED = Rate(0)
MAX_RATE = Rate(100 * _K**3)
RANGE = "a limit is between 1000 B/s and 100 GB/s"


def printable(text: str) -> str:
    """Return a text, such as a name, as one line with unprintable characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in text
    )


def format_bytes(count: float) -> str:
    """``48.5 KB``; K is 1024."""
    for unit in ("B", "KB", "MB"):
        if count < _K:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= _K
    return f"{count:.1f} GB"


def format_rate(bytes_per_s: float) -> str:
    """``48.5 KB/s``; K is 1024."""
    return format_bytes(bytes_per_s) + "/s"


class Counters(NamedTuple):
    """What a direction's program has counted since the throttle was made.

    Bytes are billed bytes: TCP payload, or the IP length of anything else. The totals include
    dropped packets, and exclude traffic that is not limited (loopback, by default).
    """

    program_calls: int = 0
    packets_total: int = 0
    bytes_total: int = 0
    packets_dropped: int = 0
    bytes_dropped: int = 0

    @property
    def bytes_passed(self) -> int:
        """The bytes that passed."""
        return self.bytes_total - self.bytes_dropped

    def __str__(self) -> str:
        share = self.packets_dropped / self.packets_total if self.packets_total else 0.0
        return (
            f"program_calls={self.program_calls}, packets={self.packets_total},"
            f" dropped={self.packets_dropped} ({share:.1%}),"
            f" bytes={self.bytes_total}, dropped_bytes={self.bytes_dropped}"
        )


class Moved(NamedTuple):
    """Bytes, by direction in the order of Direction."""

    download: int = 0
    upload: int = 0

    @classmethod
    def passed(cls, counters: Mapping[Direction, Counters]) -> Moved:
        """Return what has passed a throttle."""
        return cls(*(counters[one].bytes_passed if one in counters else 0 for one in Direction))

    def plus(self, other: Moved) -> Moved:
        """Return the sum."""
        return Moved(self.download + other.download, self.upload + other.upload)


class Verdict(Enum):
    """What the actual rate says about a limit."""

    IDLE = "idle"
    BELOW = "below the limit"
    BURST = "within the burst"
    THROTTLED = "✅ THROTTLED"
    BLOCKED = "⛔ BLOCKED"
    OVER_LIMIT = "⚠️ OVER LIMIT"
    NOT_WORKING = "⚠️ THROTTLE NOT WORKING"

    @property
    def short(self) -> str:
        """Return it for a narrow terminal: one word or mark."""
        return {
            Verdict.IDLE: "idle",
            Verdict.BELOW: "below",
            Verdict.BURST: "burst",
            Verdict.THROTTLED: "✅",
            Verdict.BLOCKED: "⛔",
            Verdict.OVER_LIMIT: "⚠️ OVER",
            Verdict.NOT_WORKING: "⚠️ FAILS",
        }[self]

    @classmethod
    def of(cls, ratio: float) -> Verdict:
        """Judge a ratio of actual to limit, without the burst: over above 1.1, failed above 1.5."""
        if ratio <= 0:
            return cls.IDLE
        if ratio > 1.5:
            return cls.NOT_WORKING
        return cls.OVER_LIMIT if ratio > 1.1 else cls.THROTTLED

    @classmethod
    def judge(cls, ratio: float, steady: float, *, dropped: bool) -> Verdict:
        """Judge a ratio, and ``steady``, the ratio without the burst.

        Below the limit means that nothing was held back: the ratio is under 0.9, and nothing was
        ``dropped``.
        """
        # If anything came at all it is not idle, however small the rest.
        found = cls.of(steady or min(ratio, 1e-9))
        if found is not cls.THROTTLED:
            return found
        if cls.of(ratio) is not cls.THROTTLED:
            return cls.BURST
        return cls.BELOW if ratio < 0.9 and not dropped else cls.THROTTLED


# None means unlimited, but counted; BLOCKED lets nothing pass.
Limits = Mapping[Direction, Optional[Rate]]


class Target(Data, frozen=True):
    """What is limited: processes, cgroups, systemd units or a command.

    Processes are given by id (``pids``), or match one each of the given names, executables and
    users. With ``children`` the processes that they start are limited too. ``cgroups`` are cgroup
    v2 paths, ``units`` are names, and ``command`` is an argument vector to run with the limit.
    ``rule`` names the rule that chooses the cgroups or, without any, the processes.
    """

    pids: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    executables: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    children: bool = True
    cgroups: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    rule: str = ""

    @property
    def matches(self) -> bool:
        """Whether processes are chosen by their properties, so that later ones may match."""
        return bool(self.names or self.executables or self.users)

    @property
    def processes(self) -> bool:
        """Whether processes are limited, whatever cgroup they are in."""
        return bool(self.pids) or self.matches or self.by_rule

    @property
    def by_rule(self) -> bool:
        """Whether a rule chooses the processes while they are limited."""
        return bool(self.rule) and not (self.cgroups or self.pids)

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, for JSON."""
        record: dict[str, Any] = {
            name: list(value)
            for name, value in vars(self).items()
            if isinstance(value, tuple) and value
        }
        if self.processes:
            record["children"] = self.children
        if self.rule:
            record["rule"] = self.rule
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Target:
        """Return the target that ``to_json`` wrote; fields of later versions are ignored."""
        known: dict[str, Any] = {
            name: tuple(record[name]) if isinstance(record[name], list) else record[name]
            for name in cls.__annotations__
            if name in record
        }
        return cls(**known)


TRAFFIC_KINDS = ("all", "internet", "local")


class Traffic(Data, frozen=True):
    """Which packets of a target are limited.

    ``kind`` is one of TRAFFIC_KINDS: local are private, link-local and multicast addresses, and
    those ``on_link``, this machine's own networks; internet are all others. ``to`` has the networks
    that alone are limited, ``but`` those that are not; of several the smallest decides. With
    ``loopback`` the loopback device is limited too.
    """

    loopback: bool = False
    kind: str = "all"
    to: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    on_link: tuple[str, ...] = ()

    @property
    def everywhere(self) -> bool:
        """Whether the address of the other end does not matter."""
        return self.kind == "all" and not self.to and not self.but

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON."""
        networks = {"kind": self.kind, "to": self.to, "except": self.but, "on_link": self.on_link}
        return {"loopback": self.loopback} | ({} if self.everywhere else {"networks": networks})

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Traffic:
        """Return what ``to_json`` wrote. Raises KeyError or TypeError."""
        networks = record.get("networks")
        if networks is None:
            return cls(bool(record.get("loopback")))
        lists = (tuple(map(str, networks[name])) for name in ("to", "except", "on_link"))
        return cls(bool(record.get("loopback")), str(networks["kind"]), *lists)


class ThrottleSpec(Data, frozen=True):
    """A throttle as requested by the command line or Python, or as the kernel has it.

    ``kept`` says that it stays in force after the process that made it has ended, ``expires_ns``
    when it ends, on CLOCK_BOOTTIME, or 0. ``paused`` has the limits that are lifted for now.
    """

    target: Target
    limits: Limits
    traffic: Traffic = Traffic()
    name: str = ""
    kept: bool = False
    expires_ns: int = 0
    paused: Limits = made(default_factory=dict)

    def with_limit(
        self, direction: Direction, rate: Optional[Rate], paused: Optional[Rate] = None
    ) -> ThrottleSpec:
        """Return it with another limit for a direction, and the one that is paused meanwhile."""
        left = {one: rate for one, rate in self.paused.items() if one is not direction}
        return self.changed(
            limits={**self.limits, direction: rate},
            paused=left if paused is None else {**left, direction: paused},
        )

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; limits are in bytes per second, null if there is none."""
        return {
            "name": self.name,
            "target": self.target.to_json(),
            "limits": _limits_to_json(self.limits),
            **self.traffic.to_json(),
            "kept": self.kept,
            "expires_ns": self.expires_ns,
            "paused": _limits_to_json(self.paused),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ThrottleSpec:
        """Return the spec that ``to_json`` wrote. Raises KeyError, TypeError or ValueError."""
        return cls(
            Target.from_json(record["target"]),
            _limits_from_json(record["limits"]),
            Traffic.from_json(record),
            str(record.get("name", "")),
            bool(record.get("kept")),
            int(record.get("expires_ns", 0)),
            _limits_from_json(record.get("paused", {})),
        )


def _limits_to_json(limits: Limits) -> dict[str, Optional[int]]:
    return {
        str(direction): rate.bytes_per_s if rate else None for direction, rate in limits.items()
    }


def _limits_from_json(record: Mapping[str, Any]) -> Limits:
    return {
        Direction[direction.upper()]: None if rate is None else Rate(int(rate))
        for direction, rate in record.items()
    }
