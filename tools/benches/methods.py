"""The ways to limit a client that are compared: ours, and what a user would pick instead.

Each is given as commands that put it in force in the client's network namespace, and a prefix of
the client's command line. Nothing takes it away again: that namespace lives for one transfer.

The peers have to tell the limited program from others by its ports; all but TBF can.
"""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Callable, NamedTuple, Optional

from benches.surroundings import ENVIRONMENT, python
from pybpfthrottle.demo.wire import DEVICE, Namespace, Wire
from pybpfthrottle.model import Direction, Rate

# The limited flow, and with the last bit set the small one beside it.
LIMITED_PORT = 5200
OTHER_PORT = 5202
_LIMITED_MASK = 0xFFFE
_TRIED_RATE = Rate(1 << 20)

Commands = Callable[[Direction, Rate], list[str]]
Prefix = Callable[[Direction, Rate], list[str]]


class MethodError(Exception):
    """A method cannot be put in force; the text is the reason."""


class Method(NamedTuple):
    """One way to limit."""

    name: str
    about: str
    directions: tuple[Direction, ...] = (Direction.DOWNLOAD, Direction.UPLOAD)
    commands: Commands = lambda direction, rate: []
    prefix: Prefix = lambda direction, rate: []

    def apply(self, client: Namespace, direction: Direction, rate: Rate) -> None:
        """Put it in force for as long as the namespace lives. Raises MethodError."""
        for command in self.commands(direction, rate):
            _run(client.inside(*command.split()), command)

    def unavailable(self, direction: Direction) -> Optional[str]:
        """Why it cannot limit this direction here, found by trying it; None if it can."""
        if direction not in self.directions:
            return f"does not limit {direction}s"
        try:
            with Wire() as wire:
                self.apply(wire.client, direction, _TRIED_RATE)
                command = [*self.prefix(direction, _TRIED_RATE), "true"]
                _run(wire.client.inside(*command), self.name)
        except MethodError as error:
            return str(error)
        return None


def _run(command: list[str], name: str) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            text=True,
        )
    except OSError as error:
        raise MethodError(f"{name}: {error.strerror}") from error
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        raise MethodError(f"{name}: {lines[-1] if lines else f'status {done.returncode}'}")


def _ours(shape: Optional[str]) -> Prefix:
    """Our command, with --shape where it knows that; one that does not polices."""

    def prefix(direction: Direction, rate: Rate) -> list[str]:
        options = [f"--{direction}-limit", str(rate.bytes_per_s)]
        if shape and (shape != "police" or _knows_shape()):
            options += ["--shape", shape]
        return python("pybpfthrottle", "run", "--quiet", *options, "--")

    return prefix


@cache
def _knows_shape() -> bool:
    shown = subprocess.run(
        python("pybpfthrottle", "run", "--help"), stdout=subprocess.PIPE, env=ENVIRONMENT
    )
    return b"--shape" in shown.stdout


def _by(backend: str) -> Prefix:
    """Our command, with a backend for the direction."""
    return lambda direction, rate: python(
        *("pybpfthrottle", "run", "--quiet"),
        *(f"--{direction}-limit", str(rate.bytes_per_s), f"--{direction}-backend", backend, "--"),
    )


def _htb_on(device: str, ports: str, rate: Rate, leaf: str) -> list[str]:
    # What no class is given passes at once (default 0). tc's own burst is too small for high
    # rates: 0.88 of 400 MB/s. One class has no use for the quantum, but the kernel logs a
    # complaint about the one that it would choose.
    burst = max(16 << 10, rate.bytes_per_s // 500)
    selector = f"match ip {ports} {LIMITED_PORT} {_LIMITED_MASK:#x}"
    shape = f"rate {rate.bytes_per_s}bps ceil {rate.bytes_per_s}bps burst {burst} cburst {burst}"
    return [
        f"tc qdisc add dev {device} root handle 1: htb default 0",
        f"tc class add dev {device} parent 1: classid 1:1 htb {shape} quantum 65536",
        f"tc qdisc add dev {device} parent 1:1 {leaf}",
        f"tc filter add dev {device} parent 1: protocol ip u32 {selector} flowid 1:1",
    ]


def _htb(leaf: str) -> Commands:
    return lambda direction, rate: _htb_on(DEVICE, "dport", rate, leaf)


def _ifb(leaf: str) -> Commands:
    redirect = "action mirred egress redirect dev ifb0"
    return lambda direction, rate: [
        "ip link add ifb0 type ifb",
        "ip link set ifb0 up",
        f"tc qdisc add dev {DEVICE} handle ffff: ingress",
        f"tc filter add dev {DEVICE} parent ffff: protocol ip u32 match u32 0 0 {redirect}",
        *_htb_on("ifb0", "sport", rate, leaf),
    ]


def _tbf(direction: Direction, rate: Rate) -> list[str]:
    burst = max(16 << 10, rate.bytes_per_s // 100)
    shape = f"rate {rate.bytes_per_s}bps burst {burst} latency 50ms"
    return [f"tc qdisc add dev {DEVICE} root tbf {shape}"]


def _nft(direction: Direction, rate: Rate) -> list[str]:
    hook, port = ("input", "sport") if direction is Direction.DOWNLOAD else ("output", "dport")
    ports = f"meta l4proto {{ tcp, udp }} th {port} {LIMITED_PORT}-{LIMITED_PORT | 1}"
    limit = f"limit rate over {rate.bytes_per_s} bytes/second"
    return [
        "nft add table inet bench",
        f"nft add chain inet bench limited {{ type filter hook {hook} priority 0 ; }}",
        f"nft add rule inet bench limited {ports} {limit} drop",
    ]


# The queue that HTB makes itself is as long as that of its device: these are the usual ones, as
# the tun devices of our line have much longer ones.
_PLAIN, _PLAIN_IFB, _CODEL = "pfifo limit 1000", "pfifo limit 32", "fq_codel"
_UP, _DOWN = (Direction.UPLOAD,), (Direction.DOWNLOAD,)

METHODS = (
    Method("unlimited", "no limit: what the path, and this bench, can do"),
    Method("police", "pybpfthrottle run, without shaping", prefix=_ours("police")),
    Method("window", "pybpfthrottle run --shape window", _DOWN, prefix=_ours("window")),
    Method("shape", "pybpfthrottle run --shape auto", prefix=_ours("auto")),
    Method("nftables", "pybpfthrottle run, by the backend nftables", prefix=_by("nftables")),
    Method("tc_htb", "pybpfthrottle run, by the backend tc_htb", _UP, prefix=_by("tc_htb")),
    Method("ifb_tc", "pybpfthrottle run, by the backend ifb_tc", _DOWN, prefix=_by("ifb_tc")),
    Method("htb", "tc, HTB on the device", _UP, _htb(_PLAIN)),
    Method("htb-codel", "tc, HTB on the device with fq_codel below", _UP, _htb(_CODEL)),
    Method("tbf", "tc, TBF on the device: for all programs", _UP, _tbf),
    Method("ifb", "tc, HTB on an IFB device", _DOWN, _ifb(_PLAIN_IFB)),
    Method("ifb-codel", "tc, HTB on an IFB device with fq_codel below", _DOWN, _ifb(_CODEL)),
    Method("nft", "nftables, limit rate over", commands=_nft),
)
