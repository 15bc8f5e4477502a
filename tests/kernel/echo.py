"""A far end that sends back what it gets, and a process that asks it what it is told to.

Both are started without this package: they begin in a few hundredths of a second.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any, Callable

PORT = 7000

# TCP, UDP, IPv4 and IPv6, on the same port; "quit" is the end of input.
FAR = f"""
import socket, sys, threading
def udp():
    while True:
        data, who = datagrams.recvfrom(65536)
        datagrams.sendto(data, who)
def serve(one):
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        data = one.recv(65536)
        if not data:
            return
        one.sendall(data)
def accept():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
datagrams = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
datagrams.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
datagrams.bind(("::", {PORT}))
listener = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True)
for work in (udp, accept):
    threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""

# Each line is one thing to do, by name and arguments; the answer is a line.
NEAR = """
import hashlib, json, socket, sys, time
kept = {}
def to(host, port, kind, device=""):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
    if device:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    one.settimeout(20)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    if kind == "tcp":
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind != "unconnected":
        one.connect((host, port))
    return one
def ping(host, port, kind, count, device=""):
    "Round trips in seconds."
    found = []
    with to(host, port, kind, device) as one:
        for number in range(count):
            begin = time.monotonic()
            one.sendto(b"x" * 32, (host, port)) if kind == "unconnected" else one.send(b"x" * 32)
            one.recv(64)
            found.append(time.monotonic() - begin)
    return found
def send(host, port, count, size, pause=0.0002):
    "Send numbered datagrams, and keep the socket."
    one = kept["udp"] = to(host, port, "udp")
    for number in range(count):
        one.send(number.to_bytes(4, "big").ljust(size, b"-"))
        time.sleep(pause)
def receive(timeout, most=0):
    "The numbers that have come, in order, and when the last one did."
    one, found, at = kept["udp"], [], 0
    one.settimeout(timeout)
    try:
        while not most or len(found) < most:
            found.append(int.from_bytes(one.recv(65536)[:4], "big"))
            at = time.monotonic()
    except TimeoutError:
        pass
    return [found, at]
def bulk(host, port, size):
    "Whether so many bytes come back as they were sent."
    import threading
    data = bytes(range(251)) * (size // 251)
    with to(host, port, "tcp") as one:
        threading.Thread(target=one.sendall, args=(data,), daemon=True).start()
        got = hashlib.sha256()
        left = len(data)
        while left:
            part = one.recv(1 << 16)
            got.update(part)
            left -= len(part)
    return got.digest() == hashlib.sha256(data).digest()
def open_tcp(host, port):
    kept["tcp"] = to(host, port, "tcp")
print("ready", flush=True)
for line in sys.stdin:
    name, arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments)), flush=True)
"""

_PYTHON = [sys.executable, "-I", "-S", "-c"]


class Process:
    """One of the two; ``end`` ends it."""

    def __init__(self, inside: Callable[..., list[str]], program: str) -> None:
        self.process = subprocess.Popen(
            inside(*_PYTHON, program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready\n"  # so it is in its namespace

    def line(self) -> str:
        """The next line that it says."""
        assert self.process.stdout
        return self.process.stdout.readline()

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


class Far(Process):
    """The far end."""

    def __init__(self, inside: Callable[..., list[str]]) -> None:
        super().__init__(inside, FAR)


class Near(Process):
    """The process that asks."""

    def __init__(self, inside: Callable[..., list[str]]) -> None:
        super().__init__(inside, NEAR)

    def begin(self, name: str, *arguments: Any) -> None:
        """Have it begin with something."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have it do something, and return what came of it."""
        self.begin(name, *arguments)
        return json.loads(self.line())
