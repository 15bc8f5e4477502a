"""Conditions as people write them, on command lines and in files: ``delay = "80ms"``."""

from __future__ import annotations

import re
from typing import Callable, Mapping, Optional, TypeVar

from pybpfthrottle.conditions.model import (
    OFFLINE,
    Conditions,
    Impairment,
    Loss,
    Outage,
)
from pybpfthrottle.errors import LimitError

T = TypeVar("T")

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"

# The names of all that can be asked for, with what each accepts.
ACCEPTED = {
    "delay": "a time such as 80ms",
    "jitter": "a time such as 20ms",
    "loss": "1% (by chance), burst:1%,8 (8 in a row on average) or every:100",
    "download_loss": "as loss",
    "upload_loss": "as loss",
    "outage": "always, or the time without a network in each period: 5s/60s",
    "duplicate": "a share such as 1%",
    "reorder": "a share such as 1%",
    "corrupt": "a share such as 0.1%",
    "block": "refuse or drop",
    "dns": "lost, slow or servfail",
    "seed": "a whole number",
}


def seconds(text: str) -> float:
    """Read a time with its unit: ``80ms``, ``1.5s``, ``2m``. Raises LimitError."""
    found = re.fullmatch(_NUMBER + r"\s*(us|ms|s|m)", text.strip(), re.ASCII)
    if found is None:
        raise LimitError(f"{text!r} is not a time: give a number and us, ms, s or m, such as 80ms")
    return float(found[1]) * _UNITS_S[found[2]]


def share(text: str) -> float:
    """Read a share as per cent: ``1%``, ``0.1%``. Raises LimitError."""
    found = re.fullmatch(_NUMBER + r"\s*%", text.strip(), re.ASCII)
    if found is None:
        raise LimitError(f"{text!r} is not a share: give per cent, such as 1% or 0.1%")
    value = float(found[1]) / 100
    if value > 1:
        raise LimitError(f"{text} is more than all: give at most 100%")
    return value


def loss(text: str) -> Loss:
    """Read which packets get lost: ``1%``, ``burst:1%,8``, ``every:100``. Raises LimitError."""
    kind, colon, rest = text.strip().partition(":")
    if not colon:
        return Loss.chance(share(text))
    if kind == "burst":
        first, comma, length = rest.partition(",")
        if comma and re.fullmatch(_NUMBER, length.strip(), re.ASCII):
            return Loss.burst(share(first), float(length))
    elif kind == "every" and rest.strip().isdecimal():
        return Loss.every(int(rest))
    raise LimitError(f"{text!r} is not a loss: give {ACCEPTED['loss']}")


def outage(text: str) -> Outage:
    """Read when nothing gets through: ``5s/60s``, or ``always``. Raises LimitError."""
    if text.strip() == "always":
        return OFFLINE
    down, slash, period = text.partition("/")
    if not slash:
        raise LimitError(f"{text!r} is not an outage: give {ACCEPTED['outage']}")
    return Outage(seconds(down), seconds(period))


def seed(text: str) -> int:
    """Read a seed. Raises LimitError."""
    if not (text.strip().isascii() and text.strip().isdecimal()):
        raise LimitError(f"{text!r} is not a seed: give a whole number")
    return int(text)


def conditions_from(texts: Mapping[str, str]) -> Conditions:
    """Return the conditions that texts ask for, by the names in ``ACCEPTED``.

    Delay, jitter, duplicate, reorder and corrupt are about what comes in; loss is about both
    directions, unless one of them has its own. Raises LimitError, which names the text.
    """
    unknown = [name for name in texts if name not in ACCEPTED]
    if unknown:
        raise LimitError(f"there is no {unknown[0]!r} to ask for: give {', '.join(ACCEPTED)}")

    def read(name: str, by: Callable[[str], T]) -> Optional[T]:
        return _read(name, texts[name], by) if name in texts else None

    both = read("loss", loss)
    start = read("seed", seed) or 0
    download = Impairment(
        delay_s=read("delay", seconds) or 0.0,
        jitter_s=read("jitter", seconds) or 0.0,
        loss=_loss(read("download_loss", loss), both),
        duplicate=read("duplicate", share) or 0.0,
        reorder=read("reorder", share) or 0.0,
        corrupt=read("corrupt", share) or 0.0,
        seed=start,
    )
    # Not the same packets in both directions.
    upload = Impairment(loss=_loss(read("upload_loss", loss), both), seed=(start + 1) % (1 << 64))
    return Conditions(
        download, upload, read("outage", outage), texts.get("block"), texts.get("dns")
    )


def _loss(own: Optional[Loss], both: Optional[Loss]) -> Optional[Loss]:
    found = both if own is None else own
    return found if found is not None and found.share else None


def _read(name: str, text: str, by: Callable[[str], T]) -> T:
    try:
        return by(text)
    except LimitError as error:
        raise LimitError(f"{name}: {error}") from error


def described(conditions: Conditions) -> str:
    """Return conditions in a line, for people: ``delay 80 ms, loss 1% down, 1% up``."""
    down, up = conditions.download, conditions.upload
    parts = [f"delay {as_time(down.delay_s)}"] * bool(down.delay_s)
    parts += [f"jitter {as_time(down.jitter_s)}"] * bool(down.jitter_s)
    if down.loss is not None and down.loss == up.loss:
        parts.append(f"loss {as_loss(down.loss)} each way")
    else:
        parts += [f"download loss {as_loss(down.loss)}"] if down.loss else []
        parts += [f"upload loss {as_loss(up.loss)}"] if up.loss else []
    for name in ("duplicate", "reorder", "corrupt"):
        value = getattr(down, name)
        parts += [f"{name} {as_share(value)}"] * bool(value)
    parts += [as_outage(conditions.outage)] if conditions.outage else []
    blocks = {"refuse": "new connections refused", "drop": "new connections time out"}
    parts += [blocks[conditions.block]] if conditions.block else []
    parts += [f"DNS {conditions.dns}"] if conditions.dns else []
    return ", ".join(parts) or "nothing is wrong"


def as_time(value_s: float) -> str:
    """Return a time for people: ``80 ms``, ``1.5 s``."""
    return f"{value_s:g} s" if value_s >= 1 else f"{value_s * 1000:.4g} ms"


def as_share(value: float) -> str:
    """Return a share as per cent: ``0.1%``."""
    return f"{value * 100:.4g}%"


def as_loss(one: Loss) -> str:
    """Return which packets get lost, for people."""
    if one.nth:
        return f"of each {one.nth}th packet" if one.nth > 3 else f"of one packet in {one.nth}"
    text = as_share(one.share)
    return text if one.is_by_chance else f"{text} in bursts of {one.length:.3g}"


def as_outage(one: Outage) -> str:
    """Return when nothing gets through, for people."""
    if one.is_forever:
        return "offline"
    return f"{as_time(one.down_s)} offline in each {as_time(one.period_s)}"
