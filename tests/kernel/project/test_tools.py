"""The demo and the benchmarks run, and tell what they measured. Their times gate nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from benches import attribution
from lab import ENVIRONMENT, ROOT, TOOL

BENCH = [sys.executable, str(ROOT / "tools" / "bench")]

pytestmark = pytest.mark.timed


@pytest.mark.parametrize("place", [[], ["--loopback"]])
def test_the_demo_shows_that_limits_hold(place: list[str]) -> None:
    """Each limited transfer has its verdict; one that is only policed is there to compare with."""
    done = subprocess.run(
        [*TOOL, "demo", "--seconds", "3", *place],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    transfers = done.stdout.split("\n$ ")[1:]
    assert sum("without a limit" in one for one in transfers) == 2
    assert sum("--shape police" in one for one in transfers) == (0 if place else 1)
    limited = [one for one in transfers if "-limit" in one and "police" not in one]
    assert ["✅ THROTTLED" in one for one in limited] == [True, True]


@pytest.mark.parametrize(
    ("what", "row", "column"),
    [
        ("cost", "throttle: IPv4 TCP", "ns"),
        ("events", "ring: typed by BTF", "events_per_s"),
        ("live", "3 throttles", "upload_ns"),
        ("load", "shipped: pybpfthrottle", "peak_mb"),
        ("start", "pybpfthrottle run", "ms"),
    ],
)
def test_a_benchmark_measures(what: str, row: str, column: str) -> None:
    """Each benchmark gives its figures as JSON."""
    done = subprocess.run(
        [*BENCH, what, "--rounds", "1", "--json", *(["--throttles", "3"] * (what == "live"))],
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(done.stdout)[row][column] > 0


def test_the_programs_benchmark_measures_what_their_servers_sent() -> None:
    """Of one program, for two seconds."""
    brief = ["--programs", "curl", "--delays", "0", "--seconds", "2", "--json"]
    done = subprocess.run([*BENCH, "programs", *brief], stdout=subprocess.PIPE, check=True)
    assert 0.9 < json.loads(done.stdout)["curl, 2.0 MB/s, 0 ms"]["ratio"] < 1.1


def test_the_traffic_benchmark_measures_what_counting_costs() -> None:
    """Of few processes, for a second."""
    few = ["--processes", "5", "--sockets", "10", "--seconds", "1", "--no-transfers", "--json"]
    done = subprocess.run([*BENCH, "traffic", *few], stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout)
    assert [*found] == [
        "watch, 5 processes, 10 connections",
        "monitor, 5 processes, 10 connections",
        "top, 5 processes, 2000 connections",
    ]
    assert found["watch, 5 processes, 10 connections"]["begins ms"] > 0
    assert found["top, 5 processes, 2000 connections"]["on screen ms"] > 0


def test_the_traffic_benchmark_tells_whose_bytes_are_right() -> None:
    """As the peers' firewall has counted them."""
    rows = attribution.compared(1.0, short=True)
    transfers = {name: row for name, row in rows.items() if "MB" in row}
    assert {"curl beside short ones", "pre-forking server beside short ones"} <= set(transfers)
    for row in transfers.values():
        assert row["MB"] > 0
        assert row["pybpfthrottle"] == pytest.approx(1.0, abs=0.005)


def test_the_share_benchmark_compares_a_group_with_htb() -> None:
    """Two flows, for a second."""
    small = ["--totals", "4M", "--weights", "2,1", "--directions", "download", "--seconds", "1.5"]
    done = subprocess.run(
        [*BENCH, "share", *small, "--scenes", "weights", "--json"],
        stdout=subprocess.PIPE,
        check=True,
    )
    rows = json.loads(done.stdout)
    assert [row["method"] for row in rows] == ["group", "htb"]
    assert all(row["total"] > 0 for row in rows)


