"""Files by HTTP/3: a server until its input ends, or a download until it is ended. Needs aioquic.

The server writes how much its clients have acknowledged, in bytes, into a file of eight bytes,
since no socket can tell that.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import ssl
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Iterator
from urllib.parse import urlsplit

from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent

from benches.quic_peer import pump, until_input_ends
from benches.surroundings import READY

_PORT = 443
_BLOCK_BYTES = 60_000
_COUNT_S = 0.005
_TYPES = {".html": b"text/html", ".png": b"image/png"}


class _Server(QuicConnectionProtocol):
    """Answers requests with the files of a directory."""

    directory: ClassVar[Path]
    # What each stream of each connection had acknowledged.
    acknowledged: ClassVar[dict[tuple[int, int], int]] = {}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._http = H3Connection(self._quic)
        self._answers: list[asyncio.Task[None]] = []

    def quic_event_received(self, event: QuicEvent) -> None:
        """Begin an answer for each request."""
        for one in self._http.handle_event(event):
            if isinstance(one, HeadersReceived):
                name = dict(one.headers)[b":path"].decode().lstrip("/")
                self._answers.append(asyncio.ensure_future(self._answer(one.stream_id, name)))

    async def _answer(self, stream_id: int, name: str) -> None:
        path = self.directory / name
        if not path.is_file():
            self._http.send_headers(stream_id, [(b":status", b"404")], end_stream=True)
            self.transmit()
            return
        kind = _TYPES.get(path.suffix, b"application/octet-stream")
        length = str(path.stat().st_size).encode()
        fields = [(b":status", b"200"), (b"content-type", kind), (b"content-length", length)]
        self._http.send_headers(stream_id, fields)
        send = partial(self._http.send_data, end_stream=False)
        with suppress(KeyError):  # The client may be gone.
            await pump(self, stream_id, _blocks(path), send)
            self._http.send_data(stream_id, b"", end_stream=True)
            self.transmit()

    def count(self) -> None:
        """Note what was acknowledged."""
        for number, stream in self._quic._streams.items():
            self.acknowledged[id(self), number] = stream.sender._buffer_start


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


async def _serve(address: str, directory: Path) -> None:
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(directory / "cert", directory / "key")
    _Server.directory = directory / "files"
    servers: list[_Server] = []

    def connected(*arguments: Any, **options: Any) -> _Server:
        servers.append(_Server(*arguments, **options))
        return servers[-1]

    await serve(address, _PORT, configuration=configuration, create_protocol=connected)
    counting = asyncio.ensure_future(_count(servers, directory / "acknowledged"))
    print(READY, flush=True)
    await until_input_ends()
    counting.cancel()


async def _count(servers: list[_Server], path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    while True:
        for server in servers:
            server.count()
        os.pwrite(descriptor, sum(_Server.acknowledged.values()).to_bytes(8, "little"), 0)
        await asyncio.sleep(_COUNT_S)


async def _get(url: str) -> None:
    parts = urlsplit(url)
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=H3_ALPN, verify_mode=ssl.CERT_NONE
    )
    host = parts.hostname or ""
    async with connect(host, _PORT, configuration=configuration) as peer:
        http = H3Connection(peer._quic)
        fields = {":method": "GET", ":scheme": "https", ":authority": host, ":path": parts.path}
        encoded = [(name.encode(), value.encode()) for name, value in fields.items()]
        http.send_headers(peer._quic.get_next_available_stream_id(), encoded, end_stream=True)
        peer.transmit()
        await peer.wait_closed()


def main() -> None:
    """Be the end that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    roles = parser.add_subparsers(dest="role", required=True)
    server = roles.add_parser("serve")
    server.add_argument("address")
    server.add_argument("directory", type=Path)
    roles.add_parser("get").add_argument("url")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.role == "serve":
        asyncio.run(_serve(arguments.address, arguments.directory))
    else:
        asyncio.run(_get(arguments.url))


if __name__ == "__main__":
    main()
