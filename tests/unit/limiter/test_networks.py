"""Which addresses a limit is for."""

from __future__ import annotations

import ipaddress
import struct

import pytest

from pybpfthrottle import networks
from pybpfthrottle.errors import LimitError
from pybpfthrottle.model import Traffic

ON_LINK = ("203.0.113.0/24", "2001:db8:1::/64")
INTERNET = ["8.8.8.8", "100.128.0.1", "172.32.0.1", "2606:4700::1111", "223.255.255.255"]
LOCAL = [
    *("10.1.2.3", "100.64.0.1", "169.254.7.7", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("224.0.0.251", "239.1.1.1", "255.255.255.255", "fc00::1", "fd12::1", "fe80::1", "ff02::fb"),
    *("203.0.113.9", "2001:db8:1::9"),
]


def limited(traffic: Traffic, *addresses: str) -> list[bool]:
    """Whether each is."""
    return [networks.limits(traffic, ipaddress.ip_address(one)) for one in addresses]


def test_all_is_all() -> None:
    """And the kernel has nothing to look up."""
    assert all(limited(Traffic(), *INTERNET, *LOCAL))
    assert networks.decisions(Traffic()) == {}


@pytest.mark.parametrize("kind", ["internet", "local"])
def test_each_address_is_of_one_kind(kind: str) -> None:
    """A machine's own networks are local, even with public addresses."""
    traffic = Traffic(kind=kind, on_link=ON_LINK)
    assert set(limited(traffic, *INTERNET)) == {kind == "internet"}
    assert set(limited(traffic, *LOCAL)) == {kind == "local"}


def test_of_several_networks_the_smallest_decides() -> None:
    """Whatever the order in which they are given, and whatever the kind."""
    only = networks.traffic(to=["192.0.2.0/24"], but=["192.0.2.64/26", "192.0.2.1"])
    assert limited(only, "192.0.2.9", "192.0.2.65", "192.0.2.1", "8.8.8.8", "::1") == [
        *(True, False, False, False, False)
    ]
    nas = Traffic(kind="internet", to=("0.0.0.0/0", "192.168.1.5"), but=("8.8.8.0/24",))
    assert limited(nas, "192.168.1.5", "192.168.1.6", "8.8.8.8", "9.9.9.9", "2606::1") == [
        *(True, False, False, True, False)
    ]


@pytest.mark.parametrize(
    ("text", "bits", "address"),
    [
        ("192.0.2.0/24", 120, "::ffff:192.0.2.0"),
        ("0.0.0.0/0", 96, "::ffff:0:0"),
        ("192.0.2.77", 128, "::ffff:192.0.2.77"),
        ("192.0.2.77/24", 120, "::ffff:192.0.2.0"),
        ("::ffff:10.0.0.0/104", 104, "::ffff:10.0.0.0"),
        ("2001:db8::/32", 32, "2001:db8::"),
        ("::/0", 0, "::"),
    ],
)
def test_a_key_has_ipv4_as_ipv6_has_it_mapped(text: str, bits: int, address: str) -> None:
    """For the kernel's trie, which has one kind of address."""
    key = networks.key(networks.parse(text))
    assert key == struct.pack("=I", bits) + ipaddress.IPv6Address(address).packed


@pytest.mark.parametrize("text", ["", "example.org", "10.0.0.0/33", "1.2.3", "10.0.0.0/8/8"])
def test_what_is_no_network_is_refused(text: str) -> None:
    """With what would be one."""
    with pytest.raises(LimitError, match="is not a network: give an address, or a network such as"):
        networks.traffic(to=[text])


def test_more_than_the_kernel_holds_is_refused() -> None:
    """Instead of limiting some of them."""
    many = [f"10.{number >> 8}.{number & 255}.0/24" for number in range(5000)]
    with pytest.raises(LimitError, match="5002 networks are too many: at most 4000"):
        networks.decisions(networks.traffic(but=many))


def test_an_unknown_kind_is_refused() -> None:
    """With the known ones."""
    with pytest.raises(LimitError, match="unknown traffic 'lan': choose from all, internet, local"):
        networks.traffic("lan")
