"""pybpfthrottle list, show, set, remove and switch: the throttles that are in force."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence

from pybpfthrottle import registry
from pybpfthrottle.backends.protocol import Record
from pybpfthrottle.cli import tables
from pybpfthrottle.cli.say import echo
from pybpfthrottle.errors import ProcessError, ThrottleError
from pybpfthrottle.linux import clock, process
from pybpfthrottle.linux.process import Process
from pybpfthrottle.model import Direction, Rate
from pybpfthrottle.throttle import Throttle, open_record

SCHEMA = 1


class Which(NamedTuple):
    """How throttles are chosen: by id or name, or by what they limit."""

    name: Optional[str]
    pid: Optional[int]
    cgroup: Optional[str]
    unit: Optional[str]

    def mistake(self, all_of_them: Optional[bool] = None) -> Optional[str]:
        """Return what is wrong, or None; ``all_of_them`` is None if it is not offered."""
        given = sum(value is not None for value in self) + bool(all_of_them)
        if given == 1:
            return None
        more = "" if all_of_them is None else ", or --all"
        return f"give exactly one of ID, --pid, --cgroup, --unit{more}"

    def records(self) -> list[Record]:
        """Return the throttles meant. Raises ThrottleError if there are none."""
        found = _all(lambda: registry.find(**self._asdict()))
        if not found:
            what = next(
                f"{option}{value}"
                for option, value in zip(("", "--pid ", "--cgroup ", "--unit "), self)
                if value is not None
            )
            raise ThrottleError(
                f"there is no throttle {what}; pybpfthrottle list shows all throttles"
            )
        return found


def _all(find: Callable[[], list[Record]]) -> list[Record]:
    try:
        return find()
    except OSError as error:
        raise ThrottleError(f"cannot list the throttles of this machine: {_why(error)}") from error


def _why(error: OSError) -> str:
    from pybpfthrottle.backends.ebpf import privileges

    return privileges.why_refused(error, str(error.filename or "the query"))


def show_all(*, as_json: bool) -> None:
    """List the throttles in force."""
    records = _all(registry.records)
    if as_json:
        tables.show_json({"schema": SCHEMA, "throttles": [_record(each) for each in records]})
        return
    if not records:
        echo("Nothing is limited.")
        return
    head = ("id", "name", "target", "download", "upload", "by process")
    tables.show([head, *map(_row, records)])


def show(which: Which, *, as_json: bool) -> None:
    """Show throttles with their counters."""
    shown = []
    for record in which.records():
        with _opened(record) as throttle:
            shown.append(_details(record, throttle))
    if as_json:
        tables.show_json({"schema": SCHEMA, "throttles": shown})
        return
    for details in shown:
        _print(details)


def change(which: Which, limits: dict[Direction, Optional[Rate]], method: Optional[str]) -> None:
    """Change limits, or how they are attached."""
    for record in which.records():
        _change(record, limits, method)


def remove(which: Which, *, all_of_them: bool) -> None:
    """Remove throttles, whoever made them."""
    records = _all(registry.records) if all_of_them else which.records()
    for record in records:
        with _opened(record) as throttle:
            throttle.remove()
        echo(f"Removed {record.id}: {_target(record)}.")
    if not records:
        echo("Nothing is limited.")


def switch(pid: int, method: str) -> None:
    """Ask an instance to attach all of its throttles by another method."""
    owner = Process(pid)
    records = [
        record for record in _all(registry.records) if process.same(record.owner, owner.identity)
    ]
    if not records:
        raise ProcessError(
            f"process {pid} ({owner.name}) is not a pybpfthrottle that keeps a limit"
        )
    for record in records:
        _change(record, {}, method)


def _change(record: Record, limits: dict[Direction, Optional[Rate]], method: Optional[str]) -> None:
    with _opened(record) as throttle:
        for direction, rate in limits.items():
            throttle.set_limit(direction, rate)
        if method is not None:
            throttle.switch(method)
        changed = [f"{direction} {rate or 'unlimited'}" for direction, rate in limits.items()]
        changed += [f"attached by {method}"] if method is not None else []
    echo(f"Changed {record.id}: {', '.join(changed)}.")


@contextmanager
def _opened(record: Record) -> Iterator[Throttle]:
    """Open another process's throttle for a moment."""
    throttle = open_record(record)
    try:
        yield throttle
    finally:
        throttle.close()


def _target(record: Record) -> str:
    """Return what is limited, in words."""
    target = record.spec.target
    parts = []
    if target.command:
        parts.append("the command " + " ".join(target.command))
    if target.pids:
        parts.append(process.listed(target.pids))
    parts += [f"named {name}" for name in target.names]
    parts += [f"running {path}" for path in target.executables]
    parts += [f"of user {user}" for user in target.users]
    parts += [f"unit {name}" for name in target.units]
    parts += target.cgroups
    return ", ".join(parts) or ", ".join(record.cgroups) or "unknown (of an older version)"


def _row(record: Record) -> tuple[str, ...]:
    limits = record.spec.limits
    return (
        record.id,
        record.spec.name,
        _target(record),
        *(
            str(limits[direction] or "unlimited") if direction in limits else ""
            for direction in Direction
        ),
        process.listed([record.owner.pid]),
    )


def _record(record: Record) -> dict[str, Any]:
    limits = record.spec.limits
    rates = {direction: limits.get(direction) for direction in Direction}
    return {
        "id": record.id,
        "name": record.spec.name,
        "target": {
            **record.spec.target.to_json(),
            "cgroups": list(record.cgroups),
            "text": _target(record),
        },
        "limits": {
            str(direction): rate.bytes_per_s if rate else None for direction, rate in rates.items()
        },
        "owner_pid": record.owner.pid,
        "kept": record.kept,
        "backends": {str(direction): record.backend for direction in limits},
        "match": record.match.value,
        "attached_by": record.attached_by,
        "since_s": _age_s(record),
    }


def _details(record: Record, throttle: Throttle) -> dict[str, Any]:
    return {
        **_record(record),
        "processes": throttle.processes(),
        "how": {str(direction): how for direction, how in throttle.how().items()},
        "counters": {
            str(direction): counters._asdict()
            for direction, counters in throttle.counters().items()
        },
    }


def _age_s(record: Record) -> Optional[float]:
    if not record.since_ns:
        return None
    return round((clock.boottime_ns() - record.since_ns) / 1e9, 1)


def _print(details: dict[str, Any]) -> None:
    rows: list[Sequence[str]] = [
        ("id", details["id"]),
        ("name", details["name"] or "-"),
        ("target", details["target"]["text"]),
        ("owner", process.listed([details["owner_pid"]])),
        ("matched by", details["match"]),
        ("attached by", details["attached_by"]),
    ]
    for direction, how in details["how"].items():
        rate = details["limits"][direction]
        counters = details["counters"][direction]
        rows.append((direction, f"{Rate(rate) if rate else 'unlimited'} ({how['shape']})"))
        rows.append(
            ("", f"{counters['bytes_total']} bytes, {counters['packets_dropped']} packets dropped")
        )
    if details["processes"]:
        rows.append(("processes", process.listed(details["processes"])))
    tables.show(rows)
    echo()
