"""What plot makes of a recording."""

from __future__ import annotations

import io
import json
import re

import click
import pytest

from pybpfthrottle.cli import plot
from pybpfthrottle.cli.records import CSV, Output, Sample
from pybpfthrottle.meter import Reading
from pybpfthrottle.model import Counters, Direction, Rate

LIMIT = 1000


def recording(*lines) -> io.StringIO:
    """A file with these objects, a line each."""
    file = io.StringIO("".join(json.dumps(line) + "\n" for line in lines))
    file.name = "rates.jsonl"
    return file


def sample(at_s: float, total: int, dropped: int = 0, **more):
    """A sample of a download, as a limit writes it."""
    counted = {"limit": LIMIT, "bytes_total": total, "bytes_dropped": dropped}
    return {"event": "sample", "elapsed_s": at_s, "download": counted, **more}


def test_rates_are_of_what_has_passed_since_the_line_before():
    """And not the mean over three seconds that a sample tells."""
    file = recording({"event": "start"}, sample(1, 1000), sample(3, 6000, 1000), {"event": "end"})
    (series,) = plot.read(file)
    assert series[:4] == ("download", [1.0, 3.0], [1000.0, 2000.0], LIMIT)
    assert series.summary() == ("download: 1.5 KB/s in the mean, 2.0 KB/s at most, limit 1000 B/s")


def test_processes_have_series_of_their_own():
    """With --each, and of monitor."""
    each = plot.read(recording(sample(1, 10, pid=7), sample(1, 20, pid=8)))
    assert [series.name for series in each] == ["7 download", "8 download"]
    line = {"time": 5, "pid": 7, "name": "curl", "limits": {"upload": 9}}
    line |= {"download_bytes_per_s": 3, "upload_bytes_per_s": 4}
    assert [series[:4] for series in plot.read(recording(line))] == [
        ("7 curl download", [5.0], [3.0], None),
        ("7 curl upload", [5.0], [4.0], 9),
    ]


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"by": "unit", "name": "curl", "unit": "a.service"}, "a.service download"),
        ({"by": "user", "name": "curl", "user": None}, "unknown download"),
        ({"by": "process", "pid": None, "name": "unknown"}, "unknown download"),
        ({"name": "curl"}, "curl download"),
    ],
)
def test_a_series_has_the_name_of_what_was_added_up(more, name):
    """Those that share a program are not one."""
    rates = {"download_bytes_per_s": 3, "upload_bytes_per_s": 4}
    found = plot.read(recording({"time": 5, "limits": {}, **rates, **more}))
    assert found[0].name == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are no rates in it"),
        ('{"event": "start"}\n', "there are no rates in it"),
        ("no JSON\n", "rates.jsonl, line 1: this is not a line of"),
        ('{"event": "start"}\n[]\n', "rates.jsonl, line 2: this is not a line of"),
        ('{"time": "noon"}\n', "rates.jsonl, line 1: this is not a line of"),
        ("name,size\na,1\n", "rates.jsonl, line 1: this is not a line of"),
        ("time,pid,direction\nnoon,1\n", "rates.jsonl, line 2: .*2 cells instead of 3"),
    ],
)
def test_what_is_no_recording_is_told_by_the_line(text, said):
    """In one error, whatever it is."""
    file = io.StringIO(text)
    file.name = "rates.jsonl"
    with pytest.raises(click.ClickException, match=said):
        plot.read(file)


def test_a_picture_is_drawn(tmp_path):
    """With its limit; a name of another kind is refused before anything is read."""
    picture = tmp_path / "rates.svg"
    plot.plot(recording(sample(1, 1000), sample(2, 1500)), str(picture))
    assert picture.read_text().startswith("<?xml")
    file = rows((1, 1000, 0, 20.5), (2, 2500, 500, 30))
    plot.plot(file, str(picture))
    texts = re.findall(r"<text[^>]*>([^<]*)<", picture.read_text())
    named = {"7 download", "7 download limit", "7 download dropped", "round trip, ms"}
    assert named <= set(texts)
    with pytest.raises(click.UsageError, match="ends in"):
        plot.plot(recording(), "rates.gif")
    with pytest.raises(click.ClickException, match="cannot write"):
        plot.plot(recording(sample(1, 1000)), str(tmp_path / "none" / "rates.svg"))


def rows(*samples: tuple[float, int, int, object]) -> io.StringIO:
    """A file as --record writes it to a .csv: a download, and an upload that does nothing."""
    lines = []
    for at_s, total, dropped, trip in samples:
        counters = Counters(1, 1, total, 0, dropped)
        readings = [
            Reading(Direction.DOWNLOAD, Rate(LIMIT), 1.0, counters),
            Reading(Direction.UPLOAD, None, 0.0, Counters()),
        ]
        lines.append(Sample(at_s, readings, trip))
    file = io.StringIO()
    recorder = Output(file, CSV).recorder(7)
    for line in lines:
        recorder.sample(line)
    file.seek(0)
    file.name = "rates.csv"
    return file


def test_csv_says_the_same_as_json():
    """Rates, limits, drops and round trips."""
    found = plot.read(rows((1, 1000, 0, 20.5), (3, 6000, 1000, None)))
    assert [series[:4] for series in found] == [
        ("7 download", [1.0, 3.0], [1000.0, 2000.0], LIMIT),
        ("7 upload", [1.0, 3.0], [0.0, 0.0], None),
    ]
    same = [sample(1, 1000, pid=7, round_trip_ms=20.5), sample(3, 6000, 1000, pid=7)]
    assert plot.read(recording(*same))[0] == found[0]


def test_the_terminal_shows_drops_and_round_trips(capsys):
    """Where there are any, below the rate and the limit on the same scale."""
    plot.plot(
        rows((1, 1000, 0, None), (2, 3000, 1000, 20.5), (3, 4000, 1000, 41)), None, "download"
    )
    assert capsys.readouterr().out.splitlines() == [
        "7 download: 1000 B/s in the mean, 1000 B/s at most, limit 1000 B/s",
        "  rate        ███",
        "  limit       ███",
        "  dropped     ▁█▁  1000 B/s at most",
        "7: round trip from 20.5 to 41.0 ms",
        "  round trip   ▅█",
    ]


def test_a_line_that_is_not_complete_yet_is_left_out():
    """The disk was full, or the file is still being written."""
    whole = rows((1, 1000, 0, None), (2, 3000, 0, None)).getvalue()
    file = io.StringIO(whole[:-40])
    file.name = "rates.csv"
    assert [len(series.rates) for series in plot.read(file)] == [2, 1]


def test_one_direction_is_shown():
    """The one that is asked for; that there is none is said."""
    with pytest.raises(click.ClickException, match="no upload rates"):
        plot.plot(recording(sample(1, 10)), None, "upload")


@pytest.mark.parametrize("top", [0.5, 1, 1000, 1024, 5000, 4e6, 8.9e6, 1e9, 3e11])
def test_the_axis_has_some_round_numbers(top):
    """In units of 1024, whatever the rate."""
    ticks = plot._ticks(top)
    assert 2 <= len(ticks) <= 6
    assert ticks[0] == 0
    assert ticks[-1] <= top


def test_bars_are_as_high_as_the_highest():
    """One for each step; many steps share a bar."""
    assert plot.sparkline([0, 50, 100]) == "▁▅█"
    assert len(plot.sparkline(list(range(1000)))) <= 60
