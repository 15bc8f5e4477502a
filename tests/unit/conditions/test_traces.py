"""Traces: what files say, and how rates follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pybpfthrottle.conditions import traces
from pybpfthrottle.conditions.network import Asked
from pybpfthrottle.conditions.traces import Replay, Trace
from pybpfthrottle.errors import LimitError
from pybpfthrottle.model import Direction, Rate

DOWN, UP = Direction.DOWNLOAD, Direction.UPLOAD


def written(tmp_path: Path, text: str) -> str:
    """A file with a trace."""
    path = tmp_path / "trace"
    path.write_text(text)
    return str(path)


def test_a_mahimahi_trace_has_a_packet_in_each_line(tmp_path: Path) -> None:
    """In steps of a tenth of a second, with the least rate where none may pass."""
    times = [*range(0, 100, 10), 250, 300]
    trace = traces.read(written(tmp_path, "\n".join(map(str, times))), DOWN)
    assert trace == Trace(0.1, (Rate(150_400), Rate(1000), Rate(30_080)))
    assert (trace.peak, trace.at(0.05), trace.at(0.35)) == (Rate(150_400),) * 3


def test_what_was_recorded_is_replayed_by_direction(tmp_path: Path) -> None:
    """As JSON lines and as CSV."""
    lines = [
        {"event": "start"},
        *({"event": "sample", "elapsed_s": at, "download": {"actual": 5000 * at}} for at in (1, 2)),
    ]
    path = written(tmp_path, "\n".join(map(json.dumps, lines)))
    assert traces.read(path, DOWN) == Trace(1.0, (Rate(5000), Rate(10_000)))
    with pytest.raises(LimitError, match="no samples of this direction"):
        traces.read(path, UP)
    rows = "time,elapsed_s,direction,actual\nx,1.0,upload,7000\nx,1.0,download,3\n"
    assert traces.read(written(tmp_path, rows), UP) == Trace(1.0, (Rate(7000),))


def test_round_trips_are_replayed_unless_a_delay_is_given(tmp_path: Path) -> None:
    """Where nothing was sent, the last one goes on; before there was any, the first."""
    samples = [(1, None), (2, 20), (3, None), (4, 300.5)]
    events = [
        {"event": "sample", "elapsed_s": at, "download": {"actual": 5000}, "round_trip_ms": trip}
        for at, trip in samples
    ]
    path = written(tmp_path, "\n".join(map(json.dumps, events)))
    trace = traces.read(path, DOWN)
    assert trace.round_trips_s == (0.02, 0.02, 0.02, 0.3005)
    asked = Asked.of(replay=path)
    assert (asked.late, asked.is_late) == (trace, True)
    assert str(asked).endswith("delay 20 ms to 300.5 ms as recorded")
    assert Asked.of(replay=path, delay="60ms").late is None
    assert Asked.of("3g", replay=path).late is None
    head = "time,elapsed_s,direction,actual,round_trip_ms\n"
    rows = "x,1.0,download,3,\nx,1.0,upload,3,7.5\n"
    assert traces.read(written(tmp_path, head + rows), UP).round_trips_s == (0.0075,)
    assert traces.read(path, DOWN).round_trips_s == ()


@pytest.mark.parametrize("trip", ["-1", "nan", "60001", "x"])
def test_what_is_no_round_trip_is_told(tmp_path: Path, trip: str) -> None:
    """As what is no rate."""
    text = f"time,elapsed_s,direction,actual,round_trip_ms\nx,1.0,download,3,{trip}\n"
    with pytest.raises(LimitError, match="is no trace"):
        traces.read(written(tmp_path, text), DOWN)


@pytest.mark.parametrize("text", ["", "x", "-5", "{", '{"event": "sample"}', "time,a\n1,2"])
def test_what_is_no_trace_is_told(tmp_path: Path, text: str) -> None:
    """With the file's name, and what would be one."""
    with pytest.raises(LimitError, match=r"trace is no trace: .*give what --record wrote"):
        traces.read(written(tmp_path, text), DOWN)


def test_a_replay_is_a_limit_of_the_traces_peak(tmp_path: Path) -> None:
    """Below which its rate is moved."""
    path = written(tmp_path, "0\n10\n150\n")
    asked = Asked.of(replay=path)
    assert asked.limits == {DOWN: Rate(30_080), UP: None}
    assert str(asked) == f"download up to {asked.limits[DOWN]}, replay {path}"


def test_the_rate_and_the_delay_are_moved_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the chore comes again for the next step."""
    now = [100.0]
    monkeypatch.setattr(traces.time, "monotonic", lambda: now[0])
    moved: list[Rate] = []

    class Live:
        """A throttle whose dial notes what it is moved to."""

        def dial(self, direction: Direction) -> Any:
            return self

        move = moved.append

    trace = Trace(1.0, (Rate(2000), Rate(2000), Rate(5000)), (0.1, 0.3, 0.3))
    delays: list[float] = []
    replay = Replay(Live(), {DOWN: trace}, trace, delays.append)  # type: ignore[arg-type]
    for now[0] in (100.0, 101.0, 102.5, 103.0):
        replay.run()
        assert now[0] < replay.due_s <= now[0] + 0.2
    assert moved == [Rate(2000), Rate(5000), Rate(2000)]
    assert delays == [0.3, 0.1]
