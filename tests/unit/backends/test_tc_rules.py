"""What is asked of tc and nft, and what is made of their answers."""

from __future__ import annotations

import re
import socket

import pytest

from pybpfthrottle.backends.nft import Member
from pybpfthrottle.backends.tc import htb, ifb, police, shaper
from pybpfthrottle.backends.tc.ingress import nodes
from pybpfthrottle.backends.tc.iproute import devices
from pybpfthrottle.backends.tc.sockets import Flow, distinct, flows_of
from pybpfthrottle.errors import BackendError
from pybpfthrottle.linux.netns import Listed
from pybpfthrottle.model import BLOCKED, MAX_RATE, Counters, Rate

RATE = Rate.parse("1M")
ANY = "0.0.0.0"  # noqa: S104 - nothing is bound
TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP

DEFAULT = {"dst": "default", "gateway": "10.0.0.1", "dev": "eth0"}
BY_WIRELESS = {"dst": "default", "gateway": "10.1.0.1", "dev": "wlan0", "metric": 600}
CONNECTED = {"dst": "10.0.0.0/24", "dev": "eth0"}


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        pytest.param([[DEFAULT, BY_WIRELESS], []], ["eth0"], id="the best metric"),
        pytest.param([[BY_WIRELESS], [DEFAULT]], ["wlan0", "eth0"], id="one of each version"),
        pytest.param([[CONNECTED, {**CONNECTED, "dev": "lo"}]], ["eth0"], id="no default route"),
        pytest.param(
            [[{"dst": "default", "nexthops": [{"dev": "a"}, {"dev": "b"}]}]], ["a", "b"], id="hops"
        ),
        pytest.param([[{"type": "unreachable", "dst": "default", "dev": "lo"}]], [], id="nowhere"),
        pytest.param([], [], id="none"),
    ],
)
def test_packets_are_limited_where_the_best_default_routes_lead(routes, expected):
    """Each version of IP has its own; without any, all routes count."""
    assert devices(routes) == expected


def test_a_class_has_room_for_the_largest_packets():
    """A bucket or a queue that is smaller would never let one pass."""
    slow = Rate(1000)
    assert shaper.burst_bytes(slow) >= 64 * 1024
    assert shaper.queue_bytes(slow) >= 2 * 64 * 1024
    assert shaper.shape("wire", 26, RATE)[0] == (
        "class replace dev wire parent 7b0f: classid 7b0f:1a htb rate 1048576bps ceil 1048576bps"
        " burst 65536 cburst 65536 quantum 60000"
    )


@pytest.mark.parametrize("module", [htb, ifb, police], ids=lambda one: one.KIND.backend)
def test_what_tc_cannot_block_is_refused(module):
    """With what can; all rates are accepted, and no limit."""
    for rate in (None, RATE):
        module.KIND.check(rate)
    with pytest.raises(BackendError, match=r"cannot block: .*; use ebpf or nftables"):
        module.KIND.check(BLOCKED)


def test_no_limit_is_the_highest_rate():
    """The class stays, so that the counters continue."""
    assert f"rate {MAX_RATE.bytes_per_s}bps" in shaper.shape("wire", 1, None)[0]
    assert f"rate {MAX_RATE.bytes_per_s}bps" in police.police(None)
    # Sizes are 32 bits in tc.
    assert max(map(int, re.findall(r"(?:burst|limit) (\d+)", police.police(None)))) < 1 << 32
    assert shaper.queue_bytes(MAX_RATE) < 1 << 32


QUEUE = {
    "kind": "bfifo", "handle": "8001:", "dev": "wire", "parent": "7b0f:1a",
    "bytes": 3000, "packets": 2, "drops": 3, "backlog": 1500, "qlen": 1,
}  # fmt: skip


def test_a_queue_counts_what_was_sent_what_waits_and_what_was_dropped():
    """Dropped bytes are estimated: the kernel counts packets only."""
    assert shaper.counters([QUEUE], "wire", 0x1A) == Counters(6, 6, 9000, 3, 4500)
    assert shaper.counters([QUEUE], "wire", 2) is None
    assert shaper.counters([QUEUE], "eth0", 0x1A) is None


def test_counters_of_devices_are_added():
    """Of none they are zero."""
    assert shaper.total(Counters(1, 2, 3, 4, 5), Counters(1, 1, 1, 1, 1)) == Counters(2, 3, 4, 5, 6)
    assert shaper.total() == Counters()


def test_classes_are_told_by_the_queues_below_them():
    """There is no JSON for classes in iproute2 6.1."""
    others = {"kind": "pfifo", "handle": "7:", "dev": "wire", "parent": "1:2"}
    assert shaper.minors([QUEUE, others]) == {0x1A}
    assert shaper.minors([QUEUE], "eth0") == set()


