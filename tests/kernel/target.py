"""A process that does what it is told: ``python target.py`` evaluates each line of its input.

What that gives goes out as a line of JSON. Sockets are told by their descriptors.
"""

from __future__ import annotations

import array
import ctypes
import json
import os
import platform
import resource
import socket
import sys
import threading
import time
from contextlib import suppress
from socket import AF_INET, AF_INET6, SOCK_DGRAM, SOCK_STREAM
from typing import Any, Optional, TextIO

SYS_EXIT = {"x86_64": 60, "aarch64": 93}[platform.machine()] if sys.maxsize > 1 << 32 else 1

_kept: dict[int, socket.socket] = {}
_received: dict[int, int] = {}
_children: dict[int, _Child] = {}


def keep(own: socket.socket) -> int:
    """Have it open until the end."""
    _kept[own.fileno()] = own
    return own.fileno()


def make(*how: int) -> int:
    """A socket of a family, a type and perhaps a protocol."""
    return keep(socket.socket(*how))


def make_if_possible(*how: int) -> Optional[int]:
    """The same, or None where this kernel has none."""
    try:
        return make(*how)
    except OSError:
        return None


def make_many(count: int) -> list[int]:
    """Sockets of TCP and UDP, IPv4 and IPv6."""
    kinds = [(family, kind) for family in (AF_INET, AF_INET6) for kind in (SOCK_STREAM, SOCK_DGRAM)]
    return [make(*kinds[index % len(kinds)]) for index in range(count)]


