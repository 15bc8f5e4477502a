"""Downloads by real programs below our limit, from servers in a namespace of their own.

ratio: TCP payload over ten seconds, once a handshake's worth has passed, divided by the limit.
lowest, highest: the same in one second after the first. retransmitted %: of what the servers sent.
All of it is what the servers' own sockets tell (TCP_INFO, by ss).

Programs and servers that are not installed are left out, and named.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from statistics import median
from typing import Callable, Iterator, NamedTuple, Optional

from benches.child import PATIENCE_S, TransferError
from benches.line import DelayLine, LineSpec
from benches.surroundings import ENVIRONMENT, python
from benches.table import show
from pybpfthrottle.demo.wire import Namespace, Wire
from pybpfthrottle.errors import Error
from pybpfthrottle.model import Rate

_COLUMNS = ("ratio", "lowest", "highest", "retransmitted %")
_BYTES = 8 << 30
# A program may say hello to its server, as ssh does, long before anything is transferred.
_HANDSHAKE_BYTES = 32 << 10
# Of servers: for the system, or beside the interpreter.
_SERVERS = os.pathsep.join([os.environ["PATH"], "/usr/sbin", os.path.dirname(sys.executable)])
_SSH_PORT, _IPERF_PORT = 2222, 5201
_NGINX = """daemon off; worker_processes 1; pid {directory}/pid; error_log {directory}/log;
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; types {{ text/html html; }}
    server {{
        listen {address}:80; listen {address}:443 ssl http2;
        ssl_certificate {directory}/cert; ssl_certificate_key {directory}/key;
        root {directory}/files;
    }}
}}
"""
_PAGE = "<script>fetch('large').then(got => got.body.pipeTo(new WritableStream()))</script>"
_SSHD = """ListenAddress {address}
Port {port}
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
PidFile none
StrictModes no
UsePAM no
"""


class _Place(NamedTuple):
    """Where the servers are, and their files."""

    address: str
    directory: Path

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @property
    def https(self) -> str:
        return f"https://{self.address}"


Command = Callable[[_Place], str]


def _ssh(place: _Place) -> str:
    options = "StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    return f"ssh -i {place.directory}/user -p {_SSH_PORT} -o {options}"


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
    "chromium": lambda at: (
        "chromium --headless=new --no-sandbox --disable-gpu --disable-background-networking"
        f" --user-data-dir={at.directory}/to/profile {at.url}/page.html"
    ),
    "rsync over ssh": lambda at: (
        f"rsync -e '{_ssh(at)}' --inplace {at.address}:{at.directory}/files/large {at.directory}/to"
    ),
    "iperf3 -R -P 8": lambda at: f"iperf3 -c {at.address} -R -P 8 -t 60",
}
_NEEDS = {"pip": sys.executable, "apt": "/usr/lib/apt/apt-helper"}


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
    table: dict[str, dict[str, float]] = {}
    for (name, command), rate, delay in product(commands.items(), limits, delays):
        program = _NEEDS.get(name, name.split()[0].rstrip(","))
        if not shutil.which(program):
            print(f"{name}: left out, {program} is missing", file=sys.stderr)
            continue
        row = f"{name}, {rate}, {delay:g} ms"
        try:
            rounds = [
                _transfer(command, rate, delay, arguments.seconds) for _ in range(arguments.rounds)
            ]
        except (TransferError, Error, OSError) as error:
            print(f"{row}: {error}", file=sys.stderr)
            continue
        table[row] = dict(zip(_COLUMNS, (round(median(each), 3) for each in zip(*rounds))))
        print(row, table[row], file=sys.stderr)
    return show(table, as_json=arguments.json) if table else 1


def _transfer(command: Command, rate: Rate, delay_ms: float, seconds: int) -> tuple[float, ...]:
    """Serve, limit, transfer; the columns' values."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        directory.chmod(0o755)
        wire = DelayLine(LineSpec(delay_s=delay_ms / 2000)) if delay_ms else Wire()
        stack.enter_context(wire)
        place = _Place(wire.server.address, directory)
        _serve(stack, wire.server, place)
        prefix = python("pybpfthrottle", "run", "-q", "--download-limit", str(rate.bytes_per_s))
        shell = f"export HOME={directory}; exec {command(place)}"
        inside = wire.client.inside(*prefix, "--", "sh", "-c", shell)
        _start(stack, inside)
        sent, again = _watch(wire.server, seconds)
    steps = [after - before for before, after in zip(sent, sent[1:])]
    windows = [step / rate.bytes_per_s for step in steps[1:]]
    ratio = (sent[-1] - sent[0]) / rate.bytes_per_s / len(steps)
    return ratio, min(windows), max(windows), 100 * again / sent[-1]