def test_a_root_is_the_kernels_own_ours_or_somebody_elses():
    """By its handle; the kernel restores its own when ours goes."""
    roots = [
        {"kind": "noqueue", "handle": "0:", "dev": "a", "root": True},
        {"kind": "htb", "handle": "7b0f:", "dev": "b", "root": True},
        {"kind": "htb", "handle": "1:", "dev": "c", "root": True},
    ]
    assert [shaper.is_default(one) for one in roots] == [True, False, False]
    assert [shaper.is_ours(one) for one in roots] == [False, True, False]
    assert shaper.root_of(roots, "c") is roots[2]
    assert shaper.root_of(roots, "d") is None


def test_only_packets_to_limited_devices_get_a_priority():
    """Those of other devices keep their own."""
    chain, comment = "inet pybpfthrottle-abcdef upload", 'comment "pybpfthrottle abcdef"'
    lines = list(htb.commands("abcdef", ["a", "b"], [Member(2, "x/y")], 26))
    assert lines[2:] == [
        f'add rule {chain} oifname != "a" oifname != "b" accept {comment}',
        f'add rule {chain} socket cgroupv2 level 2 "x/y" meta priority set 7b0f:1a {comment}',
    ]


@pytest.mark.parametrize(
    ("protocol", "ends", "expected"),
    [
        (TCP, (("10.0.0.1", 9), ("10.0.0.2", 80)), [Flow(4, TCP, "10.0.0.1", 9, "10.0.0.2", 80)]),
        (TCP, ((ANY, 80), (ANY, 0)), [Flow(4, TCP, "", 80)]),
        (UDP, (("::", 53), ("::", 0)), [Flow(4, UDP, "", 53), Flow(6, UDP, "", 53)]),
        (UDP, (("fd00::1", 53), ("::", 0)), [Flow(6, UDP, "fd00::1", 53)]),
        (UDP, (("::", 0), ("::", 0)), []),
    ],
    ids=["connected", "listens", "both versions", "bound", "not bound"],
)
def test_a_socket_has_the_flows_that_it_can_receive(protocol, ends, expected):
    """By the addresses and ports that it has."""
    assert list(flows_of(protocol, Listed(1, 1, 1, ends))) == expected


def test_accepted_connections_need_no_filter_of_their_own():
    """The listening socket's port includes them."""
    listens, bound = Flow(4, TCP, "", 80), Flow(4, TCP, "10.0.0.1", 81)
    accepted = Flow(4, TCP, "10.0.0.1", 80, "10.0.0.2", 999)
    same = accepted._replace(local_port=81)
    other = accepted._replace(local_port=82)
    assert distinct([listens, bound, accepted, same, other]) == {listens, bound, other}


def test_a_filter_matches_all_that_is_known_of_a_flow():
    """In the language of u32."""
    assert Flow(4, UDP, "", 53).match == "match ip protocol 17 0xff match ip dport 53 0xffff"
    assert Flow(6, TCP, "fd00::1", 9, "fd00::2", 80).match == (
        "match ip6 protocol 6 0xff match ip6 dport 9 0xffff match ip6 dst fd00::1/128"
        " match ip6 src fd00::2/128 match ip6 sport 80 0xffff"
    )


def test_filters_keep_their_numbers():
    """New ones get free numbers, of which each version of IP has its own."""
    old = [Flow(4, TCP, "", port) for port in (1, 2, 3)]
    before = ifb.numbered(old, {})
    assert sorted(before.values()) == [1, 2, 3]
    new = Flow(4, TCP, "", 4)
    other_version = new._replace(version=6)
    after = ifb.numbered([old[2], new, other_version], before)
    assert after == {old[2]: before[old[2]], new: 1, other_version: 1}


def test_of_too_many_flows_those_of_any_remote_address_have_filters():
    """The kernel has 4095 numbers."""
    many = [Flow(4, TCP, "10.0.0.1", port, "10.0.0.2", 80) for port in range(1, 5000)]
    wide = Flow(4, TCP, "", 9999)
    numbers = ifb.numbered([*many, wide], {})
    assert len(numbers) == 4000
    assert wide in numbers


def test_the_kernels_handles_are_found_by_number():
    """Hash tables are listed beside the filters in them."""
    listing = [
        {"protocol": "ip", "pref": 31000},
        {"protocol": "ip", "pref": 31000, "options": {"fh": "800:"}},
        {"protocol": "ip", "pref": 31000, "options": {"fh": "800::1f"}},
        {"protocol": "ipv6", "pref": 31001, "options": {"fh": "801::2"}},
    ]
    assert nodes(listing) == {(4, 31): "800::1f", (6, 2): "801::2"}
