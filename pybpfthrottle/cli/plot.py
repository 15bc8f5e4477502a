"""pybpfthrottle plot: recorded rates as bars in the terminal, or as a picture.

matplotlib, which draws pictures, is imported only for one.
"""

from __future__ import annotations

import csv
import json
import os
from datetime import datetime
from importlib.util import find_spec
from typing import Any, Iterator, Mapping, NamedTuple, Optional, Sequence, TextIO

import click

from pybpfthrottle.cli.say import echo
from pybpfthrottle.model import Direction, format_bytes, format_rate

_BARS = "▁▂▃▄▅▆▇█"
_MAX_BARS = 60
_PICTURES = (".svg", ".png", ".pdf")
_INCHES = (8.0, 3.0)
_MORE_INCHES = 1.2
_MANY_NAMES = 20
_ROUND = (0.25, 0.5, *(digit * power for power in (1, 10, 100) for digit in (1, 2, 5)))


class Point(NamedTuple):
    """One moment of one direction: bytes per second, and the round trip in ms, as far as known."""

    at_s: float
    rate: float
    limit: Optional[float]
    dropped: float = 0.0
    round_trip_ms: Optional[float] = None


class Series(NamedTuple):
    """One direction of one target, over time. ``limit`` is the last one that was in force."""

    name: str
    seconds: list[float]
    rates: list[float]
    limit: Optional[float]
    points: list[Point]

    @classmethod
    def empty(cls, name: str) -> Series:
        """Return one without points."""
        return cls(name, [], [], None, [])

    @property
    def target(self) -> str:
        """The name without the direction; empty if there is one target."""
        return self.name.rpartition(" ")[0]

    @property
    def direction(self) -> str:
        """As Direction spells it."""
        return self.name.rpartition(" ")[2]

    def plus(self, point: Point) -> Series:
        """Return it with a point more."""
        self.seconds.append(point.at_s)
        self.rates.append(point.rate)
        self.points.append(point)
        return self._replace(limit=point.limit or self.limit)

    def summary(self) -> str:
        """Return the mean, the highest rate and the limit, for people."""
        mean = sum(self.rates) / len(self.rates)
        text = (
            f"{self.name}: {format_rate(mean)} in the mean, {format_rate(max(self.rates))} at most"
        )
        return f"{text}, limit {format_rate(self.limit)}" if self.limit else text

    def lines(self) -> Iterator[str]:
        """Yield the rate, the limit and what was dropped as bars, on the same scale."""
        top = max(*self.rates, self.limit or 0)
        yield f"  rate        {sparkline(self.rates, top)}"
        if self.limit:
            yield f"  limit       {sparkline([point.limit for point in self.points], top)}"
        dropped = [point.dropped for point in self.points]
        if any(dropped):
            yield f"  dropped     {sparkline(dropped, top)}  {format_rate(max(dropped))} at most"

    def round_trips(self) -> list[Optional[float]]:
        """Return the round trip at each point, in ms; empty if none is known."""
        found = [point.round_trip_ms for point in self.points]
        return found if any(one is not None for one in found) else []


