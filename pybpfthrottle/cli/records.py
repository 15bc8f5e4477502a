"""What limits did and processes moved, as records for machines: JSON lines, and CSV.

A file is an ``Output``, which several limits may share; each has a ``Recorder`` for it.
"""

from __future__ import annotations

import csv
import io
import json
import time
from datetime import datetime, timezone
from typing import (
    TYPE_CHECKING,
    Any,
    Iterable,
    Mapping,
    Optional,
    Sequence,
    TextIO,
)

from pybpfthrottle.bpf.obj.plain import NamedTuple, Protocol
from pybpfthrottle.cli.say import say
from pybpfthrottle.model import Direction, printable

if TYPE_CHECKING:
    from pybpfthrottle.meter import Reading
    from pybpfthrottle.proof import Proof
    from pybpfthrottle.throttle import Throttle

SCHEMA_VERSION = 1
JSON, CSV = "JSON lines", "CSV"
BOTH_ON_STDOUT = "--json and --record - cannot be combined: both need standard output"
FORMS = {".csv": CSV, ".jsonl": JSON, ".json": JSON}
# A spreadsheet takes what begins with one of these for a formula; anybody can name a process so.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


class Sample(NamedTuple):
    """The readings at one moment. ``idle`` says why nothing passes, as a code and a text.

    ``network`` says what was done to packets, where a bad network is in force.
    """

    elapsed_s: float
    readings: Sequence[Reading]
    round_trip_ms: Optional[float] = None
    idle: Optional[Mapping[str, str]] = None
    network: Optional[Mapping[str, Any]] = None


class Output:
    """A file that records are written to, until that fails.

    ``on_stdout``: it is standard output, which then is not for people.
    """

    def __init__(self, file: TextIO, form: str = JSON, *, on_stdout: bool = False) -> None:
        self.form = form
        self.on_stdout = on_stdout
        self.failed = False
        self._file = file
        self._begun = False

    def recorder(self, pid: Optional[int], *, several: bool = False) -> Recorder:
        """Return what records one limit, or one of ``several``."""
        if self.form == CSV:
            return CsvRows(self, pid)
        return JsonLines(self, {"pid": pid} if several else {})

    def write(self, fields: Mapping[str, Any]) -> None:
        """Write a record: a JSON object, or a row, before the first of which a header is written.

        All records of a CSV file have the same fields.
        """
        if self.form == JSON:
            self._lines(json.dumps(fields) + "\n")
            return
        rows = [] if self._begun else [list(fields)]
        self._lines(csv_text([*rows, list(fields.values())]))

    def _lines(self, text: str) -> None:
        if self.failed:
            return
        self._begun = True
        try:
            self._file.write(text)
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            # A full disk must not end the limit, nor the limited command.
            self.failed = True
            say(f"cannot write to {self._file.name}: {error.strerror}; {self.form} ends here")


class Recorder(Protocol):
    """Records one limit."""

    def start(self, throttle: Throttle, **fields: Any) -> None:
        """Record what was put in force."""

    def sample(self, sample: Sample) -> None:
        """Record the rates of the last seconds, and the counters since the start."""

    def note(self, text: str) -> None:
        """Record something about what is covered."""

    def proof(self, proof: Proof) -> None:
        """Record whether the limit holds."""

    def end(self, last: Sample, total: Sample, **fields: Any) -> None:
        """Record the rest since the last sample, or the rates over the whole time."""


class JsonLines:
    """One JSON object per line: ``start``, a ``sample`` every second, ``note``, ``proof``, ``end``.

    Each has the fields in ``common``.
    """

    def __init__(self, output: Output, common: Mapping[str, Any]) -> None:
        self._output = output
        self._common = common

    def start(self, throttle: Throttle, **fields: Any) -> None:
        """What was put in force."""
        self._write(
            "start",
            schema=SCHEMA_VERSION,
            time=_now(),
            cgroups=[cgroup.path for cgroup in throttle.cgroups],
            id=throttle.id,
            how={str(direction): how for direction, how in throttle.how().items()},
            **fields,
        )

    def sample(self, sample: Sample) -> None:
        """The rates of the last seconds, the counters since the start."""
        self._write(
            "sample",
            time=_now(),
            **_by_direction(sample),
            round_trip_ms=sample.round_trip_ms,
            idle=sample.idle,
        )

    def note(self, text: str) -> None:
        """Something about what is covered."""
        self._write("note", text=text)

    def proof(self, proof: Proof) -> None:
        """Whether the limit holds."""
        self._write("proof", **proof.to_json())

    def end(self, last: Sample, total: Sample, **fields: Any) -> None:
        """The rates over the whole time."""
        self._write("end", time=_now(), **_by_direction(total), **fields)

    def _write(self, event: str, **fields: Any) -> None:
        self._output.write({"event": event, **self._common, **fields})


class CsvRows:
    """A row per second and direction; what has passed and was dropped is since the start."""

    def __init__(self, output: Output, pid: Optional[int]) -> None:
        self._output = output
        self._pid = pid

    def start(self, throttle: Throttle, **fields: Any) -> None:
        """Nothing: there are rows of samples only."""

    def note(self, text: str) -> None:
        """Nothing: there are rows of samples only."""

    def proof(self, proof: Proof) -> None:
        """Nothing: there are rows of samples only."""

    def sample(self, sample: Sample) -> None:
        """The rates of the last seconds, the counters since the start."""
        moment = iso(time.time())
        for reading in sample.readings:
            told, counters = reading.record(), reading.counters
            self._output.write(
                {
                    "time": moment,
                    "elapsed_s": round(sample.elapsed_s, 3),
                    "pid": self._pid,
                    "direction": str(reading.direction),
                    **{name: told[name] for name in ("limit", "actual", "ratio", "verdict")},
                    "bytes_passed": counters.bytes_passed,
                    "bytes_dropped": counters.bytes_dropped,
                    "packets_passed": counters.packets_total - counters.packets_dropped,
                    "packets_dropped": counters.packets_dropped,
                    "round_trip_ms": sample.round_trip_ms,
                }
            )

    def end(self, last: Sample, total: Sample, **fields: Any) -> None:
        """The rest since the last sample."""
        self.sample(last)


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of ``monitor --json`` as a row."""
    limits = fields["limits"]
    rest = {name: value for name, value in fields.items() if name != "limits"}
    own = {f"{direction}_limit": limits.get(str(direction)) for direction in Direction}
    return {**rest, "time": iso(fields["time"]), **own}


def iso(at_s: float) -> str:
    """Return a time in seconds since 1970 as ISO 8601, in UTC."""
    moment = datetime.fromtimestamp(at_s, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _now() -> float:
    return round(time.time(), 3)


def _by_direction(sample: Sample) -> dict[str, Any]:
    rates = {str(reading.direction): reading.record() for reading in sample.readings}
    network = {} if sample.network is None else {"network": sample.network}
    return {"elapsed_s": round(sample.elapsed_s, 3), **rates, **network}


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as CSV, in which no name is a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(map(_cell, row) for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return ("'" if value.startswith(_FORMULAS) else "") + printable(value)
