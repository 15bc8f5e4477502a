"""What tools/bench shape makes of what it measured; the measuring itself is a kernel test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from benches import figures, picture, report, shape
from benches.figures import Figures, RoundTrips
from benches.judge import Reports, judge
from benches.line import LineSpec, Way
from benches.methods import METHODS
from benches.ping import Sample
from benches.report import CellResult, Result
from benches.tcp_info import Sent, _TcpInfo
from benches.traffic import Received
from benches.transfer import Bottleneck, Cell, Outcome
from hypothesis import given
from hypothesis import strategies as st

from pybpfthrottle.model import Direction, Rate

SECOND = 100
CELL = Cell(Direction.DOWNLOAD, Rate(1 << 20), 8, "cubic", 20)
FIGURES = Figures(
    ratio=1.0,
    window_min=0.9,
    window_max=1.1,
    retransmitted_percent=0.0,
    inside=RoundTrips(20.0, 21.0, 22.0),
    outside=None,
    fairness=1.0,
    cpu_s_per_gb=None,
    stall_s=0.25,
)


def outcome(**changes):
    """A round's outcome with some figures of its own."""
    return Outcome(FIGURES._replace(**changes), [104857, 104858], 0, [0])


def test_the_ratio_is_over_the_whole_time():
    """What came in two seconds is held against two seconds' allowance."""
    assert figures.ratio([10] * SECOND + [0] * SECOND, 1000) == pytest.approx(0.5)


def test_windows_are_the_whole_seconds_after_the_second_one():
    """Neither the first two seconds count, nor one that is not complete."""
    bins = [99] * 2 * SECOND + [10] * SECOND + [20] * SECOND + [99] * 50
    assert figures.windows(bins, 1000) == pytest.approx([1.0, 2.0])


def test_a_short_transfer_has_no_windows():
    """In two and a half seconds there is no whole second after the second one."""
    assert figures.windows([10] * 250, 1000) == []


@pytest.mark.parametrize(("totals", "index"), [([5, 5, 5], 1.0), ([9, 0, 0], 1 / 3), ([0], None)])
def test_fairness_is_jains_index(totals, index):
    """1 for equal shares, one over their number if one has all, none of nothing."""
    assert figures.fairness(totals) == (index and pytest.approx(index))


def test_a_stall_is_the_longest_of_any_flow():
    """The gap of one flow is not hidden by what others got meanwhile."""
    assert figures.longest_stall_s([[1] * 9, [1, 0, 0, 1, 0, 0, 0, 1, 0]]) == pytest.approx(0.03)


def test_a_flow_that_got_nothing_stalled_all_the_time():
    """A flow without a byte has a stall as long as the transfer."""
    assert figures.longest_stall_s([[1, 1, 1], [0, 0, 0]]) == pytest.approx(0.03)


@given(st.lists(st.floats(0, 1e3), min_size=1), st.floats(0, 100))
def test_a_percentile_is_one_of_the_values(values, percent):
    """So many per cent of the values at least are not above their percentile."""
    found = figures.percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-9


def test_round_trips_are_told_in_milliseconds():
    """The 95th of a hundred samples is the fifth from the top."""
    samples = [number / 1000 for number in range(1, 101)]
    assert figures.round_trips(samples) == pytest.approx((50.0, 95.0, 100.0))
    assert figures.round_trips([]) is None


def test_the_median_is_taken_of_each_figure_by_itself():
    """A round that lacks a figure does not count for it."""
    found = figures.median(
        [
            FIGURES._replace(ratio=1.0, cpu_s_per_gb=None, inside=RoundTrips(1, 5, 9)),
            FIGURES._replace(ratio=3.0, cpu_s_per_gb=2.0, inside=RoundTrips(2, 4, 8)),
            FIGURES._replace(ratio=2.0, cpu_s_per_gb=4.0, inside=RoundTrips(3, 6, 7)),
        ]
    )
    assert (found.ratio, found.cpu_s_per_gb, found.inside) == (2.0, 3.0, (2, 5, 8))
    assert found.outside is None


def test_only_the_time_of_the_transfer_is_judged():
    """What small flows and UDP did before the first byte and after the end does not count."""
    received = Received(begin_s=10.0, bins=[[1000] * SECOND, [3000] * SECOND], cpu_s=1.0)
    samples = [Sample(9.5, 0.9), Sample(10.5, 0.020), Sample(11.5, 0.8)]
    datagrams = [(999, 7000), (1000, 40_000), (1099, 60_000), (1100, 9000)]
    sent = [Sent(100, 1, 0), Sent(300, 3, 0)]
    found = judge(Rate(400_000), Reports(received, sent, samples, [], datagrams))
    assert found.ratio == pytest.approx(1 + 2 * 64 / 400_000)
    assert found.inside == pytest.approx((20, 20, 20))
    assert found.outside is None
    assert found.udp_ratio == pytest.approx(0.25)
    assert found.retransmitted_percent == pytest.approx(1.0)
    assert found.fairness == pytest.approx(0.8)
    assert found.cpu_s_per_gb is None


def test_the_report_has_a_table_for_each_cell():
    """A row has each figure or a dash; failures and what was left out have their reason."""
    rounds = {"police": [outcome(ratio=0.99)], "tbf": [outcome(outside=RoundTrips(1, 2, 3))]}
    cell = CellResult(CELL, rounds, {"htb": "no such thing"})
    result = Result(8, 1, {"nft, upload": "not here"}, [cell])
    text = report.markdown(result)
    assert "### 1.0 MB/s download, 8 flows, cubic, 20 ms" in text
    assert "| police | 0.990 | 0.90 to 1.10 | 0.00 % | 20.0 / 21.0 / 22.0 | - |" in text
    assert "htb failed: no such thing" in text
    assert "- nft, upload: not here" in text


