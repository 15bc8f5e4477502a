"""Both ends of what is measured through a delay: the far one answers, the near one asks once."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Callable

from benches.surroundings import READY
from pybpfthrottle.linux import netns
from pybpfthrottle.linux.sockets import SO_MAX_PACING_RATE

_PORT = 7001
_BLOCK = bytes(1 << 16)
_WORD = struct.Struct("!Q")
_ASKED = struct.Struct("!QQQ")  # bytes a second, a number of datagrams, and their size
_ECHO = 0
# As the kernel counts them; all of them may wait for a receiver that does not get the CPU.
_BYTES_EACH = 4096
_SO_RCVBUFFORCE = 33
_PATIENCE_S = 3.0


def far() -> None:
    """Answer until standard input ends."""
    datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    datagrams.bind(("::", _PORT))
    listener = socket.create_server(("::", _PORT), family=socket.AF_INET6, dualstack_ipv6=True)
    _thread(_answer, datagrams)
    _thread(_accept, listener)
    print(READY, flush=True)
    sys.stdin.read()


def _answer(datagrams: socket.socket) -> None:
    while True:
        data, who = datagrams.recvfrom(1 << 16)
        if len(data) != _ASKED.size:
            datagrams.sendto(data, who)
            continue
        rate, count, size = _ASKED.unpack(data)
        begin = time.monotonic()
        for number in range(count):
            wait_s = begin + number * size / rate - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)
            datagrams.sendto(_WORD.pack(number).ljust(size, b"\0"), who)


def _accept(listener: socket.socket) -> None:
    while True:
        _thread(_serve, listener.accept()[0])


def _serve(connection: socket.socket) -> None:
    with connection, suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        (rate,) = _WORD.unpack(connection.recv(_WORD.size, socket.MSG_WAITALL))
        while rate == _ECHO:
            data = connection.recv(1 << 16)
            if not data:
                return
            connection.sendall(data)
        connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("=Q", rate))
        while True:
            connection.sendall(_BLOCK)


def _thread(work: Callable[[socket.socket], None], argument: socket.socket) -> None:
    threading.Thread(target=work, args=(argument,), daemon=True).start()


def ping(host: str, kind: str, count: str) -> dict[str, Any]:
    """Round trips in ms, and how long it took to connect."""
    begin = time.monotonic()
    with _connected(host, kind) as one:
        connect_s = time.monotonic() - begin
        if kind == "tcp":
            one.sendall(_WORD.pack(_ECHO))
        found = []
        for _ in range(int(count)):
            begin = time.monotonic()
            one.send(bytes(64))
            one.recv(64)
            found.append((time.monotonic() - begin) * 1e3)
    return {"connect": connect_s * 1e3, "trips": found}


def get(host: str, rate: str, seconds: str) -> dict[str, Any]:
    """How many bytes of payload a second came after the first second."""
    with _connected(host, "tcp") as one:
        one.sendall(_WORD.pack(int(rate)))
        begin = time.monotonic() + 1
        end, got = begin + float(seconds), 0
        while (now := time.monotonic()) < end:
            got += len(one.recv(1 << 18)) * (now >= begin)
    return {"bytes_per_s": got / float(seconds)}


def datagrams(host: str, rate: str, count: str, size: str) -> dict[str, Any]:
    """How many of numbered datagrams came, how many twice, behind a later one, or in vain."""
    before = netns.unread()
    with _connected(host, "udp") as one:
        one.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, int(count) * _BYTES_EACH)
        one.send(_ASKED.pack(int(rate), int(count), int(size)))
        numbers: list[int] = []
        with suppress(TimeoutError, socket.timeout):
            while True:
                numbers.append(_WORD.unpack_from(one.recv(1 << 16))[0])
    came = len(set(numbers))
    return {
        "came": came,
        "twice": len(numbers) - came,
        "behind": sum(now < last for last, now in zip(numbers, numbers[1:])),
        "unread": netns.unread() - before,
    }


_ASKS: dict[str, Callable[..., dict[str, Any]]] = {"ping": ping, "get": get, "datagrams": datagrams}


def _connected(host: str, kind: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    one.settimeout(_PATIENCE_S)
    if kind == "tcp":
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.connect((host, _PORT))
    return one


def main() -> None:
    """Be one of them, by name and arguments."""
    name, *arguments = sys.argv[1:]
    if name == "far":
        far()
        return
    print(READY, flush=True)
    sys.stdin.readline()
    print(json.dumps(_ASKS[name](*arguments)), flush=True)


if __name__ == "__main__":
    main()
