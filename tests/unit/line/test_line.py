"""What the line's keeper does to packets, and what is found out for a namespace of its own."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from pybpfthrottle import wayout
from pybpfthrottle.conditions.model import Conditions, Impairment, Loss
from pybpfthrottle.diversion import impairing
from pybpfthrottle.diversion.tally import Tally
from pybpfthrottle.errors import BackendError, NamespaceError
from pybpfthrottle.line import keeper, resolver
from pybpfthrottle.line.keeper import Way
from pybpfthrottle.linux import run_files, tuntap
from pybpfthrottle.model import Direction

PLAIN = bytes(10)
UDP = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 1, 0, 64, 17, 0, b"\x7f\0\0\1", b"\x7f\0\0\1")
ANSWER = PLAIN + UDP + struct.pack("!HHHH", 53, 5000, 20, 0) + bytes(12)


@pytest.mark.parametrize(
    ("payload", "segment", "count"), [(0, 0, 1), (3000, 1000, 3), (3001, 1000, 4)]
)
def test_a_packet_counts_as_many_as_it_would_be_on_a_wire(payload, segment, count):
    """By the payload of TCP, whose header may have options."""
    header = struct.pack("=BBHHHH", 1, 1 if segment else 0, 999, segment, 20, 16)
    tcp = bytes(12) + b"\x80" + bytes(19)
    assert keeper._count(header + UDP + tcp + bytes(payload)) == count


@pytest.fixture
def way(monkeypatch):
    """A function that makes a way between two pipes; what is read at its end is yielded with it."""
    monkeypatch.setattr(tuntap, "set_offload", lambda fd, offload: None)
    fds, tallies = [], []

    def make(impairment):
        for _ in range(2):
            fds.extend(os.pipe2(os.O_NONBLOCK))
        source, to, at_end, sink = fds[-4:]
        tallies.append(Tally.create())
        return Way(source, sink, tallies[-1], impairing.to_json(impairment)), to, at_end

    yield make
    for fd in fds:
        os.close(fd)
    for tally in tallies:
        tally.close()


def passed(made, frame):
    """What comes out of a way that a packet is written to, or None."""
    one, to, at_end = made
    os.write(to, frame)
    one.take()
    one.give()
    try:
        return os.read(at_end, 9999)
    except BlockingIOError:
        return None


def test_a_packet_passes_as_it_came_if_nothing_is_asked_for(way):
    """With what the kernel has still to do to it."""
    made = way(Impairment())
    assert passed(made, ANSWER) == ANSWER
    assert made[0].tally.injected().delivered == 1


def test_a_late_packet_waits(way):
    """And the way says when it is due."""
    made = way(Impairment(delay_s=60))
    assert passed(made, ANSWER) is None
    assert made[0].due_ns > 0


def test_each_second_packet_is_lost(way):
    """And counted."""
    made = way(Impairment(loss=Loss.every(2)))
    assert [passed(made, ANSWER) is None for _ in range(4)] == [False, True, False, True]
    assert made[0].tally.injected().lost == 2


def test_a_damaged_packet_has_one_other_bit_behind_its_header(way):
    """And the kernel is told to verify its checksum."""
    made = way(Impairment(corrupt=1.0))
    asked = b"\1" + ANSWER[1:]
    found = passed(made, asked)
    wrong = int.from_bytes(found[10:], "big") ^ int.from_bytes(ANSWER[10:], "big")
    assert bin(wrong).count("1") == 1
    assert found[:30] == ANSWER[:30]


def test_the_answer_of_a_name_server_says_that_it_has_failed(way):
    """Other packets pass as they are."""
    made = way(Impairment(servfail=True))
    assert passed(made, ANSWER)[10 + 28 + 3] & 15 == 2
    other = ANSWER[:30] + b"\0\x50" + ANSWER[32:]
    assert passed(made, other) == other


def test_each_direction_has_half_of_the_delay_and_decides_by_itself():
    """The losses stay those of each direction."""
    given = Conditions(
        Impairment(delay_s=0.08, jitter_s=0.02, loss=Loss.chance(0.1), reorder=0.1, seed=3),
        Impairment(loss=Loss.chance(0.2), seed=3),
        dns="servfail",
    ).both_ways()
    down, up = (given.impairment(direction) for direction in Direction)
    assert (down.delay_s, down.jitter_s, up.delay_s, up.jitter_s) == (0.04, 0.01, 0.04, 0.01)
    assert (down.loss, up.loss) == (Loss.chance(0.1), Loss.chance(0.2))
    assert (down.servfail, up.servfail, up.reorder) == (True, False, 0.1)
    assert down.seed != up.seed


@pytest.mark.parametrize(
    ("usual", "upstream", "instead", "warns"),
    [
        ("nameserver 192.0.2.1\n", "", False, False),
        ("nameserver 127.0.0.53\nnameserver 192.0.2.1\n", "", False, False),
        ("# none\nnameserver ::1\n", "nameserver fe80::1%eth0\n", True, False),
        ("nameserver 127.0.0.1\n", "nameserver 127.0.0.1\n", False, True),
        ("nameserver\nnameserver x\n", "", False, True),
    ],
)
def test_name_servers_of_the_loopback_device_are_replaced(
    tmp_path, usual, upstream, instead, warns
):
    """By those that systemd-resolved asks, if there are any."""
    files = [tmp_path / "usual", tmp_path / "upstream"]
    for file, text in zip(files, (usual, upstream)):
        file.write_text(text)
    found = resolver.choose(*map(str, files))
    assert found.instead == (str(files[1]) if instead else None)
    assert bool(found.note) is warns


OTHER = json.dumps(
    {"owner": [1, 2, 3], "namespace": 4, "networks": ["x"], "settings": [], "forwarding": "0"}
)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"owner": [1]}', json.dumps({"owner": "abc"}), OTHER]
)
def test_a_broken_record_of_a_way_out_is_none(monkeypatch, tmp_path: Path, text):
    """As a crash of the machine may leave it."""
    monkeypatch.setattr(run_files, "DIRECTORY", str(tmp_path))
    (tmp_path / f"abc{run_files.WAYS_OUT}").write_text(text)
    assert wayout.abandoned() == []


def test_a_table_that_cannot_be_removed_stays_known(monkeypatch, tmp_path: Path):
    """The next start removes it."""
    monkeypatch.setattr(run_files, "DIRECTORY", str(tmp_path))
    way = wayout.begin("abc")._replace(namespace=0)

    def fail(self, name):
        raise BackendError("nft takes too long")

    with monkeypatch.context() as patched:
        patched.setattr(wayout.Nft, "table", fail)
        wayout.end(way)
        assert run_files.stems(run_files.WAYS_OUT) == ["abc"]
    wayout.end(way)
    assert run_files.stems(run_files.WAYS_OUT) == []


def test_without_nft_no_way_out_is_begun(monkeypatch, tmp_path: Path):
    """Its record would stay: nobody could say that its table is gone."""
    monkeypatch.setattr(run_files, "DIRECTORY", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NamespaceError, match="nft is not installed: install the package nftables"):
        wayout.begin("abc")
    assert run_files.stems(run_files.WAYS_OUT) == []


def test_the_record_of_a_way_out_is_read_as_it_was_written(monkeypatch, tmp_path: Path):
    """And forgotten by its end."""
    monkeypatch.setattr(run_files, "DIRECTORY", str(tmp_path))
    way = wayout.begin("abc")
    assert wayout.WayOut.read("abc") == way
    other = wayout.begin("def")
    assert not {*way.networks} & {*other.networks}
    assert str(way.ends[0].outer.ip).startswith("198.19.")
    for one in (way, other):
        wayout.end(one._replace(namespace=0))
    assert run_files.stems(run_files.WAYS_OUT) == []


def test_the_keeper_waits_for_an_owner_that_takes_long_to_end(monkeypatch, tmp_path: Path):
    """As one does that was killed on a busy machine, and for nobody once all is restored."""
    monkeypatch.setattr(run_files, "DIRECTORY", str(tmp_path))
    record = tmp_path / f"abc{run_files.WAYS_OUT}"
    record.write_text("{}")
    now_s = 0.0

    def sleep(wait_s):
        nonlocal now_s
        now_s += wait_s

    def tidy_up():
        if now_s >= 5:
            record.unlink()
        return []

    monkeypatch.setattr(keeper.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(keeper.time, "sleep", sleep)
    monkeypatch.setattr(wayout, "tidy_up", tidy_up)
    keeper._tidy_up("abc")
    assert not record.exists()
    assert now_s < 6


ADVERTISED = ["0" * 32, "00", "0" * 32, "00", "0" * 32, "00000400", "1", "0", "00450003", "eth0"]
STATIC = [*ADVERTISED[:8], "00000003", "eth0"]


@pytest.mark.parametrize(
    ("addresses", "route", "forwards", "why"),
    [
        ({"192.0.2.1", "::1", "fe80::1"}, STATIC, "0", "no IPv6 address"),
        ({"2001:db8::1"}, ADVERTISED, "0", "router advertisements"),
        ({"2001:db8::1"}, ADVERTISED, "1", ""),
        ({"2001:db8::1"}, STATIC, "0", ""),
    ],
)
def test_ipv6_is_left_out_where_it_would_be_lost(monkeypatch, addresses, route, forwards, why):
    """A machine that forwards packets does not listen to router advertisements."""
    monkeypatch.setattr(wayout.netns, "own_addresses", lambda: addresses)
    monkeypatch.setattr(wayout, "_table", lambda path: [route])
    monkeypatch.setattr(wayout, "_get", lambda path: forwards)
    assert why in wayout.why_no_ipv6()
    assert bool(why) == bool(wayout.why_no_ipv6())