def test_a_cell_says_what_is_unusual_about_its_path():
    """So that two tables of the same limit can be told apart."""
    cell = CELL._replace(lost_percent=1.5, middle_ms=50, link="mtu 9000")
    assert str(cell).endswith("20 ms, 50 ms in the middle, 1.5 % lost, mtu 9000")


def test_a_column_that_nothing_is_in_is_left_out():
    """Without a UDP flow there is no column for one."""
    plain = CellResult(CELL, {"police": [outcome()]})
    beside = CellResult(CELL._replace(udp_percent=50), {"police": [outcome(udp_ratio=0.5)]})
    assert "| UDP |" not in report.markdown(Result(8, 1, {}, [plain]))
    assert "| UDP |" in report.markdown(Result(8, 1, {}, [beside]))


def test_a_picture_shows_what_is_near_the_limit(tmp_path):
    """Each method whose rate ever comes near the limit has its line and its name."""
    free = outcome()._replace(timeline=[10 << 20, 10 << 20])
    cell = CellResult(CELL, {"police": [outcome()], "unlimited": [free]})
    picture.draw(Result(8, 1, {}, [cell]), tmp_path / "rates.svg")
    drawn = (tmp_path / "rates.svg").read_text()
    assert "<!-- police -->" in drawn
    assert "<!-- unlimited -->" not in drawn


def test_the_report_tells_when_it_is_not_whole():
    """Drops that were the line's own and an interruption are told."""
    cell = CellResult(CELL, {"police": [outcome()._replace(dropped_by_line=7)]})
    text = report.markdown(Result(8, 1, {}, [cell], interrupted=True))
    assert "police: up to 7 packets were dropped by the line itself" in text
    assert "Interrupted" in text


def test_the_json_has_each_round():
    """The JSON has the median of each figure, and the rounds that it is from."""
    cell = CellResult(CELL, {"police": [outcome(ratio=1.0), outcome(ratio=2.0)]})
    (found,) = json.loads(report.to_json(Result(8, 2, {}, [cell])))["cells"]
    assert found["limit_bytes_per_s"] == 1 << 20
    assert found["methods"]["police"]["median"]["ratio"] == 1.5
    assert found["methods"]["police"]["median"]["inside"]["p95_ms"] == 21.0
    assert [each["ratio"] for each in found["methods"]["police"]["rounds"]] == [1.0, 2.0]


def test_a_line_delays():
    """Without a bottleneck each packet leaves so much later, however many come at once."""
    way = Way(LineSpec(0.01), -1, -1)
    assert [way.due_s(5.0, 1500) for _ in range(3)] == [5.01] * 3


def test_a_bottleneck_sends_one_packet_after_the_other():
    """Packets that come at once leave at its rate; after an idle time it owes nothing."""
    way = Way(LineSpec(0.01, 1000, 10_000), -1, -1)
    assert [way.due_s(5.0, 100) for _ in range(3)] == pytest.approx([5.11, 5.21, 5.31])
    assert way.due_s(9.0, 100) == pytest.approx(9.11)


def test_a_bottleneck_drops_what_its_queue_cannot_hold():
    """The packet that would make the queue too long is dropped, and later ones may pass again."""
    way = Way(LineSpec(0.0, 1000, 250), -1, -1)
    assert way.due_s(5.0, 100) == pytest.approx(5.1)
    assert way.due_s(5.0, 100) == pytest.approx(5.2)
    assert way.due_s(5.0, 100) is None
    assert way.due_s(5.06, 100) == pytest.approx(5.3)


def test_tcp_info_has_the_kernels_layout():
    """The fields that are read are where include/uapi/linux/tcp.h has them."""
    offsets = {name: getattr(_TcpInfo, name).offset for name in ("rto", "pacing_rate")}
    assert offsets == {"rto": 8, "pacing_rate": 104}
    assert (_TcpInfo.bytes_sent.offset, _TcpInfo.bytes_retrans.offset) == (200, 208)


def parsed(*words):
    """The options as main sees them."""
    parser = argparse.ArgumentParser()
    shape.configure(parser)
    arguments = parser.parse_args(words)
    shape._fill_in(arguments)
    return arguments


def test_options_stand_above_the_preset():
    """What is given on the command line holds, the preset is for the rest."""
    arguments = parsed("--quick", "--limits", "50K,8mbit", "--bottleneck", "12M:256K")
    assert arguments.limits == [Rate(50 << 10), Rate(1_000_000)]
    assert arguments.bottleneck == Bottleneck(Rate(12 << 20), 256 << 10)
    assert (arguments.flows, arguments.rounds) == ([1, 8], 1)
    assert arguments.methods == list(METHODS)


@pytest.mark.parametrize(
    "words",
    [
        ("--limits", "5x"),
        ("--flows", "0"),
        ("--delays", "-1"),
        ("--directions", "sideways"),
        ("--methods", "magic"),
        ("--bottleneck", "12M"),
        ("--udp", "-5"),
        ("--seconds", "0.5"),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_named(words):
    """Each option that cannot be read is refused by its name."""
    with pytest.raises(argparse.ArgumentTypeError, match=words[0]):
        parsed(*words)


def test_a_picture_without_its_library_is_refused_at_once(monkeypatch):
    """The error tells what to install."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(picture.PictureError, match="pip install matplotlib"):
        picture.check(Path("rate.svg"))


def test_each_method_has_a_name_of_its_own():
    """Names choose methods, and name the rows of the tables."""
    names = [method.name for method in METHODS]
    assert sorted(set(names)) == sorted(names)
