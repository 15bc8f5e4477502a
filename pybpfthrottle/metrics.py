"""The throttles in force, and the traffic, as metrics for Prometheus and OpenMetrics.

A ``Collector`` finds the families of metrics of this machine, ``text`` writes them down. FAMILIES
has each with its type and unit; a dashboard may use these.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack, suppress
from types import MappingProxyType
from typing import Callable, Iterable, Mapping, NamedTuple, Optional, Sequence

from pybpfthrottle import __version__, registry
from pybpfthrottle.errors import Error
from pybpfthrottle.inforce import InForce, in_force
from pybpfthrottle.linux import clock
from pybpfthrottle.model import Counters, Direction, Moved, printable
from pybpfthrottle.quota import Decision
from pybpfthrottle.traffic import ProcessTraffic, Watch
from pybpfthrottle.usage import GROUPS, SCOPES, moved_since

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_PREFIX = "pybpfthrottle_"
_LONGEST_LABEL = 200
# So many throttles, and so many subjects of each kind of traffic, have series of their own.
_MOST_THROTTLES = 1000
_MOST_SUBJECTS = 100
# A subject that has moved nothing for so long makes room for another one.
_IDLE_S = 300.0
OTHER = "other"
# The unit, container or user of what has none: an empty label would be as if it were missing.
NONE = "none"
NO_LABELS: Mapping[str, object] = MappingProxyType({})
# What series of traffic are for: the family and its label, by the name in usage.GROUPS.
_KINDS = ("name", "unit", "container", "user")


class Family(NamedTuple):
    """A metric's name without its suffix, its type, unit and meaning."""

    name: str
    type: str
    help: str
    unit: str = ""


def _families(*found: Family) -> dict[str, Family]:
    return {one.name: one._replace(name=_PREFIX + one.name) for one in found}


FAMILIES = _families(
    Family("build", "info", "The version of pybpfthrottle."),
    Family("collector_success", "gauge", "Whether everything of a kind could be read."),
    Family("throttles", "gauge", "Throttles in force on this machine."),
    Family("throttle", "info", "What a throttle limits, and how."),
    Family("throttle_paused", "gauge", "Whether the limits of a throttle are lifted for now."),
    Family("throttle_supervised", "gauge", "Whether the process that keeps a throttle runs."),
    Family("throttle_start_time_seconds", "gauge", "When a throttle began.", "seconds"),
    Family("throttle_expiry_time_seconds", "gauge", "When a throttle ends.", "seconds"),
    Family(
        "throttle_limit_bytes_per_second",
        "gauge",
        "The limit of a direction; 0 where it is blocked, none where it is not limited.",
        "bytes_per_second",
    ),
    Family("throttle_passed_bytes", "counter", "Billed bytes that have passed.", "bytes"),
    Family("throttle_dropped_bytes", "counter", "Billed bytes that were dropped.", "bytes"),
    Family("throttle_passed_packets", "counter", "Packets that have passed.", "packets"),
    Family("throttle_dropped_packets", "counter", "Packets that were dropped.", "packets"),
    *(
        Family(
            f"traffic_by_{kind}_bytes",
            "counter",
            f"Bytes of IP packets by {kind}, loopback excluded.",
            "bytes",
        )
        for kind in _KINDS
    ),
    Family("quota_bytes", "gauge", "How much a rule may pass in a period.", "bytes"),
    Family("quota_used_bytes", "gauge", "How much a rule has passed in this period.", "bytes"),
    Family("quota_end_time_seconds", "gauge", "When a period of a quota ends.", "seconds"),
)


