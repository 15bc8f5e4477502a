"""Records of a limit: CSV and JSON lines."""

from __future__ import annotations

import csv
import errno
import io
import json
import os

import click
import pytest

from pybpfthrottle.cli.records import CSV, JSON, Output, Sample, flat, iso
from pybpfthrottle.cli.values import RecordFile
from pybpfthrottle.meter import Reading
from pybpfthrottle.model import Counters, Direction, Rate

COUNTERS = Counters(9, 10, 5000, 2, 1500)
COLUMNS = {"time", "elapsed_s", "pid", "direction", "limit", "actual", "ratio", "verdict"}
COLUMNS |= {f"{what}_{fate}" for what in ("bytes", "packets") for fate in ("passed", "dropped")}
COLUMNS |= {"round_trip_ms"}


def sample(**more) -> Sample:
    """A download of 1500 B/s, and an upload without a limit."""
    readings = [
        Reading(Direction.DOWNLOAD, Rate(1000), 1500.0, COUNTERS, 0.0, 2),
        Reading(Direction.UPLOAD, None, 0.0, Counters()),
    ]
    return Sample(2.0, readings, **more)


def rows(file: io.StringIO) -> list[dict[str, str]]:
    """What a reader of CSV reads."""
    return list(csv.DictReader(io.StringIO(file.getvalue())))


def test_csv_has_a_row_for_each_direction_below_one_header():
    """Also where several limits share the file."""
    file = io.StringIO()
    output = Output(file, CSV)
    output.recorder(7, several=True).sample(sample(round_trip_ms=20.5))
    output.recorder(8, several=True).end(sample(), sample(), reason="exited")
    assert file.getvalue().count("elapsed_s") == 1
    found = rows(file)
    assert {row["pid"] for row in found} == {"7", "8"}
    assert [row["direction"] for row in found] == ["download", "upload"] * 2
    assert set(found[0]) == COLUMNS
    expected = {"limit": "1000", "actual": "1500", "ratio": "1.5", "verdict": "over_limit"}
    expected |= {"bytes_passed": "3500", "bytes_dropped": "1500", "packets_passed": "8"}
    expected |= {"packets_dropped": "2", "round_trip_ms": "20.5", "elapsed_s": "2.0"}
    assert {name: found[0][name] for name in expected} == expected
    assert (found[1]["limit"], found[1]["verdict"], found[2]["round_trip_ms"]) == ("", "", "")


def test_json_has_the_round_trip_and_why_nothing_passes():
    """Null where they are not known."""
    file = io.StringIO()
    recorder = Output(file).recorder(7, several=True)
    recorder.sample(sample(round_trip_ms=20.5))
    recorder.sample(sample(idle={"code": "loopback", "text": "over loopback"}))
    first, second = map(json.loads, file.getvalue().splitlines())
    assert (first["pid"], first["round_trip_ms"], first["idle"]) == (7, 20.5, None)
    assert (second["round_trip_ms"], second["idle"]["code"]) == (None, "loopback")
    assert second["time"] > 1.6e9


def test_times_are_utc():
    """As ISO 8601, to the millisecond."""
    assert iso(1764126000.25) == "2025-11-26T03:00:00.250Z"


def test_names_are_no_formulas_and_no_lines():
    """Anybody can name a process; a spreadsheet runs what begins like a formula."""
    file = io.StringIO()
    fields = {"time": 1764126000, "pid": 7, "name": '=1+"a"\n', "limits": {"upload": 5}}
    Output(file, CSV).write(flat(fields))
    [row] = rows(file)
    assert row["name"] == '\'=1+"a"\\n'
    assert (row["download_limit"], row["upload_limit"]) == ("", "5")
    assert row["time"] == "2025-11-26T03:00:00.000Z"


class Full(io.StringIO):
    """A file on a full disk."""

    name = "rates.csv"

    def flush(self) -> None:
        """There is no space."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("form", [CSV, JSON])
def test_a_full_disk_ends_the_record_and_nothing_else(form, capsys):
    """It is said once."""
    output = Output(Full(), form)
    for _ in range(2):
        output.recorder(7).sample(sample())
    assert output.failed
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pybpfthrottle: cannot write to rates.csv: No space left on device; ")
    assert line.endswith(f"{form} ends here")


@pytest.mark.parametrize(
    ("name", "form"), [("x.csv", CSV), ("X.CSV", CSV), ("x.jsonl", JSON), ("a.b.json", JSON)]
)
def test_the_name_tells_the_form(name, form, tmp_path):
    """Whether in capitals or not. What was in the file is gone."""
    path = tmp_path / name
    path.write_text("before")
    output = RecordFile().convert(str(path), None, None)
    assert (output.form, output.on_stdout) == (form, False)
    assert path.read_text() == ""


def test_standard_output_is_csv():
    """JSON lines have --json."""
    output = RecordFile().convert("-", None, None)
    assert (output.form, output.on_stdout) == (CSV, True)


@pytest.mark.parametrize("name", ["x.txt", "x", "csv", "/dev/null", ""])
def test_another_name_is_refused(name):
    """With those that are not."""
    with pytest.raises(click.BadParameter, match=r"must end in \.csv for CSV, or in \.jsonl or"):
        RecordFile().convert(name, None, None)
