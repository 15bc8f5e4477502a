"""How long tools/bench page says that a page takes; the browser's own time is measured only."""

from __future__ import annotations

import pytest
from benches.page import VERSIONS, predicted_s

from pybpfthrottle.conditions.profiles import Profile


def profile(rate: str, delay: str) -> Profile:
    """A network with a rate and a delay."""
    return Profile.of("mine", {"download": rate, "delay": delay})


@pytest.mark.parametrize(
    ("version", "round_trips"),
    # To connect, with TLS, for the page, and for 10, 20, 40, 80 and 160 packets.
    [("1.1", 1 + 1 + 1 + 3), ("2", 1 + 1 + 1 + 5), ("3", 1 + 1 + 5)],
)
def test_a_page_takes_its_round_trips_where_the_rate_is_high(
    version: str, round_trips: int
) -> None:
    """Of HTTP/1.1 each connection brings 35 packets, five of them after a further round trip."""
    found = predicted_s(profile("100gbit", "100ms"), VERSIONS[version])
    assert found == pytest.approx(round_trips * 0.1, rel=0.001)


def test_a_page_takes_its_bytes_where_the_delay_is_short() -> None:
    """300 KB at 100 KB/s, whatever the version is."""
    for version in VERSIONS.values():
        assert predicted_s(profile("800kbit", "0.1ms"), version) == pytest.approx(3, rel=0.02)


def test_a_slow_start_leaves_a_line_empty_until_its_window_is_large_enough() -> None:
    """At 1 MB/s and 100 ms: 12, 24, 48 and 96 KB leave 88, 76, 52 and 4 ms unused."""
    found = predicted_s(profile("8mbit", "100ms"), VERSIONS["3"])
    assert found == pytest.approx(3 * 0.1 + 0.3 + 0.22, abs=0.01)