def test_the_shape_benchmark_compares_methods(tmp_path: Path) -> None:
    """Each method that this kernel has comes out with figures, any other with a reason."""
    found = tmp_path / "found.json"
    wanted = "unlimited,police,shape,htb,tbf,ifb,nft"
    cells = ["--limits", "2M", "--flows", "2", "--cc", "cubic", "--delays", "0,20"]
    options = ["--seconds", "1", "--rounds", "1", "--methods", wanted, "--json", str(found)]
    done = subprocess.run(
        [*BENCH, "shape", *cells, *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(found.read_text())
    assert [cell["round_trip_ms"] for cell in result["cells"]] == [0, 0, 20, 20]
    for cell in result["cells"]:
        assert {"unlimited", "police"} <= set(cell["methods"])
        for name, method in cell["methods"].items():
            check_figures(name, method["median"], cell["round_trip_ms"])
        missing = set(wanted.split(",")) - set(cell["methods"])
        other_way = {"ifb"} if cell["direction"] == "upload" else {"htb", "tbf"}
        assert missing - other_way <= {left.partition(",")[0] for left in result["left_out"]}
    assert done.stdout.count("| police |") == 4


def test_the_shape_benchmark_narrows_the_path(tmp_path: Path) -> None:
    """A flow without a limit gets what the bottleneck lets through, and UDP beside it its part."""
    found = tmp_path / "found.json"
    cells = ["--limits", "2M", "--flows", "1", "--cc", "cubic", "--delays", "10", "--udp", "20"]
    options = ["--seconds", "3", "--rounds", "1", "--methods", "unlimited", "--json", str(found)]
    narrow = ["--bottleneck", "2M:100K"]
    subprocess.run([*BENCH, "shape", *cells, *options, *narrow], check=True)
    for cell in json.loads(found.read_text())["cells"]:
        figures = cell["methods"]["unlimited"]["median"]
        assert 0.1 <= figures["udp_ratio"] <= 0.21
        assert 0.5 <= figures["ratio"] <= 1 - figures["udp_ratio"]


def test_the_shape_benchmark_can_be_interrupted(tmp_path: Path) -> None:
    """Ctrl-C ends it at once, with the figures of what was measured so far."""
    found = tmp_path / "found.json"
    cells = ["--limits", "2M", "--flows", "1", "--cc", "cubic", "--delays", "0", "--seconds", "1"]
    options = ["--rounds", "50", "--methods", "unlimited", "--json", str(found)]
    running = subprocess.Popen(
        [*BENCH, "shape", *cells, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with running:
        assert running.stderr
        assert "ratio" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 1
    result = json.loads(found.read_text())
    assert result["interrupted"]
    assert result["cells"][0]["methods"]["unlimited"]["rounds"]


def check_figures(name: str, figures: dict[str, Any], round_trip_ms: float) -> None:
    """Whatever they are, they are possible."""
    assert figures["ratio"] > (2 if name == "unlimited" else 0.3)
    assert 0 <= figures["retransmitted_percent"] < 100
    assert figures["inside"]["p50_ms"] >= round_trip_ms
    assert figures["outside"]["max_ms"] >= figures["outside"]["p50_ms"] >= round_trip_ms
    assert 0.5 <= figures["fairness"] <= 1


def test_the_picture_is_of_a_rate_that_comes_down(tmp_path: Path) -> None:
    """tools/picture shows a download whose middle is a quarter as fast, as text and as an SVG.

    It is monitor that has recorded it, and plot that has drawn it.
    """
    file = tmp_path / "limit.svg"
    picture = [sys.executable, str(ROOT / "tools" / "picture"), "--seconds", "2"]
    text = subprocess.run(
        [*picture, "--svg", str(file)], stdout=subprocess.PIPE, check=True, text=True
    ).stdout.strip()
    before, below, after = text[2:9], text[15:19], text[23:]
    assert max(below) < min(before)
    assert max(below) < max(after)
    drawn = [
        group.find("{*}path")
        for group in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}g")  # noqa: S314
        if group.get("id", "").startswith("rate ")
    ]
    [curve] = [path for path in drawn if path is not None]
    assert len(curve.attrib["d"].split("L")) >= len(text) / 2
