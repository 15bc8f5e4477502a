"""Two network namespaces joined by a veth pair. They end with the processes that hold them."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import Optional

from pybpfthrottle.errors import NamespaceError

DEVICE = "wire"
_TOOLS = ("ip", "unshare", "nsenter")
_PATIENCE_S = 5.0


class Namespace:
    """One network namespace, held by a process that ends when this one does."""

    def __init__(self, address: str, address6: str) -> None:
        self.address = address
        self.address6 = address6
        self.process = subprocess.Popen(
            ["unshare", "--net", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def inside(self, *command: str) -> list[str]:
        """Return the command line that runs a command in this namespace."""
        return ["nsenter", f"--net=/proc/{self.process.pid}/ns/net", "--", *command]

    def wait(self) -> None:
        """Wait until the holder is in a namespace of its own."""
        deadline = time.monotonic() + _PATIENCE_S
        own = os.readlink("/proc/self/ns/net")
        while self.process.poll() is None and time.monotonic() < deadline:
            if os.readlink(f"/proc/{self.process.pid}/ns/net") != own:
                return
            time.sleep(0.005)
        raise NamespaceError("cannot make a network namespace; this needs root (CAP_SYS_ADMIN)")

    def close(self) -> None:
        """End the holder; the kernel removes the namespace with its last process."""
        self.process.kill()
        self.process.communicate()


class Wire:
    """A client and a server namespace with a veth pair between them, IPv4 and IPv6."""

    def __init__(self) -> None:
        for tool in _TOOLS:
            if shutil.which(tool) is None:
                raise NamespaceError(f"the command {tool} is missing")
        self.client = Namespace("10.99.0.1", "fd00:99::1")
        self.server = Namespace("10.99.0.2", "fd00:99::2")

    def __enter__(self) -> Wire:
        try:
            self.client.wait()
            self.server.wait()
            self.join()
            for end in (self.client, self.server):
                ip(end, f"address add {end.address}/24 dev {DEVICE}")
                ip(end, f"address add {end.address6}/64 dev {DEVICE} nodad")
                ip(end, "link set lo up")
                ip(end, f"link set {DEVICE} up")
            self.settle()
        except BaseException:
            self.close()
            raise
        return self

    def join(self) -> None:
        """Create the veth pair, one end in each namespace. Raises NamespaceError."""
        ip(
            None,
            f"link add {DEVICE} netns {self.client.process.pid} type veth"
            f" peer name {DEVICE} netns {self.server.process.pid}",
        )

    def settle(self) -> None:
        """Wait until packets pass."""
        for end in (self.client, self.server):
            _wait_for_link(end)

    def change(self, options: str) -> None:
        """Change both devices, as ``ip link set`` does: "mtu 9000". Raises NamespaceError."""
        for end in (self.client, self.server):
            ip(end, f"link set {DEVICE} {options}")

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End both namespaces; the veth pair goes with them."""
        self.client.close()
        self.server.close()


def _wait_for_link(namespace: Namespace) -> None:
    """Wait until both ends are up, which may take a second: IPv6 does not work earlier."""
    deadline = time.monotonic() + _PATIENCE_S
    while "state UP" not in ip(namespace, f"link show {DEVICE}") and time.monotonic() < deadline:
        time.sleep(0.02)


def ip(namespace: Optional[Namespace], arguments: str) -> str:
    """Return what the command prints in a namespace, or in this one. Raises NamespaceError."""
    command = ["ip", *arguments.split()]
    done = subprocess.run(
        namespace.inside(*command) if namespace else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise NamespaceError(f"ip {arguments}: {done.stdout.strip()}")
    return done.stdout