class Page:
    """Samples by the names in FAMILIES, one for the same labels.

    ``problems`` says what could not be read, by the name of its collector.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self._samples: dict[str, dict[str, float]] = {}

    def add(self, name: str, value: float, labels: Mapping[str, object] = NO_LABELS) -> None:
        """Add a sample."""
        pairs = ",".join(f'{key}="{_escaped(str(label))}"' for key, label in labels.items())
        self._samples.setdefault(name, {})[pairs] = value

    def text(self, *, openmetrics: bool = False) -> str:
        """Return it as OpenMetrics, or in Prometheus' older format, which node_exporter reads."""
        lines: list[str] = []
        for name, family in FAMILIES.items():
            if name in self._samples:
                lines += _lines(family, self._samples[name], openmetrics=openmetrics)
        return "".join(f"{line}\n" for line in [*lines, *(["# EOF"] if openmetrics else [])])


def _lines(family: Family, samples: Mapping[str, float], *, openmetrics: bool) -> Iterable[str]:
    name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
    # In OpenMetrics the suffix belongs to a sample, in the older format to the metric.
    of_all = family.name if openmetrics else name
    kind = "gauge" if family.type == "info" and not openmetrics else family.type
    yield f"# HELP {of_all} {family.help}"
    yield f"# TYPE {of_all} {kind}"
    if openmetrics and family.unit:
        yield f"# UNIT {of_all} {family.unit}"
    for pairs, value in samples.items():
        yield f"{name}{{{pairs}}} {value:.16g}" if pairs else f"{name} {value:.16g}"


def _label(text: str) -> str:
    """Return a label's value, which anybody may have chosen, without what cannot be printed."""
    return printable(text)[:_LONGEST_LABEL]


def _escaped(label: str) -> str:
    return _label(label).replace("\\", "\\\\").replace('"', '\\"')


