"""What plot makes of a recording."""

from __future__ import annotations

import io
import json

import click
import pytest

from pybpfthrottle.cli import plot

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
    (series,) = plot._read(file)
    assert series == ("download", [1.0, 3.0], [1000.0, 2000.0], LIMIT)
    assert series.summary() == ("download: 1.5 KB/s in the mean, 2.0 KB/s at most, limit 1000 B/s")


def test_processes_have_series_of_their_own():
    """With --each, and of monitor."""
    each = plot._read(recording(sample(1, 10, pid=7), sample(1, 20, pid=8)))
    assert [series.name for series in each] == ["7 download", "8 download"]
    line = {"time": 5, "pid": 7, "name": "curl", "limits": {"upload": 9}}
    line |= {"download_bytes_per_s": 3, "upload_bytes_per_s": 4}
    assert plot._read(recording(line)) == [
        ("7 curl download", [5.0], [3.0], None),
        ("7 curl upload", [5.0], [4.0], 9),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are no rates in it"),
        ('{"event": "start"}\n', "there are no rates in it"),
        ("no JSON\n", "rates.jsonl, line 1: this is not a line of"),
        ('{"event": "start"}\n[]\n', "rates.jsonl, line 2: this is not a line of"),
        ('{"time": "noon"}\n', "rates.jsonl, line 1: this is not a line of"),
    ],
)
def test_what_is_no_recording_is_told_by_the_line(text, said):
    """In one error, whatever it is."""
    file = io.StringIO(text)
    file.name = "rates.jsonl"
    with pytest.raises(click.ClickException, match=said):
        plot._read(file)


def test_a_picture_is_drawn(tmp_path):
    """With its limit; a name of another kind is refused before anything is read."""
    picture = tmp_path / "rates.svg"
    plot.plot(recording(sample(1, 1000), sample(2, 1500)), str(picture))
    assert picture.read_text().startswith("<?xml")
    with pytest.raises(click.UsageError, match="ends in"):
        plot.plot(recording(), "rates.gif")
    with pytest.raises(click.ClickException, match="cannot write"):
        plot.plot(recording(sample(1, 1000)), str(tmp_path / "none" / "rates.svg"))


def test_bars_are_as_high_as_the_highest():
    """One for each step; many steps share a bar."""
    assert plot.sparkline([0, 50, 100]) == "▁▅█"
    assert len(plot.sparkline(list(range(1000)))) <= 60
