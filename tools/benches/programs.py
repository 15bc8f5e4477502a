"""Downloads by real programs below our limit, from servers in a namespace of their own.

ratio: TCP payload over ten seconds, once a handshake's worth has passed, divided by the limit.
lowest, highest: the same in one second after the first. retransmitted %: of what the servers sent;
of HTTP/3 the datagrams that were lost, and the ratio is that of the streams' payload. All of it is
what the servers' own sockets tell (TCP_INFO, by ss), or the server of HTTP/3. For HTTP/3 curl and
ngtcp2's server are those of Debian trixie, unpacked in a cache; the ratio is what curl has written.

Programs and servers that are not installed are left out, and named.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median
from typing import Callable, Optional

from vm import VmError

from benches.child import PATIENCE_S, TransferError
from benches.line import DelayLine, LineSpec
from benches.quic import carry_datagrams, datagrams, fall_silent
from benches.servers import (
    HTTP3_PORT,
    SERVERS,
    SSH_PORT,
    Place,
    has_http3,
    serve,
    serve_http3,
    start,
)
from benches.surroundings import python
from benches.table import show
from benches.unpacked import Unpacked, unpacked
from pybpfthrottle.demo.wire import Namespace, Wire
from pybpfthrottle.errors import Error
from pybpfthrottle.model import Rate

_COLUMNS = ("ratio", "lowest", "highest", "retransmitted %")
# A program may say hello to its server, as ssh does, long before anything is transferred.
_HANDSHAKE_BYTES = 32 << 10
_CURL_HTTP3 = "curl, HTTP/3"
_PAGE = b"<script>fetch('large').then(got => got.body.pipeTo(new WritableStream()))</script>"
Command = Callable[[Place], str]


def _ssh(place: Place) -> str:
    options = "StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    return f"ssh -i {place.directory}/user -p {SSH_PORT} -o {options}"


# Each fetches one large file, or several, until it is ended.
PROGRAMS: dict[str, Command] = {
    "curl": lambda at: f"curl -so /dev/null {at.url}/large",
    "curl --http2": lambda at: f"curl -kso /dev/null --http2 {at.https}/large",
    "curl, four at once": lambda at: "curl -sZ" + f" -o /dev/null {at.url}/large" * 4,
    "wget": lambda at: f"wget -qO /dev/null {at.url}/large",
    "aria2c -x16": lambda at: (
        f"aria2c -q -x16 -s16 -k1M --file-allocation=none -d {at.directory}/to {at.url}/large"
    ),
    "apt": lambda at: f"/usr/lib/apt/apt-helper download-file {at.url}/large {at.directory}/to/apt",
    "pip": lambda at: (
        f"{sys.executable} -m pip -q download --no-deps --trusted-host {at.address}"
        f" -d {at.directory}/to {at.url}/large-1.0-py3-none-any.whl"
    ),
    "chromium": lambda at: f"{at.chromium} {at.url}/page.html",
    "chromium, HTTP/3": lambda at: f"{at.chromium_http3} {at.https}/page.html",
    _CURL_HTTP3: lambda at: shlex.join([*at.curl_http3(), "-o", str(at.written)]),
    "aioquic, HTTP/3": lambda at: shlex.join(python("benches.http3", "get", f"{at.https}/large")),
    "rsync over ssh": lambda at: (
        f"rsync -e '{_ssh(at)}' --inplace {at.address}:{at.directory}/files/large {at.directory}/to"
    ),
    "iperf3 -R -P 8": lambda at: f"iperf3 -c {at.address} -R -P 8 -t 60",
}
_CLIENTS = {
    "pip": sys.executable,
    "aioquic, HTTP/3": sys.executable,
    _CURL_HTTP3: sys.executable,
    "apt": "/usr/lib/apt/apt-helper",
}
_SERVERS = {"rsync over ssh": "sshd", "iperf3 -R -P 8": "iperf3"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument
    add("--limits", default="2M", metavar="RATES")
    add("--delays", default="0,20", metavar="MS", help="round-trip times; 0 is a veth pair")
    add("--programs", metavar="NAMES", help="of: " + "; ".join(PROGRAMS))
    add("--seconds", type=int, default=10, help="length of each transfer")
    add("--rounds", type=int, default=1, help="rounds; the median counts")
    add("--json", action="store_true", help="print JSON")


def main(arguments: argparse.Namespace) -> int:
    """Measure, and print a row for each program and path; the exit status."""
    names = arguments.programs.split(";") if arguments.programs else list(PROGRAMS)
    names = [name.strip() for name in names]
    try:
        limits = list(map(Rate.parse, arguments.limits.split(",")))
        delays = list(map(float, arguments.delays.split(",")))
        commands = {name: PROGRAMS[name] for name in names}
    except KeyError as error:
        print(f"bench programs: there is no program {error}", file=sys.stderr)
        return 2
    except (ValueError, Error) as error:
        print(f"bench programs: {error}", file=sys.stderr)
        return 2
    programs = None
    if _CURL_HTTP3 in commands:
        try:
            programs = unpacked()
        except VmError as error:
            print(f"{_CURL_HTTP3}: left out: {error}", file=sys.stderr)
            del commands[_CURL_HTTP3]
    table: dict[str, dict[str, float]] = {}
    for (name, command), rate, delay in product(commands.items(), limits, delays):
        row = f"{name}, {rate}, {delay:g} ms"
        missing = _missing(name)
        if missing:
            print(f"{row}: left out, {missing} is missing", file=sys.stderr)
            continue
        own = programs if name == _CURL_HTTP3 else None
        try:
            rounds = [
                _transfer(command, rate, delay, arguments.seconds, own)
                for _ in range(arguments.rounds)
            ]
        except (TransferError, Error, OSError) as error:
            print(f"{row}: {error}", file=sys.stderr)
            continue
        table[row] = dict(zip(_COLUMNS, (round(median(each), 3) for each in zip(*rounds))))
        print(row, table[row], file=sys.stderr)
    return show(table, as_json=arguments.json) if table else 1


def _missing(name: str) -> Optional[str]:
    """Return what a transfer by this program lacks here: its client or its server."""
    if "HTTP/3" in name and name != _CURL_HTTP3 and not has_http3():
        return "aioquic"
    client = _CLIENTS.get(name, name.split()[0].rstrip(","))
    server = _SERVERS.get(name, sys.executable if "HTTP/3" in name else "nginx")
    return next((one for one in (client, server) if not shutil.which(one, path=SERVERS)), None)


def _transfer(
    command: Command, rate: Rate, delay_ms: float, seconds: int, programs: Optional[Unpacked]
) -> tuple[float, ...]:
    """Serve, limit, transfer; the columns' values."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        directory.chmod(0o755)
        wire = DelayLine(LineSpec(delay_s=delay_ms / 2000)) if delay_ms else Wire()
        stack.enter_context(wire)
        place = Place(wire.server.address, directory, programs)
        serve(stack, wire.server, place, {"page.html": _PAGE})
        if programs:
            carry_datagrams(wire)
            serve_http3(stack, wire.server, place, HTTP3_PORT, ngtcp2="reno")
        before = datagrams(wire)
        prefix = python("pybpfthrottle", "run", "-q", "--download-limit", str(rate.bytes_per_s))
        shell = f"export HOME={directory} TMPDIR={directory}; exec {command(place)}"
        inside = wire.client.inside(*prefix, "--", "sh", "-c", shell)
        client = start(stack, inside)
        sent, again = _watch(client, wire.server, place, seconds)
        fall_silent(wire)
        left, came = (now - one for now, one in zip(datagrams(wire), before))
    steps = [after - before for before, after in zip(sent, sent[1:])]
    windows = [step / rate.bytes_per_s for step in steps[1:]]
    ratio = (sent[-1] - sent[0]) / rate.bytes_per_s / len(steps)
    lost = 1 - came / left if came else 0.0
    return ratio, min(windows), max(windows), 100 * (lost + again / sent[-1])


