"""Real transfers under each kind of limit: how accurate, how smooth, how costly.

Each cell of the matrix is one limit, direction, number of flows, congestion control and path.
All methods take turns in it, round by round, in their own network namespaces. Ctrl-C ends the
bench and writes what was measured so far.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence, TypeVar

from benches import picture, report
from benches.child import TransferError
from benches.methods import METHODS, Method, MethodError
from benches.report import CellResult, Result
from benches.transfer import Bottleneck, Cell, Outcome, transfer
from pybpfthrottle.errors import LimitError, NamespaceError
from pybpfthrottle.model import Direction, Rate

T = TypeVar("T")

# A run takes this much longer than its transfer.
_OVERHEAD_S = 1.0


class Preset(NamedTuple):
    """What is measured unless an option says otherwise."""

    limits: str
    flows: str
    cc: str
    delays: str
    seconds: float
    rounds: int


USUAL = Preset("1M,10M", "1,8", "cubic", "0,20", 8.0, 3)
QUICK = Preset("1M", "1,8", "cubic", "20", 4.0, 1)
FULL = Preset("50K,500K,1M,10M,100M,400M", "1,8,64", "cubic,bbr,reno", "0,20,100", 8.0, 3)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    names = ",".join(method.name for method in METHODS)
    add = parser.add_argument
    add("--limits", metavar="RATES", help=f"limits, as for run's options ({USUAL.limits})")
    add("--flows", metavar="NUMBERS", help=f"numbers of parallel TCP flows ({USUAL.flows})")
    add("--cc", metavar="NAMES", help=f"congestion controls of the sender ({USUAL.cc})")
    add("--delays", metavar="MS", help=f"round-trip times; 0 is a veth pair ({USUAL.delays})")
    add(
        "--bottleneck", metavar="RATE:BYTES", help="bottleneck of each path and its queue: 12M:256K"
    )
    add("--middle", metavar="MS", help="round-trip time in the middle third of each transfer")
    add("--loss", default="0", metavar="PERCENT", help="packets that a path loses, each way (0)")
    add(
        "--link",
        default="",
        metavar="OPTIONS",
        help='set both devices, as ip link set does: "mtu 9000", "gso_max_segs 1"',
    )
    add(
        "--udp",
        type=int,
        default=0,
        metavar="PERCENT",
        help="add a UDP flow at this share of the limit",
    )
    add("--directions", default="download,upload", metavar="NAMES")
    add("--methods", default=names, metavar="NAMES", help=names)
    add("--seconds", type=float, help=f"length of each transfer ({USUAL.seconds:g})")
    add("--rounds", type=int, help=f"rounds; the median counts ({USUAL.rounds})")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        dest="preset",
        action="store_const",
        const=QUICK,
        default=USUAL,
        help="take a minute or two instead of the usual hour",
    )
    size.add_argument(
        "--full",
        dest="preset",
        action="store_const",
        const=FULL,
        help="measure the whole matrix: half a day",
    )
    add(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="write the tables to FILE, not to standard output",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures of each round")
    add("--picture", type=Path, metavar="FILE", help="draw rates over time, as .svg or .png")


def main(arguments: argparse.Namespace) -> int:
    """Measure, and write what was asked for; the exit status."""
    try:
        _fill_in(arguments)
        if arguments.picture:
            picture.check(arguments.picture)
        result = measure(arguments)
    except (argparse.ArgumentTypeError, picture.PictureError, NamespaceError) as error:
        print(f"bench shape: {error}", file=sys.stderr)
        return 2
    table = report.markdown(result)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    else:
        print(table)
    if arguments.json:
        arguments.json.write_text(report.to_json(result))
    if arguments.picture:
        picture.draw(result, arguments.picture)
    failed = any(cell.failures for cell in result.cells)
    nothing = not any(cell.rounds for cell in result.cells)
    return 1 if failed or nothing or result.interrupted else 0


def _fill_in(arguments: argparse.Namespace) -> None:
    """Take what was not given from the preset, and turn lists into values."""
    for name, value in arguments.preset._asdict().items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.limits = _values("--limits", arguments.limits, Rate.parse)
    arguments.flows = _values("--flows", arguments.flows, _positive)
    arguments.cc = _values("--cc", arguments.cc, str)
    arguments.delays = _values("--delays", arguments.delays, _milliseconds)
    arguments.directions = _values("--directions", arguments.directions, _direction)
    arguments.methods = _values("--methods", arguments.methods, _method)
    if arguments.seconds < 1 or arguments.rounds < 1:
        raise argparse.ArgumentTypeError("--seconds and --rounds must be at least 1")
    if not 0 <= arguments.udp <= 1000:
        raise argparse.ArgumentTypeError(f"--udp {arguments.udp}: give 0 to 1000 percent")
    (arguments.loss,) = _values("--loss", arguments.loss, _percent)
    if arguments.middle is not None:
        (arguments.middle,) = _values("--middle", arguments.middle, _milliseconds)
    if arguments.bottleneck is not None:
        (arguments.bottleneck,) = _values("--bottleneck", arguments.bottleneck, _bottleneck)


def _values(option: str, text: str, parse: Callable[[str], T]) -> list[T]:
    try:
        return [parse(word.strip()) for word in text.split(",")]
    except (ValueError, LimitError) as error:
        raise argparse.ArgumentTypeError(f"{option} {text}: {error}") from error


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError("give at least 1")
    return int(text)


def _milliseconds(text: str) -> float:
    if not 0 <= float(text) <= 10_000:
        raise ValueError("give 0 to 10000 ms")
    return float(text)


def _percent(text: str) -> float:
    if not 0 <= float(text) <= 100:
        raise ValueError("give 0 to 100")
    return float(text)


def _direction(text: str) -> Direction:
    known = {str(direction): direction for direction in Direction}
    if text not in known:
        raise ValueError(f"choose from {', '.join(known)}")
    return known[text]


def _method(text: str) -> Method:
    known = {method.name: method for method in METHODS}
    if text not in known:
        raise ValueError(f"choose from {', '.join(known)}")
    return known[text]


def _bottleneck(text: str) -> Bottleneck:
    rate, colon, queue = text.partition(":")
    if not colon:
        raise ValueError("give a rate and a queue in bytes, such as 12M:256K")
    return Bottleneck(Rate.parse(rate), Rate.parse(queue).bytes_per_s)


def measure(arguments: argparse.Namespace) -> Result:
    """Run the whole matrix, or what of it is possible here; what was left out has a reason."""
    left_out: dict[str, str] = {}
    methods = _available(arguments.methods, arguments.directions, left_out)
    controls = _known_controls(arguments.cc, left_out)
    cells = [
        Cell(
            direction,
            rate,
            flows,
            control,
            delay,
            arguments.bottleneck,
            arguments.udp,
            arguments.loss,
            arguments.middle,
            arguments.link,
        )
        for control, delay, rate, flows, direction in product(
            controls, arguments.delays, arguments.limits, arguments.flows, arguments.directions
        )
    ]
    for what, why in left_out.items():
        print(f"left out: {what}: {why}", file=sys.stderr)
    result = Result(arguments.seconds, arguments.rounds, left_out)
    turns = [
        (CellResult(cell), [m for m in methods if cell.direction in methods[m]]) for cell in cells
    ]
    progress = _Progress(
        arguments.rounds * sum(len(taking_part) for _, taking_part in turns),
        arguments.seconds + _OVERHEAD_S,
    )
    try:
        for cell_result, taking_part in turns:
            result.cells.append(cell_result)
            for method in taking_part * arguments.rounds:
                _one(cell_result, method, arguments.seconds, progress)
    except KeyboardInterrupt:
        print("\nbench shape: interrupted; this is what was measured so far", file=sys.stderr)
        result.interrupted = True
    return result


def _one(cell_result: CellResult, method: Method, seconds: float, progress: _Progress) -> None:
    cell = cell_result.cell
    progress.begin(f"{cell}: {method.name}")
    try:
        outcome = transfer(cell, method, seconds)
    except (TransferError, MethodError, NamespaceError) as error:
        cell_result.failures[method.name] = str(error)
        return progress.end(f"failed: {error}")
    cell_result.rounds.setdefault(method.name, []).append(outcome)
    return progress.end(_in_short(outcome))


def _in_short(outcome: Outcome) -> str:
    return f"ratio {outcome.figures.ratio:.3f}"


def _available(
    methods: Sequence[Method], directions: Sequence[Direction], left_out: dict[str, str]
) -> dict[Method, list[Direction]]:
    """For each method the directions that it can limit here."""
    found: dict[Method, list[Direction]] = {}
    for method, direction in product(methods, directions):
        reason = method.unavailable(direction)
        if reason is None:
            found.setdefault(method, []).append(direction)
        elif direction in method.directions:
            left_out[f"{method.name}, {direction}"] = reason
    return found


def _known_controls(names: Sequence[str], left_out: dict[str, str]) -> Iterator[str]:
    for name in names:
        try:
            with socket.socket() as probe:
                probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as error:
            left_out[name] = f"congestion control: {error.strerror}"
        else:
            yield name


class _Progress:
    """What runs now, and about how long all of it will take, on standard error."""

    def __init__(self, runs: int, estimate_s: float) -> None:
        self._runs = runs
        self._done = 0
        self._estimate_s = estimate_s
        self._begin_s = time.monotonic()

    def begin(self, what: str) -> None:
        """Tell what runs now."""
        each_s = self._estimate_s
        if self._done:
            each_s = (time.monotonic() - self._begin_s) / self._done
        left_s = round((self._runs - self._done) * each_s)
        self._done += 1
        left = f"{left_s // 60} min {left_s % 60:02} s left"
        self._say(f"[{self._done}/{self._runs}, {left}] {what}: ", end="")

    def end(self, outcome: str) -> None:
        """Tell what came of it."""
        self._say(outcome)

    def _say(self, text: str, **options: Any) -> None:
        print(text, file=sys.stderr, flush=True, **options)