def sparkline(steps: Sequence[Optional[float]], top: float = 0.0) -> str:
    """Return steps as bars, ``top`` or the highest as high as a line; None is a blank.

    Several are averaged for a bar, if there are many.
    """
    top = max(top, *(step or 0.0 for step in steps), 0.0) or 1.0
    width = -(-len(steps) // _MAX_BARS)
    return "".join(_bar(steps[at : at + width], top) for at in range(0, len(steps), width))


def _bar(steps: Sequence[Optional[float]], top: float) -> str:
    known = [step for step in steps if step is not None]
    if not known:
        return " "
    return _BARS[round(sum(known) / len(known) / top * (len(_BARS) - 1))]


def plot(file: TextIO, output: Optional[str], direction: Optional[str] = None) -> None:
    """Draw what is recorded in a file. Raises click.ClickException for what cannot be read."""
    if output is not None:
        _check(output)
    found = read(file)
    if direction is not None:
        found = [series for series in found if series.direction == direction]
        if not found:
            raise click.ClickException(f"{file.name}: there are no {direction} rates in it")
    if output is None:
        _show(found)
    else:
        _picture(found, output)


def _check(output: str) -> None:
    """Refuse a picture that cannot be drawn, before anything is read."""
    if os.path.splitext(output)[1] not in _PICTURES:
        raise click.UsageError(f"-o {output}: give a name that ends in {', '.join(_PICTURES)}")
    if find_spec("matplotlib") is None:
        raise click.ClickException(
            "a picture needs matplotlib: install it, or pybpfthrottle[plot]. Without -o the rates"
            " are shown here"
        )


def _show(found: Sequence[Series]) -> None:
    for series in found:
        echo(series.summary())
        for line in series.lines():
            echo(line)
    for series in _one_of_each_target(found):
        trips = series.round_trips()
        known = [trip for trip in trips if trip is not None]
        if known:
            target = f"{series.target}: " if series.target else ""
            echo(f"{target}round trip from {min(known):.1f} to {max(known):.1f} ms")
            echo(f"  round trip  {sparkline(trips)}")


def _one_of_each_target(found: Sequence[Series]) -> list[Series]:
    """Return the first series of each target, all of which have the same round trips."""
    return list({series.target: series for series in reversed(found)}.values())[::-1]


def read(file: TextIO) -> list[Series]:
    """Return the series of a recording, in the order in which they begin.

    Raises click.ClickException that tells the line that cannot be read. The last one may be
    incomplete.
    """
    found: dict[str, Series] = {}
    counted: dict[str, tuple[float, int, int]] = {}
    heads: Optional[list[str]] = None
    for number, line in enumerate(file, 1):
        try:
            if number == 1 and "," in line and not line.startswith("{"):
                heads = _heads(line)
                continue
            fields = json.loads(line) if heads is None else _row(heads, line)
            points = list(_points(fields, counted))
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            if not line.endswith("\n"):  # the disk was full, or it is being written
                break
            raise click.ClickException(
                f"{file.name}, line {number}: this is not a line of --record, --json-file, --json"
                f" or monitor --json ({error})"
            ) from error
        for name, point in points:
            found[name] = (found.get(name) or Series.empty(name)).plus(point)
    if not found:
        raise click.ClickException(f"{file.name}: there are no rates in it")
    return list(found.values())


def _heads(line: str) -> list[str]:
    heads = next(csv.reader([line]))
    if not {"time", "pid"} <= set(heads):
        raise ValueError(f"its columns are {line.strip()}")
    return heads


def _row(heads: Sequence[str], line: str) -> dict[str, Any]:
    """Return a row of CSV as the JSON object that it would be."""
    cells = next(csv.reader([line]))
    if len(cells) != len(heads):
        raise ValueError(f"{len(cells)} cells instead of {len(heads)}")
    row: dict[str, Any] = {head: cell or None for head, cell in zip(heads, cells)}
    if "direction" not in row:
        at_s = datetime.fromisoformat(row["time"].replace("Z", "+00:00")).timestamp()
        limits = {str(one): _number(row[f"{one}_limit"]) for one in Direction}
        return {**row, "time": at_s, "limits": limits}
    passed, dropped = int(row["bytes_passed"]), int(row["bytes_dropped"])
    own = {
        "limit": _number(row["limit"]),
        "bytes_total": passed + dropped,
        "bytes_dropped": dropped,
    }
    return {**row, "event": "sample", row["direction"]: own}


def _number(cell: Optional[str]) -> Optional[float]:
    return None if cell is None else float(cell)


def _points(
    fields: dict[str, Any], counted: dict[str, tuple[float, int, int]]
) -> Iterator[tuple[str, Point]]:
    """Yield a name and a point for each rate of a line.

    ``counted`` has the time and the bytes of each direction in the line before: a sample's own rate
    is a mean over three seconds.
    """
    if "event" in fields:
        if fields["event"] == "sample":
            yield from _of_sample(fields, counted)
        return
    who = _who(fields)
    for direction in map(str, Direction):
        yield (
            f"{who} {direction}",
            Point(
                float(fields["time"]),
                float(fields[f"{direction}_bytes_per_s"]),
                fields["limits"].get(direction),
            ),
        )


def _who(fields: Mapping[str, Any]) -> str:
    """Return whose traffic a line of monitor tells, by what it adds up (``--by``)."""
    by = fields.get("by") or "process"
    names = ("pid", "name") if by == "process" else (by,)
    return " ".join(str(fields[name]) for name in names if fields.get(name)) or "unknown"


def _of_sample(
    fields: dict[str, Any], counted: dict[str, tuple[float, int, int]]
) -> Iterator[tuple[str, Point]]:
    at_s = float(fields["elapsed_s"])
    trip = fields.get("round_trip_ms")
    for direction in map(str, Direction):
        if direction not in fields:
            continue
        own = fields[direction]
        dropped = int(own["bytes_dropped"])
        passed = int(own["bytes_total"]) - dropped
        name = f"{fields['pid']} {direction}" if fields.get("pid") is not None else direction
        before = counted.get(name, (0.0, 0, 0))
        counted[name] = (at_s, passed, dropped)
        seconds = max(at_s - before[0], 1e-3)
        yield (
            name,
            Point(
                at_s,
                (passed - before[1]) / seconds,
                own["limit"],
                (dropped - before[2]) / seconds,
                None if trip is None else float(trip),
            ),
        )


def _picture(found: Sequence[Series], output: str) -> None:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    begin_s = min(series.seconds[0] for series in found)
    # Recordings of a limit count from its start, those of a monitor from 1970.
    begin_s = begin_s if begin_s > 1e6 else 0.0
    trips = [series for series in _one_of_each_target(found) if series.round_trips()]
    figure = Figure(
        figsize=(_INCHES[0], _INCHES[1] + _MORE_INCHES * bool(trips)), layout="constrained"
    )
    ratios = [_INCHES[1], _MORE_INCHES] if trips else [1]
    axes, *below = figure.subplots(
        len(ratios), sharex=True, squeeze=False, gridspec_kw={"height_ratios": ratios}
    )[:, 0]
    for number, series in enumerate(found):
        _draw(axes, series, [at - begin_s for at in series.seconds], f"C{number % 10}")
    axes.set_ylim(bottom=0)
    axes.set_yticks(_ticks(axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{format_bytes(value)}/s"))
    for lower in below:
        for series in trips:
            lower.plot([at - begin_s for at in series.seconds], _gaps(series.round_trips()))
        lower.set_ylim(bottom=0)
        lower.set_ylabel("round trip, ms")
    (below or [axes])[-1].set_xlabel("seconds")
    if len(found) <= _MANY_NAMES:
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncol": 3}
        axes.legend(**above, fontsize="small", frameon=False)
    try:
        # Text as text, and no date: the file is small, and the same for the same recording.
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pybpfthrottle"}):
            dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
            figure.savefig(output, metadata=dated.get(os.path.splitext(output)[1]))
    except OSError as error:
        raise click.ClickException(f"cannot write {output}: {error.strerror}") from error


def _draw(axes: Any, series: Series, seconds: Sequence[float], color: str) -> None:
    """Draw the rate as a line, its limit as dashes, and what was dropped as an area."""
    axes.plot(seconds, series.rates, color, label=series.name, gid=f"rate {series.name}")
    if series.limit:
        limits = _gaps([point.limit for point in series.points])
        how = {"color": color, "linewidth": 0.8, "linestyle": "--", "drawstyle": "steps-pre"}
        axes.plot(seconds, limits, **how, label=f"{series.name} limit")
    dropped = [point.dropped for point in series.points]
    if any(dropped):
        how = {"color": color, "alpha": 0.25, "linewidth": 0}
        axes.fill_between(seconds, dropped, **how, label=f"{series.name} dropped")


def _ticks(top: float) -> list[float]:
    """Return where to write a rate on an axis: some three to five times, at round numbers."""
    unit = 1
    while unit * 1024 <= top:
        unit *= 1024
    step = next(size for size in _ROUND if unit * size * 5 >= top) * unit
    return [step * number for number in range(int(top / step) + 1)]


def _gaps(values: Sequence[Optional[float]]) -> list[float]:
    """Return values with NaN, which is not drawn, in place of None."""
    return [float("nan") if value is None else value for value in values]