def _start(stack: ExitStack, command: list[str]) -> subprocess.Popen[bytes]:
    """Start what is ended with the transfer, with all that it has started."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )

    def end() -> None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        process.kill()
        process.wait()

    stack.callback(end)
    return process


def _serve(stack: ExitStack, server: Namespace, place: _Place) -> None:
    """Start the servers that are installed, with files and keys for this transfer alone."""
    for name in ("files", "to"):
        (place.directory / name).mkdir()
    for name in ("large", "large-1.0-py3-none-any.whl"):
        with (place.directory / "files" / name).open("wb") as file:
            file.truncate(_BYTES)
    (place.directory / "files" / "page.html").write_text(_PAGE)
    for command in _keys(place.directory):
        subprocess.run(command, check=True, capture_output=True)
    fields = {"address": place.address, "directory": place.directory, "port": _SSH_PORT}
    (place.directory / "nginx.conf").write_text(_NGINX.format(**fields))
    (place.directory / "sshd.conf").write_text(_SSHD.format(**fields))
    for program, *options in (
        ("nginx", "-e", f"{place.directory}/log", "-c", f"{place.directory}/nginx.conf"),
        ("sshd", "-D", "-f", f"{place.directory}/sshd.conf"),
        ("iperf3", "-s", "-B", place.address, "-p", str(_IPERF_PORT)),
    ):
        path = shutil.which(program, path=_SERVERS)
        if path:
            _start(stack, server.inside(path, *options))
    time.sleep(0.5)


def _keys(directory: Path) -> Iterator[list[str]]:
    yield [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench"),
        *("-keyout", f"{directory}/key", "-out", f"{directory}/cert"),
    ]
    for name in ("host", "user") if shutil.which("ssh-keygen") else ():
        yield ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{directory}/{name}"]


def _watch(server: Namespace, seconds: int) -> tuple[list[int], int]:
    """What the servers' sockets had acknowledged after each second, and sent again in the end."""
    seen: dict[str, tuple[int, int]] = {}
    deadline = time.monotonic() + PATIENCE_S
    while (first := _sent(server, seen)) < _HANDSHAKE_BYTES:
        if time.monotonic() > deadline:
            raise TransferError("no data was sent")
        time.sleep(0.005)
    begin, sent = time.monotonic(), [first]
    for second in range(1, seconds + 1):
        time.sleep(max(0.0, begin + second - time.monotonic()))
        sent.append(_sent(server, seen))
    return sent, sum(again for _, again in seen.values())


def _sent(server: Namespace, seen: dict[str, tuple[int, int]]) -> int:
    """Acknowledged payload of all connections that were ever seen, which ``seen`` has."""
    shown = subprocess.run(server.inside("ss", "-tinOH"), capture_output=True, text=True).stdout
    for line in shown.splitlines():
        fields = line.split()
        number = _number(line, "bytes_acked")
        if number is not None and len(fields) > 4:
            seen[" ".join(fields[3:5])] = (number, _number(line, "bytes_retrans") or 0)
    return sum(acked for acked, _ in seen.values())


def _number(line: str, name: str) -> Optional[int]:
    found = re.search(rf"\b{name}:(\d+)", line)
    return int(found[1]) if found else None
