"""What TCP tells of a connection: getsockopt(TCP_INFO). Source: include/uapi/linux/tcp.h."""

from __future__ import annotations

import ctypes
import socket
from typing import NamedTuple

_U8, _U32, _U64 = ctypes.c_uint8, ctypes.c_uint32, ctypes.c_uint64
_NO_LIMIT = (1 << 64) - 1


class _TcpInfo(ctypes.Structure):
    _fields_ = (
        *((name, _U8) for name in ("state", "ca_state", "retransmits", "probes", "backoff")),
        *((name, _U8) for name in ("options", "wscale", "delivery_rate_app_limited")),
        *((name, _U32) for name in ("rto", "ato", "snd_mss", "rcv_mss")),
        *((name, _U32) for name in ("unacked", "sacked", "lost", "retrans", "fackets")),
        *((name, _U32) for name in ("last_data_sent", "last_ack_sent")),
        *((name, _U32) for name in ("last_data_recv", "last_ack_recv")),
        *((name, _U32) for name in ("pmtu", "rcv_ssthresh", "rtt", "rttvar", "snd_ssthresh")),
        *((name, _U32) for name in ("snd_cwnd", "advmss", "reordering", "rcv_rtt", "rcv_space")),
        ("total_retrans", _U32),
        *((name, _U64) for name in ("pacing_rate", "max_pacing_rate")),
        *((name, _U64) for name in ("bytes_acked", "bytes_received")),
        *((name, _U32) for name in ("segs_out", "segs_in", "notsent_bytes", "min_rtt")),
        *((name, _U32) for name in ("data_segs_in", "data_segs_out")),
        *((name, _U64) for name in ("delivery_rate", "busy_time")),
        *((name, _U64) for name in ("rwnd_limited", "sndbuf_limited")),
        *((name, _U32) for name in ("delivered", "delivered_ce")),
        *((name, _U64) for name in ("bytes_sent", "bytes_retrans")),
    )


class Sent(NamedTuple):
    """What a sender's connection has sent, repeats included; a pacing limit of 0 is none."""

    bytes_sent: int
    bytes_retransmitted: int
    max_pacing_bytes_per_s: int


def sent(connection: socket.socket) -> Sent:
    """Ask for it. Linux 4.19: older kernels leave the counts 0."""
    size = ctypes.sizeof(_TcpInfo)
    data = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
    info = _TcpInfo.from_buffer_copy(data.ljust(size, b"\0"))
    paced = 0 if info.max_pacing_rate == _NO_LIMIT else info.max_pacing_rate
    return Sent(info.bytes_sent, info.bytes_retrans, paced)