def echoes(count: int) -> list[int]:
    """Which packets arrive of those that are sent to oneself, by UDP, one after the other."""
    found = []
    with socket.socket(AF_INET, SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        own.setblocking(False)
        for number in range(count):
            own.sendto(b"%d" % number, own.getsockname())
            with suppress(BlockingIOError):
                found.append(int(own.recv(20)))
    return found


def burst(count: int, size: int) -> int:
    """How many datagrams arrive of those that are sent to oneself, by UDP, all at once."""
    with socket.socket(AF_INET, SOCK_DGRAM) as own:
        own.bind(("127.0.0.1", 0))
        own.setblocking(False)
        for _ in range(count):
            own.sendto(bytes(size), own.getsockname())
        found = 0
        with suppress(BlockingIOError):
            while own.recv(size):
                found += 1
    return found


def asked(number: int, times: int) -> list[int]:
    """How many answers come to each of some equal questions, from a server with this port."""
    question = bytes(12) + b"\x07example\x03org\0" + bytes(4)
    found = []
    with socket.socket(AF_INET, SOCK_DGRAM) as server, socket.socket(AF_INET, SOCK_DGRAM) as own:
        server.bind(("127.9.8.7", number))
        own.setblocking(False)
        for _ in range(times):
            own.sendto(question, server.getsockname())
            data, whose = server.recvfrom(100)
            server.sendto(data + bytes(16), whose)
            found.append(0)
            with suppress(BlockingIOError):
                found[-1] = len(own.recvfrom(100)[0]) and 1
    return found


def rcode(number: int) -> int:
    """What the answer to a question says of its success, from a server with this port."""
    question = bytes(12) + b"\x07example\x03org\0" + bytes(4)
    with socket.socket(AF_INET, SOCK_DGRAM) as server, socket.socket(AF_INET, SOCK_DGRAM) as own:
        server.bind(("127.9.8.7", number))
        server.settimeout(20)
        own.settimeout(20)
        own.sendto(question, server.getsockname())
        data, whose = server.recvfrom(100)
        server.sendto(data + bytes(16), whose)
        return own.recv(100)[3] & 15


def failure(number: int, seconds: float, host: str = "127.0.0.1") -> Any:
    """The error of connecting to a port of this machine, or None."""
    try:
        with socket.create_connection((host, number), seconds):
            return None
    except OSError as error:
        return error.errno or str(error)


def listen() -> int:
    """A server on the loopback device."""
    return keep(socket.create_server(("127.0.0.1", 0)))


def port(number: int) -> int:
    """The port of a socket."""
    return int(_kept[number].getsockname()[1])


def connect(number: int, host: str = "127.0.0.1") -> int:
    """A connection to a port."""
    return keep(socket.create_connection((host, number)))


def accept(listener: int) -> int:
    """The next connection of a server."""
    return keep(_kept[listener].accept()[0])


def close_all() -> None:
    """Close what was opened."""
    for one in _kept.values():
        one.close()
    _kept.clear()


def letter_box() -> tuple[int, str]:
    """A Unix socket that descriptors can be sent to, and its abstract name."""
    own = socket.socket(socket.AF_UNIX, SOCK_DGRAM)
    own.bind("")
    return keep(own), own.getsockname()[1:].decode()


def receive(unix: int) -> int:
    """A descriptor that is handed over by a Unix socket."""
    numbers = array.array("i")
    _, [(_, _, data)], _, _ = _kept[unix].recvmsg(1, socket.CMSG_SPACE(numbers.itemsize))
    numbers.frombytes(data[: numbers.itemsize])
    return keep(socket.socket(fileno=numbers[0]))


def download(host: str, number: int, *, wait: bool = False) -> int:
    """A connection to a web server, from which all is read that comes."""
    own = socket.create_connection((host, number))
    own.sendall(b"GET / HTTP/1.1\r\nHost: there\r\n\r\n")

    def run() -> None:
        while own.recv(1 << 20):
            pass

    reading = threading.Thread(target=run, daemon=True)
    reading.start()
    if wait:
        reading.join()
    return keep(own)


def upload(host: str, number: int) -> int:
    """A connection to a web server, which is sent as much as it takes."""
    own = socket.create_connection((host, number))
    own.sendall(b"PUT / HTTP/1.1\r\nHost: there\r\n\r\n")

    def run() -> None:
        while True:
            own.sendall(bytes(1 << 16))

    threading.Thread(target=run, daemon=True).start()
    return keep(own)


def _count(own: socket.socket) -> None:
    """Read what comes, and count it."""
    while data := own.recv(1 << 18):
        _received[own.fileno()] += len(data)


def _fill(own: socket.socket) -> None:
    """Send as much as it takes."""
    while True:
        own.sendall(bytes(1 << 16))


def _go_on(own: socket.socket, *, sends: bool) -> int:
    _received[own.fileno()] = 0
    threading.Thread(target=_fill if sends else _count, args=[own], daemon=True).start()
    return keep(own)


def stream_server(host: str, protocol: int, *, sends: bool) -> int:
    """A server that sends to whoever connects, or counts what they send; of TCP or MPTCP."""
    own = socket.socket(AF_INET, SOCK_STREAM, protocol)
    own.bind((host, 0))
    own.listen()

    def run() -> None:
        while True:
            _go_on(own.accept()[0], sends=sends)

    threading.Thread(target=run, daemon=True).start()
    return keep(own)


def stream_client(host: str, number: int, protocol: int, *, sends: bool) -> int:
    """A connection to such a server, which takes the other part."""
    own = socket.socket(AF_INET, SOCK_STREAM, protocol)
    own.connect((host, number))
    return _go_on(own, sends=sends)


def received_in_all() -> int:
    """What all that is counted has received."""
    return sum(_received.values())


def receiver(family: int) -> int:
    """A UDP socket whose bytes are counted, headers included."""
    own = socket.socket(family, SOCK_DGRAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    own.bind(("", 0))
    headers = 28 if family == AF_INET else 48

    def run() -> None:
        while True:
            _received[own.fileno()] += len(own.recv(1 << 16)) + headers

    _received[own.fileno()] = 0
    threading.Thread(target=run, daemon=True).start()
    return keep(own)


def received(number: int) -> int:
    """What a receiver has counted."""
    return _received[number]


def flood(number: int, host: str, port: int, bytes_per_s: float) -> None:
    """Send datagrams at this rate, in a thread."""
    own, data = _kept[number], bytes(1200)

    def run() -> None:
        begin, sent = time.monotonic(), 0
        while True:
            if sent > bytes_per_s * (time.monotonic() - begin):
                time.sleep(0.001)
                continue
            with suppress(PermissionError):  # of what is dropped, before Linux 5.3
                own.sendto(data, (host, port))
            sent += len(data)

    threading.Thread(target=run, daemon=True).start()


def churn(each_s: float) -> None:
    """Open and close sockets and files all the time, in a thread; numbers are used again."""

    def run() -> None:
        while True:
            kept = [socket.socket(), open("/dev/null"), socket.socket()]  # noqa: SIM115
            time.sleep(each_s)
            for one in kept:
                one.close()

    threading.Thread(target=run, daemon=True).start()


def thread(how: str) -> Any:
    """What an expression gives in a thread, which goes on."""
    done = threading.Event()
    found = []

    def run() -> None:
        found.append(eval(how))  # noqa: S307 - the tests tell it
        done.set()
        time.sleep(600)

    threading.Thread(target=run, daemon=True).start()
    done.wait()
    return found[0]


def end_first_thread() -> None:
    """Only another goes on, which does what comes then."""

    def run() -> None:
        print(json.dumps(None), flush=True)
        serve(sys.stdin, sys.stdout)
        os._exit(0)

    threading.Thread(target=run).start()
    # Not pthread_exit, which unwinds, and for that wants a library that may not be there.
    ctypes.CDLL(None).syscall(SYS_EXIT, 0)


class _Child:
    """Another process that does what it is told."""

    def __init__(self, way: str) -> None:
        """Made by fork; ``way`` may have the words double, setsid and exec."""
        reading, to = os.pipe()
        back, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(to)
            os.close(back)
            _become(way, reading, writing)
        os.close(reading)
        os.close(writing)
        if "double" in way:
            os.waitpid(pid, 0)
        self._to, self._back = os.fdopen(to, "w"), os.fdopen(back)
        self.pid = int(self.do("os.getpid()"))

    def order(self, how: str) -> None:
        """Evaluate an expression there, without waiting for what it gives."""
        print(how, file=self._to, flush=True)

    def do(self, how: str) -> Any:
        """What an expression gives there."""
        self.order(how)
        return json.loads(self._back.readline())


def _become(way: str, reading: int, writing: int) -> None:
    try:
        if "double" in way and os.fork():
            return
        if "setsid" in way:
            os.setsid()
        if "exec" in way:
            os.dup2(reading, 0)
            os.dup2(writing, 1)
            os.execv(sys.executable, [sys.executable, __file__])
        serve(os.fdopen(reading), os.fdopen(writing, "w"))
    finally:
        os._exit(0)


def child(way: str = "fork") -> int:
    """The pid of a new one."""
    one = _Child(way)
    _children[one.pid] = one
    return one.pid


def tell(pid: int, how: str) -> Any:
    """What an expression gives in a child."""
    return _children[pid].do(how)


def order(pid: int, how: str) -> None:
    """Have a child begin with an expression."""
    _children[pid].order(how)


def serve(reading: TextIO, writing: TextIO) -> None:
    """Until nobody tells anything more."""
    for line in reading:
        print(json.dumps(eval(line)), file=writing, flush=True)  # noqa: S307 - as above


if __name__ == "__main__":
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    serve(sys.stdin, sys.stdout)
