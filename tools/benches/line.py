"""Our own delay line: a tun device in each of two namespaces, and a process that passes packets on.

GSO packets of up to 64 KB pass whole (IFF_VNET_HDR), so that the line costs a few microseconds a
packet. A bottleneck takes packets of one MTU instead, as a real one does, and drops from its tail;
so does a line that loses packets.

Its limits, on a virtual machine of two CPUs with Linux 6.18 that ran both ends as well: one flow
gets 1.8 GB/s through a line without a delay. A ping of 64 bytes takes 0.3 ms longer than the delay
in the middle and 0.5 to 0.8 at its 95th per cent, some ms when both CPUs are busy. 64 flows of
400 MB/s at 100 ms are too much: the devices then drop what the line cannot take (``dropped``), and
the figures of such a transfer are the line's own.

Source: Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import gc
import json
import math
import os
import random
import select
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from typing import NamedTuple, Optional, Sequence

from benches.surroundings import ENVIRONMENT, READY
from pybpfthrottle.demo.wire import DEVICE, Namespace, Wire
from pybpfthrottle.errors import NamespaceError

# asm-generic/ioctl.h: the same but on MIPS, PowerPC and SPARC.
_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6 = 0x01, 0x02, 0x04
_IFNAMSIZ = 16
_CLONE_NEWNET = 0x40000000
_PR_SET_TIMERSLACK = 29
_VNET_HEADER_BYTES = 10
_LARGEST_BYTES = _VNET_HEADER_BYTES + (1 << 16)
# Packets that one direction may take before the other has its turn.
_BATCH = 64
# A tun device keeps what was not read yet in a ring of this size.
_RING_PACKETS = 10_000


class _InterfaceRequest(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * _IFNAMSIZ),
        ("flags", ctypes.c_short),
        ("unused", ctypes.c_char * 22),
    )


class LineSpec(NamedTuple):
    """What a packet meets: a delay, and before it a bottleneck if it has a rate.

    ``lost`` of the packets are lost, from 0 to 1. ``later`` has other delays in order, and how many
    seconds after the line's first packet each begins.
    """

    delay_s: float = 0.0
    rate_bytes_per_s: Optional[int] = None
    queue_bytes: int = 0
    lost: float = 0.0
    later: Sequence[tuple[float, float]] = ()


class DelayLine(Wire):
    """A client and a server namespace with a delay line between them."""

    def __init__(self, spec: LineSpec) -> None:
        super().__init__()
        self.spec = spec
        self._process: Optional[subprocess.Popen[str]] = None

    def join(self) -> None:
        """Start the process that holds both devices. Raises NamespaceError."""
        pids = [str(end.process.pid) for end in (self.client, self.server)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benches.line", *pids, json.dumps(self.spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout
        answer = self._process.stdout.readline().strip()
        if answer != READY:
            rest = self._process.stdout.read().strip().splitlines()
            raise NamespaceError(f"no tun devices: {rest[-1] if rest else answer}")

    def settle(self) -> None:
        """Let the devices hold what is sent while the process waits for its turn."""
        self.change(f"txqueuelen {_RING_PACKETS}")

    def dropped(self) -> int:
        """The packets that a device dropped because the process did not keep up."""
        return sum(_dropped(end) for end in (self.client, self.server))

    def close(self) -> None:
        """End the process, and with it the devices, and both namespaces."""
        if self._process:
            self._process.kill()
            self._process.communicate()
        super().close()


def _dropped(end: Namespace) -> int:
    shown = subprocess.run(
        end.inside(*f"ip -json -stats link show {DEVICE}".split()),
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["dropped"])


class Way:
    """One direction of the line: packets leave it in the order in which they came."""

    def __init__(self, spec: LineSpec, source: int, sink: int) -> None:
        self.source = source
        self._sink = sink
        self._spec = spec
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._free_s = 0.0
        self._begin_s = math.inf
        self._delay_s = spec.delay_s
        self._later = deque(spec.later)
        self._chance = random.Random(1)  # noqa: S311 - of a line

    def due_s(self, now_s: float, length: int) -> Optional[float]:
        """When a packet that comes now leaves; None if it is lost."""
        self._begin_s = min(self._begin_s, now_s)
        while self._later and now_s - self._begin_s >= self._later[0][0]:
            self._delay_s = self._later.popleft()[1]
        if self._spec.lost and self._chance.random() < self._spec.lost:
            return None
        rate = self._spec.rate_bytes_per_s
        if rate is None:
            return now_s + self._delay_s
        queued_s = max(0.0, self._free_s - now_s)
        if queued_s * rate + length > self._spec.queue_bytes:
            return None
        self._free_s = now_s + queued_s + length / rate
        return self._free_s + self._delay_s

    def take(self) -> None:
        """Read the packets that wait at the source."""
        with suppress(BlockingIOError):
            for _ in range(_BATCH):
                packet = os.read(self.source, _LARGEST_BYTES)
                due_s = self.due_s(time.monotonic(), len(packet) - _VNET_HEADER_BYTES)
                if due_s is not None:
                    self._waiting.append((due_s, packet))

    def give(self) -> Optional[float]:
        """Write the packets that are due; the seconds until the next one is, if there is one."""
        while self._waiting:
            left_s = self._waiting[0][0] - time.monotonic()
            if left_s > 0:
                return left_s
            # EIO: the far device is not up yet, or no more.
            with suppress(OSError):
                os.write(self._sink, self._waiting.popleft()[1])
        return None


def _carry(spec: LineSpec, devices: tuple[int, int]) -> None:
    """Pass packets on until standard input ends."""
    first, second = devices
    ways = {first: Way(spec, first, second), second: Way(spec, second, first)}
    while True:
        waits = [wait for way in ways.values() if (wait := way.give()) is not None]
        ready, _, _ = select.select([*devices, sys.stdin], [], [], min(waits, default=None))
        if sys.stdin in ready:
            return
        for source, way in ways.items():
            if source in ready:
                way.take()


def _device(pid: int, offload: int) -> int:
    """A tun device in the network namespace of a process. Raises OSError."""
    _enter(pid)
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = _InterfaceRequest(DEVICE.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
    fcntl.ioctl(fd, _TUNSETIFF, bytes(request))
    fcntl.ioctl(fd, _TUNSETOFFLOAD, offload)
    return fd


def _enter(pid: int) -> None:
    # os.setns came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "setns")
    finally:
        os.close(fd)


def _be_punctual() -> None:
    """Run before other processes, as a line that is no process would, and wake up on time."""
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    gc.disable()


def main() -> None:
    """Join two namespaces, tell so, and pass packets on until standard input ends."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("pids", type=int, nargs=2)
    parser.add_argument("spec", type=json.loads)
    arguments = parser.parse_args()
    spec = LineSpec(*arguments.spec)
    whole = not spec.rate_bytes_per_s and not spec.lost
    offload = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6 if whole else 0
    first, second = (_device(pid, offload) for pid in arguments.pids)
    _be_punctual()
    print(READY, flush=True)
    _carry(spec, (first, second))


if __name__ == "__main__":
    main()
