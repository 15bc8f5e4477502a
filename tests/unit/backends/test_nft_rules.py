"""What is written into nftables for a throttle, and what is made of its answers."""

from __future__ import annotations

import pytest

from pybpfthrottle.backends.nft import Member
from pybpfthrottle.backends.nftables import rules
from pybpfthrottle.model import BLOCKED, Counters, Direction, Rate

DOWNLOAD, UPLOAD = Direction.DOWNLOAD, Direction.UPLOAD
MEMBER = Member(2, "../../../proc/7/fd/3")
COUNTED = Counters(9, 7, 900, 2, 300)


def listing(direction="download", comment="pybpfthrottle k3x9fd", members=1):
    """What nft 1.0.6 prints of a throttle's table."""
    table = {"family": "inet", "table": "pybpfthrottle-k3x9fd"}
    rule = {"rule": {**table, "chain": direction, "comment": comment, "expr": []}}
    return [
        {"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
        {"table": {"family": "inet", "name": "pybpfthrottle-k3x9fd", "handle": 1}},
        {"counter": {**table, "name": f"{direction}-seen", "packets": 9, "bytes": 999}},
        {"counter": {**table, "name": f"{direction}-limited", "packets": 7, "bytes": 900}},
        {"counter": {**table, "name": f"{direction}-dropped", "packets": 2, "bytes": 300}},
        {"chain": {**table, "name": f"limit-{direction}"}},
        {"chain": {**table, "name": direction, "hook": "input", "prio": 150}},
        {"rule": {**table, "chain": f"limit-{direction}", "comment": comment, "expr": []}},
        *[rule] * members,
    ]


def test_a_download_is_limited_at_the_input_hook():
    """The whole of a table: counters, the limit that all cgroups share, and one rule for each."""
    counters = {DOWNLOAD: COUNTED}
    assert rules.create("k3x9fd", {DOWNLOAD: Rate(5000)}, [MEMBER], counters=counters) == (
        "create table inet pybpfthrottle-k3x9fd\n"
        "add counter inet pybpfthrottle-k3x9fd download-seen { packets 9 bytes 0 ; }\n"
        "add counter inet pybpfthrottle-k3x9fd download-limited { packets 7 bytes 900 ; }\n"
        "add counter inet pybpfthrottle-k3x9fd download-dropped { packets 2 bytes 300 ; }\n"
        "add chain inet pybpfthrottle-k3x9fd limit-download\n"
        "add chain inet pybpfthrottle-k3x9fd download"
        " { type filter hook input priority 150 ; policy accept ; }\n"
        "add rule inet pybpfthrottle-k3x9fd limit-download counter name download-seen"
        ' comment "pybpfthrottle k3x9fd"\n'
        'add rule inet pybpfthrottle-k3x9fd limit-download iifname "lo" accept'
        ' comment "pybpfthrottle k3x9fd"\n'
        "add rule inet pybpfthrottle-k3x9fd limit-download counter name download-limited"
        " limit rate over 5000 bytes/second burst 65536 bytes counter name download-dropped drop"
        ' comment "pybpfthrottle k3x9fd"\n'
        "add rule inet pybpfthrottle-k3x9fd download"
        ' socket cgroupv2 level 2 "../../../proc/7/fd/3" goto limit-download'
        ' comment "pybpfthrottle k3x9fd"\n'
    )  # fmt: skip


def test_an_upload_is_limited_at_the_output_hook():
    """And by the device that the packets leave by."""
    text = rules.create("k3x9fd", {UPLOAD: Rate(5000)}, [MEMBER])
    assert "hook output" in text
    assert 'oifname "lo" accept' in text
    assert "download" not in text


def test_loopback_is_limited_only_if_that_is_asked_for():
    """Then no rule looks at the device."""
    text = rules.create("k3x9fd", {UPLOAD: Rate(5000)}, [MEMBER], loopback=True)
    assert "ifname" not in text


def test_a_lifted_limit_still_counts():
    """Without a rate nothing is dropped; the counters are those from before."""
    assert rules.set_limit("k3x9fd", UPLOAD, None, loopback=True) == (
        "flush chain inet pybpfthrottle-k3x9fd limit-upload\n"
        "add rule inet pybpfthrottle-k3x9fd limit-upload counter name upload-seen"
        ' comment "pybpfthrottle k3x9fd"\n'
        "add rule inet pybpfthrottle-k3x9fd limit-upload counter name upload-limited"
        ' comment "pybpfthrottle k3x9fd"\n'
    )


def test_what_is_blocked_lets_acknowledgements_pass():
    """TCP packets without data, by the length of each possible header, and nothing else."""
    text = rules.set_limit("k3x9fd", UPLOAD, BLOCKED)
    assert " limit rate " not in text
    *others, last = text.splitlines()
    assert " counter name upload-dropped drop " in last
    assert sum("tcp doff 8 accept" in line for line in others) == 2
    assert any(" ip hdrlength 5 ip length 52 tcp doff 8 accept " in line for line in others)
    assert any(" ip6 nexthdr tcp ip6 length 60 tcp doff 15 accept " in line for line in others)


def test_other_cgroups_take_the_place_of_those_before():
    """The limit and its counters stay as they are."""
    text = rules.set_members("k3x9fd", [UPLOAD], [MEMBER, Member(1, "x")])
    assert text.startswith("flush chain inet pybpfthrottle-k3x9fd upload\n")
    assert text.count("add rule") == 2
    assert "counter" not in text


def test_counters_are_read():
    """All packets, and those of them that were dropped."""
    assert rules.read(listing(), [DOWNLOAD], 1) == rules.State({DOWNLOAD: COUNTED}, intact=True)


@pytest.mark.parametrize(
    "changed",
    [
        listing(members=0),
        [one for one in listing() if one.get("rule", {}).get("chain") != "limit-download"],
        [one for one in listing() if "counter" not in one],
    ],
)
def test_a_table_that_somebody_has_emptied_is_not_intact(changed):
    """``nft flush table`` leaves the table, and takes its rules."""
    assert not rules.read(changed, [DOWNLOAD], 1).intact


def test_a_table_is_known_as_ours_by_what_is_in_it():
    """Whatever its name: each rule has our comment, and there is nothing else."""
    assert rules.is_ours(listing(), "k3x9fd")
    assert rules.is_ours(listing("upload"), "k3x9fd")


@pytest.mark.parametrize(
    "foreign",
    [
        listing(comment=""),
        listing(comment="pybpfthrottle other"),
        listing()[:2],
        [*listing(), {"chain": {"name": "mine"}}],
        [*listing(), {"set": {"name": "mine"}}],
        [*listing(), {"counter": {"name": "mine"}}],
    ],
)
def test_a_table_with_anything_else_is_not_ours(foreign):
    """Somebody's own table of this name, or one that somebody has added to, is left alone."""
    assert not rules.is_ours(foreign, "k3x9fd")


def test_the_highest_rate_does_not_overflow_in_the_kernel():
    """It multiplies rate and burst by the nanoseconds of a second, in 64 bits."""
    assert (rules.MAX_RATE.bytes_per_s + rules.BURST_BYTES) * 10**9 < 2**64
