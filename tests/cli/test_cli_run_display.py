"""What ``run`` shows: the live line, the summary, JSON lines; and --duration."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys

import pytest

LIMIT = ("run", "--download-limit", "1M", "--upload-limit", "500K")
COUNTERS = ("program_calls", "packets_total", "bytes_total", "packets_dropped", "bytes_dropped")
FIELDS = {"limit", "actual", "ratio", "verdict", *COUNTERS}


def records(path):
    """The JSON objects of a file, one a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_terminal_shows_a_live_line_and_a_summary(tool):
    """On a terminal the rates are drawn after about a second, and the summary at the end."""
    process, terminal = tool.start_on_terminal(
        *LIMIT, "--", "sh", "-c", "read x", stdout=subprocess.DEVNULL
    )
    terminal.wait_for("download: actual=")
    terminal.wait_for("upload: actual=")
    assert "pybpfthrottle:" not in terminal.text
    terminal.type(b"\n")
    assert tool.finish(process).status == 0
    last = [line for line in terminal.text.replace("\r", "\n").splitlines() if line.strip()][-2:]
    assert [line.split(":")[0].replace("\x1b[2K", "") for line in last] == ["pybpfthrottle"] * 2
    assert "limit=1.0 MB/s" in last[0]
    assert "limit=500.0 KB/s" in last[1]


def test_the_live_line_is_taken_away_before_the_summary(tool):
    """The summary begins on an empty line."""
    process, terminal = tool.start_on_terminal(*LIMIT, "--", "sh", "-c", "read x")
    terminal.wait_for("actual=")
    terminal.type(b"\n")
    assert tool.finish(process).status == 0
    assert "\r\x1b[2Kpybpfthrottle: download: " in terminal.text


def test_no_terminal_no_live_line(tool):
    """Where standard error is no terminal only the summary comes, one line a direction."""
    result = tool.run(*LIMIT, "--", "sleep", "1.3")
    assert len(result.err.splitlines()) == 2
    assert "\x1b" not in result.err
    assert re.search(
        r"download: actual=0 B/s, limit=1\.0 MB/s, ratio=0\.00x .* in \d\.\d s, ", result.err
    )


def test_quiet_shows_nothing_on_a_terminal(tool):
    """With -q a terminal stays empty."""
    process, terminal = tool.start_on_terminal(*LIMIT, "-q", "--", "sleep", "1.3")
    assert tool.finish(process).status == 0
    assert terminal.text == ""


def test_the_json_file_has_start_samples_and_end(tool, tmp_path):
    """--json-file gets one JSON object a line, with the documented fields."""
    path = tmp_path / "x.jsonl"
    result = tool.run(*LIMIT, "--json-file", str(path), "--", "sh", "-c", "sleep 2.2; exit 3")
    start, *samples, end = records(path)
    assert start["event"] == "start"
    assert start["schema"] == 1
    assert start["command"] == ["sh", "-c", "sleep 2.2; exit 3"]
    assert start["pid"] > result.pid
    [name] = [path.rpartition("/")[2] for path in start["cgroups"]]
    assert re.fullmatch(rf"pybpfthrottle-{result.pid}-\d+-0", name)
    assert start["how"]["download"]["backend"] == "ebpf"
    assert start["how"]["download"]["attached_by"] == "link"
    assert samples
    for record in samples:
        assert record["event"] == "sample"
        assert set(record["download"]) == FIELDS
        assert record["upload"]["limit"] == 500 * 1024
    assert (end["event"], end["reason"], end["exit_status"]) == ("end", "exited", 3)
    assert end["download"]["limit"] == 1024 * 1024
    assert end["elapsed_s"] >= 2.2


def test_quiet_does_not_silence_the_json_file(tool, tmp_path):
    """-q is for people; machines get their records all the same."""
    path = tmp_path / "x.jsonl"
    assert tool.run(*LIMIT, "-q", "--json-file", str(path), "--", "true").err == ""
    assert [record["event"] for record in records(path)] == ["start", "end"]


def test_the_json_file_says_legacy_where_it_is(tool, tmp_path):
    """The way of attaching is in the start record."""
    path = tmp_path / "x.jsonl"
    tool.run(*LIMIT, "--bpf-attach-method", "legacy", "--json-file", str(path), "--", "true")
    assert records(path)[0]["how"]["upload"]["attached_by"] == "legacy"


def test_the_record_is_a_table(tool, tmp_path):
    """--record x.csv has a row per second and direction, in place of what was in the file."""
    path = tmp_path / "x.csv"
    path.write_text("before\n")
    result = tool.run(*LIMIT, "--record", str(path), "--", "sh", "-c", "sleep 2.3; exit 3")
    assert result.status == 3
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["direction"] for row in rows} == {"download", "upload"}
    assert len(rows) >= 4
    assert {row["limit"] for row in rows} == {str(1 << 20), str(500 << 10)}
    assert {row["pid"] for row in rows} == {rows[0]["pid"]}
    assert int(rows[0]["pid"]) > 0
    plotted = tool.run("plot", str(path))
    assert plotted.status == 0
    assert "download: 0 B/s in the mean" in plotted.text


