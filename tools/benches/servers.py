"""Servers that real programs download from, in a namespace, with files and keys of their own."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple

from benches.child import PATIENCE_S, Child
from benches.surroundings import ENVIRONMENT, python
from pybpfthrottle.demo.wire import Namespace

_BYTES = 8 << 30
# Where servers are: for the system, or beside the interpreter.
SERVERS = os.pathsep.join([os.environ["PATH"], "/usr/sbin", os.path.dirname(sys.executable)])
_CHROMIUM = (
    "chromium --headless=new --no-sandbox --disable-gpu --disable-background-networking"
    " --disable-component-update --no-first-run"
)
SSH_PORT, IPERF_PORT = 2222, 5201
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
_SSHD = """ListenAddress {address}
Port {port}
HostKey {directory}/host
AuthorizedKeysFile {directory}/user.pub
PidFile none
StrictModes no
UsePAM no
"""


class Place(NamedTuple):
    """Where the servers are, and their files."""

    address: str
    directory: Path

    @property
    def url(self) -> str:
        """Where HTTP/1.1 is."""
        return f"http://{self.address}"

    @property
    def https(self) -> str:
        """Where HTTP/2 and HTTP/3 are."""
        return f"https://{self.address}"

    @property
    def chromium(self) -> str:
        """Chromium without a window, with a profile of its own, which takes this server's key."""
        key = subprocess.run(
            ["openssl", "pkey", "-in", f"{self.directory}/key", "-pubout", "-outform", "DER"],
            check=True,
            capture_output=True,
        ).stdout
        known = base64.b64encode(hashlib.sha256(key).digest()).decode()
        return (
            f"{_CHROMIUM} --user-data-dir={self.directory}/to/profile"
            f" --ignore-certificate-errors-spki-list={known}"
        )

    @property
    def chromium_http3(self) -> str:
        """The same, which asks this server by HTTP/3 and by nothing else."""
        return f"{self.chromium} --origin-to-force-quic-on={self.address}:443"

    def acknowledged(self) -> int:
        """Return the payload that clients have acknowledged by HTTP/3."""
        try:
            return int.from_bytes((self.directory / "acknowledged").read_bytes(), "little")
        except FileNotFoundError:
            return 0


def has_http3() -> bool:
    """Whether this interpreter has what serves HTTP/3."""
    return importlib.util.find_spec("aioquic") is not None


def start(stack: ExitStack, command: list[str]) -> subprocess.Popen[bytes]:
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


def serve(stack: ExitStack, server: Namespace, place: Place, files: Mapping[str, bytes]) -> None:
    """Start the servers that are installed, with files and keys for this transfer alone.

    Besides ``files`` there are ``large`` and a wheel, both without an end that a transfer sees.
    """
    for name in ("files", "to"):
        (place.directory / name).mkdir()
    for name in ("large", "large-1.0-py3-none-any.whl"):
        with (place.directory / "files" / name).open("wb") as file:
            file.truncate(_BYTES)
    for name, data in files.items():
        (place.directory / "files" / name).write_bytes(data)
    for command in _keys(place.directory):
        subprocess.run(command, check=True, capture_output=True)
    fields = {"address": place.address, "directory": place.directory, "port": SSH_PORT}
    (place.directory / "nginx.conf").write_text(_NGINX.format(**fields))
    (place.directory / "sshd.conf").write_text(_SSHD.format(**fields))
    for program, *options in (
        ("nginx", "-e", f"{place.directory}/log", "-c", f"{place.directory}/nginx.conf"),
        ("sshd", "-D", "-f", f"{place.directory}/sshd.conf"),
        ("iperf3", "-s", "-B", place.address, "-p", str(IPERF_PORT)),
    ):
        path = shutil.which(program, path=SERVERS)
        if path:
            start(stack, server.inside(path, *options))
    if has_http3():
        command = python("benches.http3", "serve", place.address, str(place.directory))
        Child(stack, server.inside(*command)).ready()
    time.sleep(0.5)


def _keys(directory: Path) -> Iterator[list[str]]:
    yield [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench"),
        *("-keyout", f"{directory}/key", "-out", f"{directory}/cert"),
    ]
    for name in ("host", "user") if shutil.which("ssh-keygen") else ():
        yield ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{directory}/{name}"]
