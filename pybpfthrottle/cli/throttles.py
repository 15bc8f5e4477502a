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
from pybpfthrottle.model import Direction, Rate, Traffic
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
    throttles = _by_id(records)
    if as_json:
        tables.show_json({"schema": SCHEMA, "throttles": [_record(each) for each in throttles]})
        return
    if not throttles:
        echo("Nothing is limited.")
        return
    head = ("id", "name", "target", "download", "upload", "by process")
    tables.show([head, *map(_row, throttles)])


def show(which: Which, *, as_json: bool) -> None:
    """Show throttles with their counters."""
    shown = [_details(parts) for parts in _by_id(which.records())]
    if as_json:
        tables.show_json({"schema": SCHEMA, "throttles": shown})
        return
    for details in shown:
        _print(details)


def change(which: Which, limits: dict[Direction, Optional[Rate]], method: Optional[str]) -> None:
    """Change limits, or how they are attached."""
    for parts in _by_id(which.records()):
        _change(parts, limits, method)


def pause(which: Which) -> None:
    """Lift limits for now."""
    for parts in _by_id(which.records()):
        if _paused(parts):
            raise ThrottleError(f"{parts[0].id} is paused already")
        for record in parts:
            with _opened(record) as throttle:
                throttle.pause()
        echo(f"Paused {parts[0].id}; pybpfthrottle resume {parts[0].id} puts its limits back.")


def resume(which: Which) -> None:
    """Put back limits that were lifted for now."""
    for parts in _by_id(which.records()):
        paused = _paused(parts)
        if not paused:
            raise ThrottleError(f"{parts[0].id} is not paused")
        for record in parts:
            with _opened(record) as throttle:
                throttle.resume()
        limits = ", ".join(f"{direction} {rate}" for direction, rate in paused.items())
        echo(f"Resumed {parts[0].id}: {limits}.")


def remove(which: Which, *, all_of_them: bool) -> None:
    """Remove throttles, whoever made them."""
    records = _all(registry.records) if all_of_them else which.records()
    for parts in _by_id(records):
        for record in parts:
            with _opened(record) as throttle:
                throttle.remove()
        echo(f"Removed {parts[0].id}: {_target(parts[0])}.")
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
    for parts in _by_id(records):
        _change(parts, {}, method)


# A throttle has a record for each of its backends, all with the same id.
_Parts = Sequence[Record]


def _by_id(records: Sequence[Record]) -> list[_Parts]:
    """Return the records of each throttle."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.id, []).append(record)
    return list(found.values())


def _change(parts: _Parts, limits: dict[Direction, Optional[Rate]], method: Optional[str]) -> None:
    limited = _limits(parts)
    for record in parts:
        with _opened(record) as throttle:
            for direction, rate in limits.items():
                # What no part limits is refused by the first one.
                if direction in record.spec.limits or direction not in limited:
                    throttle.set_limit(direction, rate)
            if method is not None:
                throttle.switch(method)
    changed = [f"{direction} {rate or 'unlimited'}" for direction, rate in limits.items()]
    changed += [f"attached by {method}"] if method is not None else []
    echo(f"Changed {parts[0].id}: {', '.join(changed)}.")


def _limits(parts: _Parts) -> dict[Direction, Optional[Rate]]:
    return {direction: rate for record in parts for direction, rate in record.spec.limits.items()}


def _paused(parts: _Parts) -> dict[Direction, Optional[Rate]]:
    return {direction: rate for record in parts for direction, rate in record.spec.paused.items()}


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
    what = ", ".join(parts) or ", ".join(record.cgroups) or "unknown (of an older version)"
    return what + _networks(record.spec.traffic)


def _networks(traffic: Traffic) -> str:
    """Return which networks are limited, as options."""
    words = [f"--traffic {traffic.kind}"] if traffic.kind != "all" else []
    words += [f"--to {one}" for one in traffic.to]
    words += [f"--except {one}" for one in traffic.but]
    return f" ({' '.join(words)})" if words else ""


def _row(parts: _Parts) -> tuple[str, ...]:
    record, limits, paused = parts[0], _limits(parts), _paused(parts)
    return (
        record.id,
        record.spec.name,
        _target(record),
        *(
            _limit(limits[direction], paused.get(direction)) if direction in limits else ""
            for direction in Direction
        ),
        _owner(record.owner.pid, record.supervised),
    )


def _limit(rate: Optional[Rate], paused: Optional[Rate]) -> str:
    return f"{paused} (paused)" if paused is not None else str(rate or "unlimited")


def _owner(pid: int, supervised: bool) -> str:
    """Return who keeps a throttle, for people."""
    return process.listed([pid]) if supervised else "the kernel alone"


def _record(parts: _Parts) -> dict[str, Any]:
    record, limits = parts[0], _limits(parts)
    rates = {direction: limits.get(direction) for direction in Direction}
    return {
        "id": record.id,
        "name": record.spec.name,
        "target": {
            **record.spec.target.to_json(),
            "cgroups": list(record.cgroups),
            "text": _target(record),
        },
        "traffic": {
            "kind": record.spec.traffic.kind,
            "to": list(record.spec.traffic.to),
            "except": list(record.spec.traffic.but),
        },
        "limits": {
            str(direction): rate.bytes_per_s if rate else None for direction, rate in rates.items()
        },
        "paused": {
            str(direction): rate.bytes_per_s for direction, rate in _paused(parts).items() if rate
        },
        "owner_pid": record.owner.pid,
        "kept": record.kept,
        "supervised": record.supervised,
        "expires_in_s": _left_s(record),
        "backends": {
            str(direction): part.backend for part in parts for direction in part.spec.limits
        },
        "match": record.match.value,
        "attached_by": ", ".join(dict.fromkeys(part.attached_by for part in parts)),
        "since_s": _age_s(record),
    }


def _details(parts: _Parts) -> dict[str, Any]:
    processes: set[int] = set()
    how, counters = {}, {}
    for record in parts:
        with _opened(record) as throttle:
            processes.update(throttle.processes())
            how.update({str(direction): how for direction, how in throttle.how().items()})
            counters.update(
                {str(d): counted._asdict() for d, counted in throttle.counters().items()}
            )
    return {**_record(parts), "processes": sorted(processes), "how": how, "counters": counters}


def _left_s(record: Record) -> Optional[float]:
    if not record.spec.expires_ns:
        return None
    return round((record.spec.expires_ns - clock.boottime_ns()) / 1e9, 1)


def _age_s(record: Record) -> Optional[float]:
    if not record.since_ns:
        return None
    return round((clock.boottime_ns() - record.since_ns) / 1e9, 1)


def _print(details: dict[str, Any]) -> None:
    rows: list[Sequence[str]] = [
        ("id", details["id"]),
        ("name", details["name"] or "-"),
        ("target", details["target"]["text"]),
        ("owner", _owner(details["owner_pid"], details["supervised"])),
        ("matched by", details["match"]),
        ("attached by", details["attached_by"]),
    ]
    for direction, how in details["how"].items():
        rate = details["limits"][direction]
        counters = details["counters"][direction]
        paused = details["paused"].get(direction)
        limit = _limit(Rate(rate) if rate else None, Rate(paused) if paused else None)
        rows.append((direction, f"{limit} ({how['shape']})"))
        rows.append(
            ("", f"{counters['bytes_total']} bytes, {counters['packets_dropped']} packets dropped")
        )
    if details["processes"]:
        rows.append(("processes", process.listed(details["processes"])))
    tables.show(rows)
    echo()
