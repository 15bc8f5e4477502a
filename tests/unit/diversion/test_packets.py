"""Packets are split, translated, damaged and framed as the kernel would expect them."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from pybpfthrottle.diversion.packets import Packet, total

ENDS = {
    4: ("192.0.2.1", "198.51.100.7"),
    6: ("2001:db8::1", "2001:db8:1::7"),
}
SYN, FIN, PSH, ACK, CWR = 0x02, 0x01, 0x08, 0x10, 0x80


def packed(version, who):
    """An address as it is in a packet."""
    return ipaddress.ip_address(who).packed


def made(version, is_tcp, payload, flags=ACK, number=17, port=443):
    """A packet of IP with a right checksum, as one from the wire."""
    ports = struct.pack("!HH", port, 5000)
    if is_tcp:
        body = ports + struct.pack("!IIBBHHH", number, 9, 5 << 4, flags, 500, 0, 0)
    else:
        body = ports + struct.pack("!HH", 8 + len(payload), 0)
    body += payload
    kind = 6 if is_tcp else 17
    ends = b"".join(packed(version, who) for who in ENDS[version])
    pseudo = ends + struct.pack("!II", len(body), kind)
    at = 16 if is_tcp else 6
    body = bytearray(body)
    struct.pack_into("!H", body, at, ~total(pseudo + body) & 0xFFFF)
    if version == 4:
        head = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 99, 0, 64, kind, 0))
        head += ends
        struct.pack_into("!H", head, 10, ~total(head) & 0xFFFF)
    else:
        head = struct.pack("!IHBB", 6 << 28, len(body), kind, 64) + ends
    return bytearray(head) + body


def is_right(data):
    """Whether the checksums of a whole packet are right."""
    version = data[0] >> 4
    at = 20 if version == 4 else 40
    kind = data[9] if version == 4 else data[6]
    ends = data[12:20] if version == 4 else data[8:40]
    body = data[at:]
    fits = version == 6 or total(data[:20]) == 0xFFFF
    return fits and total(bytes(ends) + struct.pack("!II", len(body), kind) + body) == 0xFFFF


def test_a_sum_is_that_of_its_words():
    """With the carry added back, and zeros behind an odd number of bytes."""
    assert total(b"\xff\xff\x00\x02") == 2
    assert total(b"\x01") == 0x0100
    assert total(b"") == total(b"\0\0") == 0
    assert total(b"\xff\xff") == 0xFFFF


@pytest.mark.parametrize("is_tcp", [True, False])
@pytest.mark.parametrize("version", [4, 6])
def test_what_was_put_together_is_split(version, is_tcp):
    """Each part has its length, its number and its flags; nothing is lost or twice."""
    payload = bytes(range(250)) * 10
    whole = Packet(made(version, is_tcp, payload, ACK | PSH | FIN | CWR), 1000)
    assert whole.count == 3
    parts = list(whole.split())
    assert [len(one.data) - one.header for one in parts] == [1000, 1000, 500]
    assert b"".join(bytes(one.data[one.header :]) for one in parts) == payload
    for number, one in enumerate(parts):
        one._finish()
        assert is_right(one.data)
        if version == 4:
            assert struct.unpack_from("!HH", one.data, 2) == (len(one.data), 99 + number)
        if is_tcp:
            assert struct.unpack_from("!I", one.data, one.at + 4)[0] == 17 + 1000 * number
    if is_tcp:
        flags = [one.data[one.at + 13] for one in parts]
        assert flags == [ACK | CWR, ACK, ACK | PSH | FIN]


def test_sequence_numbers_go_round():
    """A part behind the largest number has a small one."""
    whole = Packet(made(4, True, bytes(2000), number=2**32 - 500), 1000)
    numbers = [struct.unpack_from("!I", one.data, 24)[0] for one in whole.split()]
    assert numbers == [2**32 - 500, 500]


@pytest.mark.parametrize("is_tcp", [True, False])
@pytest.mark.parametrize("version", [4, 6])
def test_a_translated_packet_stays_right(version, is_tcp):
    """And one that was wrong stays wrong: the kernel is to find that out."""
    ends = [packed(version, who) for who in ENDS[version]]
    wanted = [bytes([*ends[0][:-1], 200]), bytes([*ends[1][:-1], 201])]
    for is_wrong in (False, True):
        packet = Packet(made(version, is_tcp, b"odd", ACK), 0)
        assert not packet.is_partial
        packet.data[-1] ^= is_wrong
        packet.translate(*wanted, struct.pack("!HH", 8080, 1))
        assert is_right(packet.data) is not is_wrong
        assert b"".join(wanted) in packet.data
        assert struct.unpack_from("!HH", packet.data, packet.at) == (8080, 1)


def test_udp_without_a_checksum_stays_without():
    """As IPv4 allows."""
    data = made(4, False, b"some")
    data[26:28] = b"\0\0"
    packet = Packet(data, 0)
    packet.translate(bytes(4), bytes(4), bytes(4))
    assert packet.checksum == 0


@pytest.mark.parametrize("is_tcp", [True, False])
@pytest.mark.parametrize("version", [4, 6])
def test_a_damaged_packet_is_wrong_by_one_bit(version, is_tcp):
    """Also one whose checksum was not calculated yet."""
    right = made(version, is_tcp, b"payload")
    for is_partial in (False, True):
        packet = Packet(bytearray(right), 0, is_partial)
        packet.damage(lambda bits: bits - 1)
        assert packet.data[-1] == right[-1] ^ 1 << 7
        packet.data[-1] ^= 1 << 7
        assert packet.data == right
        assert packet.frame(bytes(6), 0xD001, 2)[:10] == bytes(10)


def test_a_frame_says_where_it_goes_and_what_is_missing():
    """The device, the tag, and what the kernel has to calculate and to cut."""
    packet = Packet(made(4, True, bytes(3000), ACK | CWR), 1000)
    frame = packet.frame(b"abcdef", 0xD004, 0x010203)
    kind = 1 | 0x80
    assert struct.unpack_from("=BBHHHH", frame) == (1, kind, 14 + 40, 1000, 14 + 20, 16)
    assert frame[10:24] == b"abcdef\x02\xd0\x04\x01\x02\x03\x08\x00"
    assert frame[24:] == packet.data
    assert packet.checksum == packet._of_addresses()


def test_a_checksum_that_was_never_calculated_is_recognised():
    """The kernel's own packets have the sum of the addresses there."""
    data = made(6, False, b"data")
    packet = Packet(bytearray(data), 0)
    assert not packet.is_partial
    struct.pack_into("!H", data, 46, packet._of_addresses())
    assert Packet(data, 0).is_partial


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("payload", [bytes(11), bytes(2) + b"\x81\x83" + bytes(20)])
@pytest.mark.parametrize(("port", "is_tcp"), [(53, False), (53, True), (54, False)])
def test_an_answer_of_a_name_server_can_fail(version, payload, port, is_tcp):
    """It is by UDP, from its port, with a whole header; of that the code changes, nothing else."""
    before = made(version, is_tcp, payload, port=port)
    packet = Packet(bytearray(before), 0)
    is_answer = port == 53 and not is_tcp and len(payload) > 12
    assert packet.fail_answer() == is_answer
    if is_answer:
        assert packet.data[packet.header + 2 : packet.header + 4] == b"\x81\x82"
        assert packet.data[packet.header + 4 :] == before[packet.header + 4 :]
    else:
        assert packet.data == before
    assert is_right(packet.data)
