"""One end of QUIC downloads: the server sends as fast as it may, the client counts. Needs aioquic.

Both go on until standard input ends. The client then reports, as JSON, how many bytes came in each
``BIN_S`` since it began, the round trips in ms as its connections see them, and that of a small
flow of another process beside it, its 95th percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import logging
import ssl
import sys
import time
from collections import Counter
from itertools import repeat
from typing import Callable, ClassVar, Iterable, Optional

from aioquic.asyncio import QuicConnectionProtocol, connect, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from benches.figures import BIN_S
from benches.quic_ping import Ping
from benches.surroundings import READY

_BLOCK = bytes(60_000)
# What the server hands to its library ahead of what can be sent.
_AHEAD_BYTES = 2 << 20
_PAUSE_S = 0.002


async def pump(
    peer: QuicConnectionProtocol,
    stream_id: int,
    blocks: Iterable[bytes],
    send: Callable[[int, bytes], None],
) -> None:
    """Send blocks on a stream as fast as it may, without more than a buffer's worth ahead."""
    for block in blocks:
        while len(peer._quic._streams[stream_id].sender._buffer) >= _AHEAD_BYTES:
            await asyncio.sleep(_PAUSE_S)
        send(stream_id, block)
        peer.transmit()
        await asyncio.sleep(0)


class _Server(QuicConnectionProtocol):
    """Answers each stream with data without end."""

    _pump: Optional[asyncio.Task[None]] = None

    def quic_event_received(self, event: QuicEvent) -> None:
        """Begin to send when the client asks."""
        if isinstance(event, StreamDataReceived) and self._pump is None:
            self._pump = asyncio.ensure_future(self._send(event.stream_id))

    async def _send(self, stream_id: int) -> None:
        await pump(self, stream_id, repeat(_BLOCK), self._quic.send_stream_data)


class _Client(QuicConnectionProtocol):
    """Counts what all connections receive together."""

    bins: ClassVar[Counter[int]] = Counter()
    begin_s = time.monotonic()

    def quic_event_received(self, event: QuicEvent) -> None:
        """Count data."""
        if isinstance(event, StreamDataReceived):
            self.bins[int((time.monotonic() - self.begin_s) / BIN_S)] += len(event.data)


def _certificate(configuration: QuicConfiguration) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now - day, now + day)
    configuration.certificate = builder.sign(key, hashes.SHA256())
    configuration.private_key = key


async def until_input_ends() -> None:
    """Return when standard input ends."""
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def _serve(address: str, port: int, control: str) -> None:
    configuration = QuicConfiguration(
        is_client=False, congestion_control_algorithm=control, max_data=1 << 30
    )
    _certificate(configuration)
    await serve(address, port, configuration=configuration, create_protocol=_Server)
    print(READY, flush=True)
    await until_input_ends()


async def _download(address: str, port: int, ended: asyncio.Event) -> float:
    configuration = QuicConfiguration(
        is_client=True, verify_mode=ssl.CERT_NONE, max_data=1 << 26, max_stream_data=1 << 26
    )
    async with connect(address, port, configuration=configuration, create_protocol=_Client) as peer:
        stream_id = peer._quic.get_next_available_stream_id()
        peer._quic.send_stream_data(stream_id, b"go")
        peer.transmit()
        await ended.wait()
        return float(peer._quic._loss._rtt_smoothed * 1000)


async def _get(address: str, port: int, connections: int) -> None:
    ended = asyncio.Event()
    downloads = [asyncio.ensure_future(_download(address, port, ended)) for _ in range(connections)]
    ping = Ping(address, port + 2)
    print(READY, flush=True)
    await until_input_ends()
    bins, ping_ms = sorted(_Client.bins.items()), ping.end()
    ended.set()
    done, _ = await asyncio.wait(downloads, timeout=2)
    round_trips = [one.result() for one in done if one.exception() is None]
    report = {"bins": bins, "round_trips_ms": round_trips, "ping_ms": ping_ms}
    print(json.dumps(report), flush=True)


def main() -> None:
    """Be the end that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=("serve", "get"))
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--control", default="reno")
    parser.add_argument("--connections", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.role == "serve":
        asyncio.run(_serve(arguments.address, arguments.port, arguments.control))
    else:
        asyncio.run(_get(arguments.address, arguments.port, arguments.connections))


if __name__ == "__main__":
    main()
