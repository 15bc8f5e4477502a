"""Time per packet of each program in ns, by BPF_PROG_TEST_RUN."""

from __future__ import annotations

import argparse
import struct
import sys
from functools import partial
from typing import Any, Callable

from benches.table import configure, show
from pybpfthrottle.backends.ebpf import features
from pybpfthrottle.backends.ebpf import programs as shipped
from pybpfthrottle.backends.ebpf.bucket import config_for
from pybpfthrottle.backends.ebpf.records import RECORD, ThrottleConfig, element
from pybpfthrottle.backends.ebpf.registry import RecordMap
from pybpfthrottle.backends.ebpf.shared import Bank
from pybpfthrottle.bpf import loader, programs
from pybpfthrottle.bpf.abi import ProgType
from pybpfthrottle.bpf.codecs import U32, StructureCodec
from pybpfthrottle.bpf.obj import asm
from pybpfthrottle.bpf.programs import Program
from pybpfthrottle.model import MAX_RATE, MIN_RATE, Direction, Rate

__all__ = ["configure", "main"]

_KTIME_GET_NS = 5
_REPEAT = 1_000_000
_SLOT = 1
_IPV4, _IPV6 = 0x0800, 0x86DD
_TCP, _UDP, _ROUTING, _DESTINATION = 6, 17, 43, 60


def measure(rounds: int) -> dict[str, Any]:
    """The best of some rounds, interleaved: what is slower was disturbed."""
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 0, 0, 5 << 4, 0x10, 0, 0, 0) + bytes(1000)
    extension = bytes([_DESTINATION, 0]) + bytes(6)
    last = bytes([_TCP, 0]) + bytes(6)
    packets = {
        "IPv4 TCP": _ipv4(_TCP, tcp),
        "IPv4 UDP": _ipv4(_UDP, bytes(1020)),
        "IPv6 TCP": _ipv6(_TCP, tcp),
        "IPv6 TCP, 3 extension headers": _ipv6(_ROUTING, extension + extension + last + tcp),
    }
    empty = programs.load(asm.return_imm(1), type=ProgType.CGROUP_SKB, license="MIT")
    clock = programs.load(
        asm.call(_KTIME_GET_NS) + asm.return_imm(1), type=ProgType.CGROUP_SKB, license="MIT"
    )
    plain = packets["IPv4 TCP"]
    cases: dict[str, Callable[[], int]] = {
        "an empty program": partial(_run, empty, plain),
        "the clock alone": partial(_run, clock, plain),
    }
    names = ["throttle"]
    if features.DIRECT_PACKET_ACCESS.available():
        if features.TEST_RUN_PACKET.available():
            names += ["throttle-direct", shipped.ENTRIES]
        else:
            print(
                "throttle-direct is left out: this kernel's test runs have no packet to read, so"
                " it would return at once",
                file=sys.stderr,
            )
    for name in names:
        passing, dropping = _policer(name, MAX_RATE), _policer(name, MIN_RATE)
        for packet_name, packet in packets.items():
            cases[f"{name}: {packet_name}"] = partial(_run, passing, packet)
        cases[f"{name}: IPv4 TCP, dropped"] = partial(_run, dropping, plain)
    if "throttle-direct" in names:
        # The socket of a test run has no mark, as have those of all other processes.
        unmarked = _policer("throttle-marked", MIN_RATE, "pybpft_mingress")
        cases["throttle-marked: no mark"] = partial(_run, unmarked, plain)
        # Nor does it have an owner: the packets are counted as nobody's.
        for name in ("traffic", "traffic-remotes"):
            counting = loader.load(shipped.read(name), ["pybpft_received"])
            counter = counting.programs["pybpft_received"]
            for packet_name in ("IPv4 TCP", "IPv4 UDP", "IPv6 TCP"):
                cases[f"{name}: {packet_name}"] = partial(_run, counter, packets[packet_name])
    found: dict[str, int] = {}
    for _ in range(rounds):
        for name, measure in cases.items():
            found[name] = min(found.get(name, 1 << 30), measure())
    base = found["an empty program"]
    return {name: {"ns": ns, "above_empty_ns": ns - base} for name, ns in found.items()}


def _policer(name: str, rate: Rate, program: str = "pybpft_ingress") -> Program:
    """The download program of an object, with the loopback device limited: test packets use it."""
    if name == shipped.ENTRIES:
        bank = Bank(2)
        loaded = bank.load([program], {})
        RecordMap(loaded.maps[RECORD]).begin(_SLOT)
        maps, slot = bank.maps, _SLOT
    else:
        loaded = loader.load(shipped.read(name), [program])
        maps, slot = loaded.maps, 0
    configs = maps["CGROUP_CONFIGS"].typed(U32, StructureCodec(ThrottleConfig))
    configs[element(slot, Direction.DOWNLOAD)] = config_for(rate, loopback=True)
    return loaded.programs[program]


def _run(program: Program, packet: bytes) -> int:
    return program.test_run(packet, repeat=_REPEAT).duration_ns


def _ipv4(protocol: int, payload: bytes) -> bytes:
    address = bytes([192, 0, 2, 1])
    header = struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0, address, address
    )
    return bytes(12) + struct.pack(">H", _IPV4) + header + payload


def _ipv6(next_header: int, payload: bytes) -> bytes:
    header = struct.pack(">IHBB32s", 6 << 28, len(payload), next_header, 64, b"\x20" * 32)
    return bytes(12) + struct.pack(">H", _IPV6) + header + payload


def main(arguments: argparse.Namespace) -> int:
    return show(measure(arguments.rounds), as_json=arguments.json)