def _watch(
    client: subprocess.Popen[bytes], server: Namespace, place: Place, seconds: int
) -> tuple[list[int], int]:
    """What the servers' sockets had acknowledged after each second, and sent again in the end."""
    seen: dict[str, tuple[int, int]] = {}
    deadline = time.monotonic() + PATIENCE_S
    while (first := _sent(server, place, seen)) < _HANDSHAKE_BYTES:
        if client.poll() is not None:
            raise TransferError(f"it ended with {client.returncode} before there was any data")
        if time.monotonic() > deadline:
            raise TransferError("no data was sent")
        time.sleep(0.005)
    begin, sent = time.monotonic(), [first]
    for second in range(1, seconds + 1):
        time.sleep(max(0.0, begin + second - time.monotonic()))
        sent.append(_sent(server, place, seen))
    return sent, sum(again for _, again in seen.values())


def _sent(server: Namespace, place: Place, seen: dict[str, tuple[int, int]]) -> int:
    """Acknowledged payload of all connections that were ever seen, which ``seen`` has of TCP."""
    shown = subprocess.run(server.inside("ss", "-tinOH"), capture_output=True, text=True).stdout
    for line in shown.splitlines():
        fields = line.split()
        number = _number(line, "bytes_acked")
        if number is not None and len(fields) > 4:
            seen[" ".join(fields[3:5])] = (number, _number(line, "bytes_retrans") or 0)
    return sum(acked for acked, _ in seen.values()) + place.acknowledged()


def _number(line: str, name: str) -> Optional[int]:
    found = re.search(rf"\b{name}:(\d+)", line)
    return int(found[1]) if found else None
