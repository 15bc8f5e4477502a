"""pybpfthrottle demo: real transfers within this machine, without and with a limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Callable, NamedTuple, Optional

from pybpfthrottle import settings, throttle
from pybpfthrottle.cli.plot import sparkline
from pybpfthrottle.cli.say import echo
from pybpfthrottle.demo import peer
from pybpfthrottle.demo.wire import Wire
from pybpfthrottle.errors import DemoError, NamespaceError
from pybpfthrottle.model import Direction, Rate, Verdict, format_rate

# Long enough to see; an unlimited transfer moves gigabytes.
_UNLIMITED_S = 2
_PATIENCE_S = 10.0
# A transfer that stays far below its limit proves as little as one that exceeds it.
_LEAST_RATIO = 0.8


class _Place(NamedTuple):
    """Where a transfer runs: how to reach the client, and how the client reaches the server."""

    client: Callable[..., list[str]]
    url: str
    uploads: subprocess.Popen[str]
    options: list[str]


def demo(download: Rate, upload: Rate, seconds: int, *, loopback: bool) -> int:
    """Run the transfers; return 0 if the limits held, else 1."""
    for direction in Direction:
        throttle.choose(direction)
    settings.load()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    with ExitStack() as stack:
        place = _loopback(stack) if loopback else _namespaces(stack)
        held = True
        for direction, limit in ((Direction.DOWNLOAD, download), (Direction.UPLOAD, upload)):
            _transfer(place, direction, None, _UNLIMITED_S)
            held &= _transfer(place, direction, limit, seconds)
            if direction is Direction.DOWNLOAD and not place.options:
                # What only drops shows what shaping is for; how well it holds does not matter.
                _transfer(place._replace(options=["--shape", "police"]), direction, limit, seconds)
    echo("Both limits held." if held else "A limit did not hold.")
    return 0 if held else 1


def _namespaces(stack: ExitStack) -> _Place:
    try:
        wire = stack.enter_context(Wire())
    except NamespaceError as error:
        echo(f"No network namespaces ({error}): using the loopback device.")
        return _loopback(stack)
    echo("Two network namespaces, joined by a veth pair: a client and an HTTP server.")
    server = _serve(stack, wire.server.inside, wire.server.address)
    url = f"http://{wire.server.address}:{peer.PORT}/"
    return _Place(wire.client.inside, url, server, [])


def _loopback(stack: ExitStack) -> _Place:
    server = _serve(stack, lambda *command: list(command), "127.0.0.1")
    url = f"http://127.0.0.1:{peer.PORT}/"
    return _Place(lambda *command: list(command), url, server, ["--loopback"])


def _serve(
    stack: ExitStack, inside: Callable[..., list[str]], address: str
) -> subprocess.Popen[str]:
    server = subprocess.Popen(
        inside(*_python("pybpfthrottle.demo.peer", "serve", address)),
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        universal_newlines=True,
    )

    def end() -> None:
        server.kill()
        server.communicate()

    stack.callback(end)
    if not server.stdout or server.stdout.readline().strip() != peer.READY:
        raise DemoError(f"the server did not start (port {peer.PORT} of {address} in use?)")
    return server


def _transfer(place: _Place, direction: Direction, limit: Optional[Rate], seconds: int) -> bool:
    """Run one transfer, measured at the receiver; return whether its limit held."""
    verb = "get" if direction is Direction.DOWNLOAD else "put"
    command = _python("pybpfthrottle.demo.peer", verb, place.url, str(seconds))
    shown = f"{verb} {place.url}"
    if limit is not None:
        limiter = ["run", "--quiet", f"--{direction}-limit", str(limit.bytes_per_s)]
        command = [*_python("pybpfthrottle", *limiter, *place.options), "--", *command]
        options = " ".join([f"--{direction}-limit {_short(limit)}", *place.options])
        shown = f"pybpfthrottle run {options} -- {shown}"
    echo()
    echo(f"$ {shown}")
    try:
        client = subprocess.run(
            place.client(*command),
            env=_environment(),
            stdout=subprocess.PIPE,
            text=True,
            timeout=seconds + _PATIENCE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError(
            f"the {direction} did not end within {error.timeout:g} s; try again when less runs here"
        ) from error
    if client.returncode:
        raise DemoError(f"the {direction} failed with status {client.returncode}")
    if direction is Direction.DOWNLOAD:
        report = client.stdout
    else:
        report = place.uploads.stdout.readline() if place.uploads.stdout else ""
    return _show(json.loads(report)["timeline"], limit, seconds)


def _show(timeline: list[int], limit: Optional[Rate], seconds: int) -> bool:
    # Data left in the sender's socket is sent after the limit has ended.
    steps = timeline[: round(seconds / peer.STEP_S)]
    actual = sum(steps) / seconds
    top = f"{format_rate(max(steps) / peer.STEP_S)} at the top"
    echo(f"  {sparkline(steps)}  {top}, a step is {peer.STEP_S} s")
    if limit is None:
        echo(f"  {format_rate(actual)} without a limit")
        return True
    ratio = actual / limit.bytes_per_s
    verdict = Verdict.of(ratio)
    held = verdict is Verdict.THROTTLED and ratio >= _LEAST_RATIO
    mark = "⚠️ TOO SLOW" if ratio < _LEAST_RATIO else verdict.value
    echo(f"  actual={format_rate(actual)}, limit={limit}, ratio={ratio:.2f}x {mark}")
    return held


def _short(rate: Rate) -> str:
    return str(rate).removesuffix("B/s").replace(" ", "").replace(".0", "")


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _environment() -> dict[str, str]:
    """Return the environment in which this package can be imported even if not installed."""
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package, *([before] if before else [])])}
