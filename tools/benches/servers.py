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
from typing import Iterator, Mapping, NamedTuple, Optional

from benches.child import PATIENCE_S, Child, TransferError
from benches.surroundings import ENVIRONMENT, python
from benches.unpacked import Unpacked
from pybpfthrottle.demo.wire import Namespace

_BYTES = 8 << 30
_STARTS_S, _LOOK_S = 0.5, 0.02
# Where servers are: for the system, or beside the interpreter.
SERVERS = os.pathsep.join([os.environ["PATH"], "/usr/sbin", os.path.dirname(sys.executable)])
_CHROMIUM = (
    "chromium --headless=new --no-sandbox --disable-gpu --disable-background-networking"
    " --disable-component-update --no-first-run"
)
SSH_PORT, IPERF_PORT, HTTP3_PORT = 2222, 5201, 8443
# nginx makes these directories when it starts; its own are below /var/lib, if it is installed.
_SCRATCH = """    client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi; uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
"""
_NGINX = (
    """daemon off; worker_processes 1; pid {directory}/pid; error_log {directory}/log;
events {{ worker_connections 512; }}
http {{
    access_log off; sendfile on; types {{ text/html html; }}
"""
    + _SCRATCH
    + """    server {{
        listen {address}:80; listen {address}:443 ssl http2;
        ssl_certificate {directory}/cert; ssl_certificate_key {directory}/key;
        root {directory}/files;
    }}
}}
"""
)
# Each packet is sent as a network carries it, and a buffer of 64 KB would be all that a connection
# has on its way.
_NGINX_HTTP3 = (
    """daemon off; worker_processes 1; user root; pid {directory}/pid3;
error_log {directory}/log3;
events {{ worker_connections 512; }}
http {{
    access_log off; types {{ text/html html; }} quic_gso off; http3_stream_buffer_size 256k;
"""
    + _SCRATCH
    + """    server {{
        listen {address}:{port} quic;
        ssl_certificate {directory}/cert; ssl_certificate_key {directory}/key;
        root {directory}/files;
    }}
}}
"""
)
# curl 8.14 with OpenSSL's QUIC hangs, with a limit or without, if a timer of it goes off before its
# handshake is complete: the streams that it writes to then stay blocked, and the server waits for
# them (https://github.com/curl/curl/issues/21463). On veth that is 1 ms after the server has
# confirmed half of the first flight, which the usual key shares make too long for one datagram.
_ONE_DATAGRAM = ("--curves", "X25519")
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
    programs: Optional[Unpacked] = None

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

    @property
    def written(self) -> Path:
        """The file that curl writes what it gets by HTTP/3."""
        return self.directory / "to" / "http3"

    def curl_http3(self, port: int = HTTP3_PORT) -> list[str]:
        """Return curl's command for the large file of ``serve_http3``."""
        assert self.programs
        where = ("--resolve", f"bench:{port}:{self.address}", f"https://bench:{port}/large")
        return self.programs.curl("-sSkN", "--http3-only", *_ONE_DATAGRAM, *where)

    def acknowledged(self) -> int:
        """Return the payload that clients have acknowledged, or written, by HTTP/3."""
        total = 0
        with suppress(FileNotFoundError):
            total += int.from_bytes((self.directory / "acknowledged").read_bytes(), "little")
        with suppress(FileNotFoundError):
            total += self.written.stat().st_size
        return total


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
    _prepare(place.directory)
    for name, data in files.items():
        (place.directory / "files" / name).write_bytes(data)
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
    time.sleep(_STARTS_S)


def serve_http3(
    stack: ExitStack, server: Namespace, place: Place, port: int, ngtcp2: Optional[str] = None
) -> None:
    """Start nginx with HTTP/3, or ngtcp2's server with a congestion control.

    It has the files of ``serve``, or only the large ones.
    """
    assert place.programs
    directory = place.directory
    if not (directory / "files").exists():
        _prepare(directory)
    if ngtcp2:
        files = (f"{directory}/files", place.address, str(port), f"{directory}/key")
        command = place.programs.ngtcp2("-q", f"--cc={ngtcp2}", "-d", *files, f"{directory}/cert")
    else:
        config = directory / "nginx3.conf"
        config.write_text(
            _NGINX_HTTP3.format(address=place.address, directory=directory, port=port)
        )
        command = place.programs.nginx("-e", f"{directory}/log3", "-c", str(config))
    start(stack, server.inside(*command))
    _wait_for(server, port)


def _wait_for(server: Namespace, port: int) -> None:
    """Wait until datagrams are served: curl gives up at once where they are not."""
    deadline_s = time.monotonic() + PATIENCE_S
    sockets = Path(f"/proc/{server.process.pid}/net/udp")
    while f":{port:04X} " not in sockets.read_text():
        if time.monotonic() > deadline_s:
            raise TransferError("the server of HTTP/3 does not start")
        time.sleep(_LOOK_S)


def _prepare(directory: Path) -> None:
    """Make the large files, and the keys."""
    for name in ("files", "to"):
        (directory / name).mkdir()
    for name in ("large", "large-1.0-py3-none-any.whl"):
        with (directory / "files" / name).open("wb") as file:
            file.truncate(_BYTES)
    for command in _keys(directory):
        subprocess.run(command, check=True, capture_output=True)


def _keys(directory: Path) -> Iterator[list[str]]:
    yield [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=bench"),
        *("-keyout", f"{directory}/key", "-out", f"{directory}/cert"),
    ]
    for name in ("host", "user") if shutil.which("ssh-keygen") else ():
        yield ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{directory}/{name}"]
