"""What a whole run of ``bench shape`` found, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Optional, Sequence

from benches import figures
from benches.figures import Figures, RoundTrips
from benches.methods import METHODS
from benches.transfer import STEP_S, Cell, Outcome

_HEADER: tuple[str, ...] = (
    "method",
    "ratio",
    "UDP",
    "1 s windows",
    "retransmitted",
    "ping inside, ms",
    "ping outside, ms",
    "fairness",
    "longest stall",
    "CPU s/GB",
)
_NONE = "-"
_HIGH_RATIO = 10
_LEGEND = """\
ratio: TCP payload received from the first byte on, with that of the ping inside, divided by the
limit (tc also counts headers: 0.956 is exact for it).
1 s windows: the same ratio in the lowest and the highest second, from the third second on.
UDP: the same ratio for the UDP flow. retransmitted: the share of TCP data sent again.
ping: round trip of 64 bytes, p50 / p95 / max, inside and outside the limit. fairness: Jain's index.
CPU: the whole machine, including both ends and the delay line, if there was enough traffic.
"""


@dataclass
class CellResult:
    """What each method did in a cell, by its name, and why it did not."""

    cell: Cell
    rounds: dict[str, list[Outcome]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """A run: what was measured, and what was left out for which reason."""

    seconds: float
    rounds: int
    left_out: dict[str, str]
    cells: list[CellResult] = field(default_factory=list)
    interrupted: bool = False


def machine() -> str:
    """The kernel, the processors and the date."""
    kernel = f"{platform.system()} {platform.release()} {platform.machine()}"
    return f"{kernel}, {os.cpu_count()} CPUs, {date.today()}"


def markdown(result: Result) -> str:
    """A table for each cell."""
    rounds = f"medians of {result.rounds}" if result.rounds > 1 else "one round"
    parts = [f"{machine()}; {result.seconds:g} s per transfer, {rounds}\n", _LEGEND]
    parts += [_table(cell) for cell in result.cells if cell.rounds or cell.failures]
    used = {name for cell in result.cells for name in cell.rounds}
    parts.append("".join(f"- {m.name}: {m.about}\n" for m in METHODS if m.name in used))
    if result.left_out:
        parts.append("Left out here:\n")
        parts.append("".join(f"- {what}: {why}\n" for what, why in result.left_out.items()))
    if result.interrupted:
        parts.append("Interrupted: the rest of the matrix is missing.\n")
    return "\n".join(parts)


def _table(cell: CellResult) -> str:
    rows: list[tuple[str, ...]] = [_HEADER]
    rows += [_row(name, figures.median(_figures(rounds))) for name, rounds in cell.rounds.items()]
    # A column that no row fills is left out.
    columns = [column for column in zip(*rows) if set(column[1:]) != {_NONE}]
    rows = list(zip(*columns))
    rows.insert(1, ("---",) + ("---:",) * (len(columns) - 1))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += [f"\n{name} failed: {why}" for name, why in cell.failures.items()]
    for name, outcomes in cell.rounds.items():
        dropped = max(outcome.dropped_by_line for outcome in outcomes)
        if dropped:
            lines.append(f"\n{name}: up to {dropped} packets were dropped by the line itself")
    return f"### {cell.cell}\n\n" + "\n".join(lines) + "\n"


def _figures(outcomes: Sequence[Outcome]) -> list[Figures]:
    return [outcome.figures for outcome in outcomes]


def _row(name: str, found: Figures) -> tuple[str, ...]:
    windows = _NONE
    if found.window_min is not None and found.window_max is not None:
        windows = f"{_ratio(found.window_min, 2)} to {_ratio(found.window_max, 2)}"
    return (
        name,
        _ratio(found.ratio, 3),
        _number(found.udp_ratio, ".3f"),
        windows,
        _number(found.retransmitted_percent, ".2f", " %"),
        _trips(found.inside),
        _trips(found.outside),
        _number(found.fairness, ".2f"),
        f"{found.stall_s:.2f} s",
        _number(found.cpu_s_per_gb, ".2f"),
    )


def _ratio(value: float, digits: int) -> str:
    """With fewer digits where there is no limit."""
    return f"{value:.{digits}f}" if value < _HIGH_RATIO else f"{value:.0f}"


def _trips(trips: Optional[RoundTrips]) -> str:
    return " / ".join(f"{ms:.1f}" for ms in trips) if trips else _NONE


def _number(value: Optional[float], how: str, unit: str = "") -> str:
    return _NONE if value is None else format(value, how) + unit


def to_json(result: Result) -> str:
    """Everything, with each round and its bytes in each tenth of a second."""
    return json.dumps(
        {
            "machine": machine(),
            "seconds": result.seconds,
            "rounds": result.rounds,
            "interrupted": result.interrupted,
            "left_out": result.left_out,
            "timeline_step_s": STEP_S,
            "cells": [_cell(cell) for cell in result.cells],
        },
        indent=2,
    )


def _cell(result: CellResult) -> dict[str, Any]:
    cell = result.cell
    narrow = cell.bottleneck
    return {
        "direction": str(cell.direction),
        "limit_bytes_per_s": cell.rate.bytes_per_s,
        "flows": cell.flows,
        "congestion_control": cell.congestion_control,
        "round_trip_ms": cell.round_trip_ms,
        "udp_percent": cell.udp_percent,
        "lost_percent": cell.lost_percent,
        "middle_ms": cell.middle_ms,
        "link": cell.link,
        "bottleneck_bytes_per_s": narrow.rate.bytes_per_s if narrow else None,
        "bottleneck_queue_bytes": narrow.queue_bytes if narrow else None,
        "methods": {
            name: {
                "median": _plain(figures.median(_figures(outcomes))),
                "rounds": [_outcome(outcome) for outcome in outcomes],
            }
            for name, outcomes in result.rounds.items()
        },
        "failures": result.failures,
    }


def _outcome(outcome: Outcome) -> dict[str, Any]:
    return {
        **_plain(outcome.figures),
        "timeline_bytes": outcome.timeline,
        "dropped_by_line": outcome.dropped_by_line,
        "max_pacing_bytes_per_s": outcome.max_pacing_bytes_per_s,
    }


def _plain(found: Figures) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, RoundTrips) else value
        for name, value in found._asdict().items()
    }