class Subjects:
    """What subjects have moved since the first one was seen: sums that only grow, and not too many.

    The first ones have series of their own; while there are too many, what comes is added to OTHER.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Moved] = {}
        self._told: dict[str, Moved] = {}
        self._moved_s: dict[str, float] = {}

    def add(self, moved: Mapping[str, Moved], now_s: float) -> None:
        """Add what each subject has moved; negative what another one has turned out to have."""
        for subject, added in moved.items():
            if not any(added):
                continue
            place = subject if self._has_room(subject, now_s) else OTHER
            self._sums[place] = self._sums.get(place, Moved()).plus(added)
            self._moved_s[place] = now_s

    def sums(self) -> Mapping[str, Moved]:
        """Return the sums. What is taken from one later does not show: a counter never shrinks."""
        for subject, moved in self._sums.items():
            told = self._told.get(subject, Moved())
            self._told[subject] = Moved(*map(max, moved, told))
        return self._told

    def _has_room(self, subject: str, now_s: float) -> bool:
        if subject in self._sums or len(self._sums) < _MOST_SUBJECTS:
            return True
        others = (one for one in self._sums if one != OTHER)
        idlest = min(others, key=lambda one: self._moved_s[one])
        if now_s - self._moved_s[idlest] < _IDLE_S:
            return False
        for known in (self._sums, self._told, self._moved_s):
            known.pop(idlest, None)
        return True


class Collector:
    """Finds what there is to tell: the throttles in force; what ``watch`` counts; and quotas.

    ``quotas`` returns how each rule's quotas stand. ``counters`` reads those of a throttle: of its
    own ones a process can do so without opening them, which is what takes the time.
    """

    def __init__(
        self,
        watch: Optional[Watch] = None,
        quotas: Callable[[], Mapping[str, Decision]] = dict,
        throttles: Callable[[], Sequence[InForce]] = lambda: in_force(registry.records()),
        counters: Callable[[InForce], Mapping[Direction, Counters]] = lambda one: one.counters(),
    ) -> None:
        self._watch = watch
        self._quotas = quotas
        self._throttles = throttles
        self._counters = counters
        self._before: Sequence[ProcessTraffic] = ()
        self._subjects = {kind: Subjects() for kind in _KINDS}

    def collect(self) -> Page:
        """Return the samples of this moment. What cannot be read is missing, and the page says so.

        A throttle that ends meanwhile is missing as well.
        """
        page = Page()
        page.add("build", 1, {"version": __version__})
        self._run(page, "throttles", self._add_throttles)
        if self._watch is not None:
            self._run(page, "traffic", self._add_traffic)
        _add_quotas(page, self._quotas())
        return page

    def _run(self, page: Page, name: str, add: Callable[[Page], None]) -> None:
        try:
            add(page)
        except (Error, OSError) as error:
            page.problems[name] = str(error)
        page.add("collector_success", name not in page.problems, {"collector": name})

    def _add_throttles(self, page: Page) -> None:
        found = self._throttles()
        page.add("throttles", len(found))
        for one in found[:_MOST_THROTTLES]:
            with suppress(Error, OSError):
                _add_throttle(page, one, self._counters(one))
        if len(found) > _MOST_THROTTLES:
            page.problems["throttles"] = f"only {_MOST_THROTTLES} of {len(found)} are told"

    def _add_traffic(self, page: Page) -> None:
        after = self._watch.snapshot() if self._watch else ()
        added: dict[str, dict[str, Moved]] = {kind: {} for kind in _KINDS}
        for one, moved in moved_since(self._before, after, SCOPES["network"]):
            for kind, sums in added.items():
                subject = _label(GROUPS[kind](one)) or NONE
                sums[subject] = sums.get(subject, Moved()).plus(moved)
        self._before = after
        for kind, subjects in self._subjects.items():
            subjects.add(added[kind], time.monotonic())
            for subject, total in subjects.sums().items():
                for direction in Direction:
                    labels = {kind: subject, "direction": direction}
                    page.add(f"traffic_by_{kind}_bytes", total[direction], labels)


def _add_throttle(page: Page, one: InForce, counters: Mapping[Direction, Counters]) -> None:
    record = one.record
    who = {"throttle": one.id, "name": record.spec.name}
    what = {
        "target": one.target,
        "match": record.match.value,
        "backends": ",".join(dict.fromkeys(part.backend for part in one.parts)),
        "kept": str(record.kept).lower(),
    }
    page.add("throttle", 1, {**who, **what})
    page.add("throttle_paused", bool(one.paused), who)
    page.add("throttle_supervised", record.supervised, who)
    for name, at_ns in (("start", record.since_ns), ("expiry", record.spec.expires_ns)):
        if at_ns:
            page.add(f"throttle_{name}_time_seconds", _time_s(at_ns), who)
    for direction, rate in one.limits.items():
        if rate is not None:
            name = "throttle_limit_bytes_per_second"
            page.add(name, rate.bytes_per_s, {**who, "direction": direction})
    for direction, counted in counters.items():
        for name, value in (
            ("passed_bytes", counted.bytes_passed),
            ("dropped_bytes", counted.bytes_dropped),
            ("passed_packets", counted.packets_total - counted.packets_dropped),
            ("dropped_packets", counted.packets_dropped),
        ):
            page.add(f"throttle_{name}", value, {**who, "direction": direction})


def _time_s(at_ns: int) -> float:
    """Return a time on CLOCK_BOOTTIME in seconds since 1970, rounded so that it stays the same."""
    return round(clock.boot_time_s() + at_ns / 1e9)


def _add_quotas(page: Page, quotas: Mapping[str, Decision]) -> None:
    for rule, decision in quotas.items():
        for one in decision.standings:
            labels = {"rule": rule, "period": one.period.value}
            page.add("quota_bytes", one.quota_bytes, labels)
            page.add("quota_used_bytes", one.used_bytes, labels)
            page.add("quota_end_time_seconds", one.ends_s, labels)


def write(path: str, text: str) -> None:
    """Write a file for node_exporter's textfile collector, or replace it, in one step.

    Raises OSError; then the file is as it was.
    """
    directory, name = os.path.split(os.path.abspath(path))
    # Neither this name ends in .prom, nor can somebody have guessed it.
    try:
        fd, draft = tempfile.mkstemp(prefix=f".{name}.", dir=directory)
        with ExitStack() as undo:
            undo.callback(os.unlink, draft)
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(fd, 0o644)
            os.rename(draft, path)
            undo.pop_all()
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
