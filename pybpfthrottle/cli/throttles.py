"""pybpfthrottle list, show, set, remove and switch: the throttles that are in force."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence

from pybpfthrottle import registry
from pybpfthrottle.backends.protocol import Record
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.cli import tables
from pybpfthrottle.cli.say import echo, why
from pybpfthrottle.errors import ProcessError, ThrottleError
from pybpfthrottle.inforce import InForce, in_force, limit, owner
from pybpfthrottle.linux import clock, process
from pybpfthrottle.linux.process import Process
from pybpfthrottle.model import Direction, Rate

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
        raise ThrottleError(f"cannot list the throttles of this machine: {why(error)}") from error


def show_all(*, as_json: bool) -> None:
    """List the throttles in force."""
    records = _all(registry.records)
    throttles = in_force(records)
    if as_json:
        tables.show_json({"schema": SCHEMA, "throttles": [_record(each) for each in throttles]})
        return
    if not throttles:
        echo("Nothing is limited.")
        return
    kept = {one.record.owner: one for one in throttles}  # one process may keep many
    owners = {owner: one.owner for owner, one in kept.items()}
    head = ("id", "name", "target", "download", "upload", "by process")
    tables.show([head, *(_row(one, owners[one.record.owner]) for one in throttles)])


def show(which: Which, *, as_json: bool) -> None:
    """Show throttles with their counters."""
    shown = [_details(one) for one in in_force(which.records())]
    if as_json:
        tables.show_json({"schema": SCHEMA, "throttles": shown})
        return
    for details in shown:
        _print(details)


def change(which: Which, limits: dict[Direction, Optional[Rate]], method: Optional[str]) -> None:
    """Change limits, or how they are attached."""
    for one in in_force(which.records()):
        _change(one, limits, method)


def pause(which: Which) -> None:
    """Lift limits for now."""
    for one in in_force(which.records()):
        one.pause()
        echo(f"Paused {one.id}; pybpfthrottle resume {one.id} puts its limits back.")


def resume(which: Which) -> None:
    """Put back limits that were lifted for now."""
    for one in in_force(which.records()):
        one.resume()
        limits = ", ".join(f"{direction} {rate}" for direction, rate in one.paused.items())
        echo(f"Resumed {one.id}: {limits}.")


def remove(which: Which, *, all_of_them: bool) -> None:
    """Remove throttles, whoever made them."""
    records = _all(registry.records) if all_of_them else which.records()
    for one in in_force(records):
        one.remove()
        echo(f"Removed {one.id}: {one.target}.")
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
    for one in in_force(records):
        _change(one, {}, method)


def _change(one: InForce, limits: dict[Direction, Optional[Rate]], method: Optional[str]) -> None:
    one.set_limits(limits)
    if method is not None:
        one.switch(method)
    changed = [f"{direction} {rate or 'unlimited'}" for direction, rate in limits.items()]
    changed += [f"attached by {method}"] if method is not None else []
    echo(f"Changed {one.id}: {', '.join(changed)}.")


def _row(one: InForce, owner: str) -> tuple[str, ...]:
    record = one.record
    return (
        record.id,
        record.spec.name,
        tables.shortened(one.target) + (" (waits)" if one.waits else ""),
        *(one.limit(direction) if direction in one.limits else "" for direction in Direction),
        owner,
    )


def _record(one: InForce) -> dict[str, Any]:
    record, limits = one.record, one.limits
    rates = {direction: limits.get(direction) for direction in Direction}
    return {
        "id": record.id,
        "name": record.spec.name,
        "target": {
            **record.spec.target.to_json(),
            "cgroups": list(record.cgroups),
            "text": one.target,
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
            str(direction): rate.bytes_per_s for direction, rate in one.paused.items() if rate
        },
        "owner_pid": record.owner.pid,
        "kept": record.kept,
        "supervised": record.supervised,
        "waits": one.waits,
        "expires_in_s": _left_s(record),
        "backends": {
            str(direction): part.backend for part in one.parts for direction in part.spec.limits
        },
        "match": record.match.value,
        "attached_by": ", ".join(dict.fromkeys(part.attached_by for part in one.parts)),
        "since_s": _age_s(record),
    }


def _details(one: InForce) -> dict[str, Any]:
    processes: set[int] = set()
    how, counters = {}, {}
    with one.opened() as parts:
        for _, throttle in parts:
            processes.update(throttle.processes())
            how.update({str(direction): how for direction, how in throttle.how().items()})
            counters.update(
                {str(d): counted._asdict() for d, counted in throttle.counters().items()}
            )
    return {**_record(one), "processes": sorted(processes), "how": how, "counters": counters}


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
        ("owner", owner(details["owner_pid"], details["supervised"])),
        ("matched by", details["match"]),
        ("attached by", details["attached_by"]),
    ]
    for direction, how in details["how"].items():
        rate = details["limits"][direction]
        counters = details["counters"][direction]
        paused = details["paused"].get(direction)
        shown = limit(*(None if one is None else Rate(one) for one in (rate, paused)))
        rows.append((direction, f"{shown} ({how['shape']})"))
        rows.append(
            ("", f"{counters['bytes_total']} bytes, {counters['packets_dropped']} packets dropped")
        )
        if "udp" in how:
            rows.append(("", f"UDP over the limit: {how['udp']} ({how['udp_reason']})"))
    if details["waits"]:
        rows.append(("processes", "none yet: it waits for those of the rule"))
    if details["processes"]:
        rows.append(("processes", process.listed(details["processes"])))
    tables.show(rows)
    echo()