def test_a_record_may_be_beside_a_json_file(tool, tmp_path):
    """Each has its own."""
    files = ("--record", "x.jsonl", "--json-file", "y.txt")
    assert tool.run(*LIMIT, "-q", *files, "--", "true").err == ""
    for name in ("x.jsonl", "y.txt"):
        assert [record["event"] for record in records(tmp_path / name)] == ["start", "end"]


def test_a_record_on_a_full_disk_does_not_harm_the_command(tool, tmp_path):
    """It costs a line on standard error."""
    (tmp_path / "x.csv").symlink_to("/dev/full")
    result = tool.run(*LIMIT, "-q", "--record", "x.csv", "--", "sh", "-c", "exit 3")
    assert result.status == 3
    assert "x.csv" in result.complaint


def test_a_command_that_fails_to_start_ends_the_json_file_well(tool, tmp_path):
    """Whatever happens, each line of the file is a whole JSON object."""
    path = tmp_path / "x.jsonl"
    assert tool.run(*LIMIT, "--json-file", str(path), "--", "./absent").status == 127
    assert all("event" in record for record in records(path))


def test_a_full_disk_does_not_harm_the_command(tool):
    """Records that cannot be written cost a line on standard error, not the command's status."""
    result = tool.run(
        *LIMIT, "-q", "--json-file", "/dev/full", "--", "sh", "-c", "sleep 0.3; exit 3"
    )
    assert result.status == 3
    assert "/dev/full" in result.complaint


@pytest.mark.parametrize("method", ["link", "legacy"])
def test_duration_lifts_the_limit_and_not_the_command(tool, tmp_path, eventually, attached, method):
    """After --duration nothing is attached any more while the command still runs."""
    process = tool.start(
        *LIMIT,
        *("--duration", "2", "--bpf-attach-method", method, "--json-file", "x.jsonl"),
        *("--", "sh", "-c", "while [ ! -e stop ]; do sleep 0.05; done; exit 3"),
    )
    cgroup = tool.cgroup_of(process)
    eventually(lambda: not attached(cgroup))
    assert process.poll() is None
    assert cgroup.populated()
    (tmp_path / "stop").touch()
    result = tool.finish(process)
    assert result.status == 3
    assert result.err.count("download: actual=") == 1
    end = records(tmp_path / "x.jsonl")[-1]
    assert (end["event"], end["reason"], end["exit_status"]) == ("end", "duration", None)
    assert 2 <= end["elapsed_s"] < 4


def test_a_command_that_ends_before_its_duration_is_not_waited_for(tool):
    """--duration is a maximum."""
    process = tool.start(*LIMIT, "--duration", "3600", "--", "true")
    assert tool.finish(process).status == 0


def test_verbose_logs_the_attachment_and_the_rates(tool):
    """-v prints the log lines of the seeds on standard error, not on standard output."""
    result = tool.run(*LIMIT, "-v", "--", "sh", "-c", "sleep 1.3; echo $$")
    assert "✅ Successfully attached using modern method (bpf_link_create)" in result.err
    pid = int(result.out)
    assert re.search(rf"PID {pid} \(sh\) download: actual=0 B/s, limit=1\.0 MB/s, ", result.err)
    assert re.search(rf"eBPF stats PID {pid} cgroup \d+: program_calls=0, packets=0, ", result.err)


def test_the_summary_survives_an_early_end_of_standard_error(tool):
    """If nobody reads standard error any more the command's status is still passed on."""
    process = tool.start(*LIMIT, "--", "sh", "-c", "sleep 0.5; exit 3")
    process.stderr.close()
    process.stderr = None
    assert tool.finish(process).status == 3


def test_a_reader_that_leaves_ends_the_command_as_always(tool):
    """``run ... | head -1``: the command gets SIGPIPE, no traceback."""
    process = tool.start(*LIMIT, "-q", "--", "yes")
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    process.stdout = None
    result = tool.finish(process)
    assert (result.status, result.err) == (141, "")


LOCAL = """
import socket, sys, time
listener = socket.create_server(("127.0.0.1", 0))
own = socket.create_connection(listener.getsockname())
other, _ = listener.accept()
while True:
    own.sendall(bytes(1000))
    other.recv(1000)
    time.sleep(0.1)
"""


def test_the_live_line_and_the_record_say_why_nothing_passes(tool, tmp_path, eventually):
    """After a few seconds, without a note."""
    command = ("--", sys.executable, "-c", LOCAL)
    process, terminal = tool.start_on_terminal(*LIMIT, "--record", "x.jsonl", *command)
    terminal.wait_for("all goes over loopback, to itself")
    process.terminate()
    assert tool.finish(process).status == 143
    samples = [one for one in records(tmp_path / "x.jsonl") if one["event"] == "sample"]
    assert samples[0]["idle"] is None
    assert samples[-1]["idle"]["code"] == "loopback"
