"""pybpfthrottle plot: recorded rates as bars in the terminal, or as a picture.

matplotlib, which draws pictures, is imported only for one.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from typing import Any, Iterator, NamedTuple, Optional, Sequence, TextIO

import click

from pybpfthrottle.cli.say import echo
from pybpfthrottle.model import Direction, format_bytes, format_rate

_BARS = "▁▂▃▄▅▆▇█"
_MAX_BARS = 60
_PICTURES = (".svg", ".png", ".pdf")
_INCHES = (8.0, 3.0)
_MANY_NAMES = 20


class Series(NamedTuple):
    """Rates over time. ``limit`` is the last one that was in force, in bytes per second."""

    name: str
    seconds: list[float]
    rates: list[float]
    limit: Optional[int] = None

    def summary(self) -> str:
        """Return the mean, the highest rate and the limit, for people."""
        mean = sum(self.rates) / len(self.rates)
        text = (
            f"{self.name}: {format_rate(mean)} in the mean, {format_rate(max(self.rates))} at most"
        )
        return f"{text}, limit {format_rate(self.limit)}" if self.limit else text


def sparkline(steps: Sequence[float]) -> str:
    """Return steps as bars, the highest as high as a line; several are averaged for a bar."""
    top = max(steps) or 1
    width = -(-len(steps) // _MAX_BARS)
    means = [sum(steps[i : i + width]) / width for i in range(0, len(steps), width)]
    return "".join(_BARS[round(mean / top * (len(_BARS) - 1))] for mean in means)


def plot(file: TextIO, output: Optional[str]) -> None:
    """Draw what is recorded in a file. Raises click.ClickException for what cannot be read."""
    if output is not None:
        _check(output)
    found = _read(file)
    if output is None:
        for series in found:
            echo(series.summary())
            echo(f"  {sparkline(series.rates)}")
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


def _read(file: TextIO) -> list[Series]:
    """Return the series of a recording, in the order in which they begin."""
    found: dict[str, Series] = {}
    counted: dict[str, tuple[float, int]] = {}
    for number, line in enumerate(file, 1):
        try:
            points = list(_points(json.loads(line), counted))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise click.ClickException(
                f"{file.name}, line {number}: this is not a line of --json-file, --json or"
                f" monitor --json ({error})"
            ) from error
        for name, at_s, rate, limit in points:
            series = found.setdefault(name, Series(name, [], []))
            series.seconds.append(at_s)
            series.rates.append(rate)
            found[name] = series._replace(limit=limit or series.limit)
    if not found:
        raise click.ClickException(f"{file.name}: there are no rates in it")
    return list(found.values())


def _points(
    fields: dict[str, Any], counted: dict[str, tuple[float, int]]
) -> Iterator[tuple[str, float, float, Optional[int]]]:
    """Yield a name, a time, a rate and a limit for each rate of a line.

    ``counted`` has the time and the bytes of each direction in the line before: a sample's own rate
    is a mean over three seconds.
    """
    if "event" in fields:
        if fields["event"] != "sample":
            return
        at_s = float(fields["elapsed_s"])
        for direction in map(str, Direction):
            if direction in fields:
                own = fields[direction]
                passed = int(own["bytes_total"]) - int(own["bytes_dropped"])
                name = f"{fields['pid']} {direction}" if "pid" in fields else direction
                before_s, before = counted.get(name, (0.0, 0))
                counted[name] = (at_s, passed)
                yield name, at_s, (passed - before) / max(at_s - before_s, 1e-3), own["limit"]
        return
    who = " ".join(str(fields[key]) for key in ("pid", "name") if fields.get(key) is not None)
    for direction in map(str, Direction):
        yield (
            f"{who or fields.get('user') or fields.get('cgroup') or 'unknown'} {direction}",
            float(fields["time"]),
            float(fields[f"{direction}_bytes_per_s"]),
            fields["limits"].get(direction),
        )


def _picture(found: list[Series], output: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    begin_s = min(series.seconds[0] for series in found)
    # Recordings of a limit count from its start, those of a monitor from 1970.
    begin_s = begin_s if begin_s > 1e6 else 0.0
    figure = Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(found):
        color = f"C{number % 10}"
        axes.plot([at - begin_s for at in series.seconds], series.rates, color, label=series.name)
        if series.limit:
            axes.axhline(series.limit, color=color, linewidth=0.8, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{format_bytes(value)}/s"))
    if len(found) <= _MANY_NAMES:
        axes.legend(loc="upper right", fontsize="small")
    try:
        figure.savefig(output)
    except OSError as error:
        raise click.ClickException(f"cannot write {output}: {error.strerror}") from error
