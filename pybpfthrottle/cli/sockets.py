"""pybpfthrottle sockets: a process's sockets, which throttles cover them, or why none does."""

from __future__ import annotations

from typing import Any, Optional, Sequence

from pybpfthrottle.cli import tables
from pybpfthrottle.cli.say import echo, say
from pybpfthrottle.coverage import (
    CGROUP,
    MARK,
    PROCESS,
    Cover,
    Coverage,
    OpenSocket,
    Remark,
    Report,
)
from pybpfthrottle.errors import ProcessError
from pybpfthrottle.linux import process
from pybpfthrottle.linux.endpoints import Endpoint

SCHEMA = 1


def sockets(pids: Sequence[int], *, as_json: bool) -> int:
    """Show the sockets of processes; return the exit status."""
    reports: list[Report] = []
    errors: list[dict[str, Any]] = []
    with Coverage() as coverage:
        for pid in dict.fromkeys(pids):
            try:
                reports.append(coverage.report(pid))
            except ProcessError as error:
                errors.append({"pid": pid, "text": str(error)})
    if as_json:
        processes = [_record(report) for report in reports]
        tables.show_json({"schema": SCHEMA, "processes": processes, "errors": errors})
    else:
        for report in reports:
            _show(report)
        for reason in dict.fromkeys(report.unknown for report in reports if report.unknown):
            say(f"cannot tell which throttles limit these: {reason}")
    for failed in errors:
        say(f"error: {failed['text']}")
    return 1 if errors else 0


def _show(report: Report) -> None:
    echo(_headline(report))
    if report.sockets:
        head = ("fd", "inode", "socket", "local", "remote", "state", "limited")
        tables.show([head, *map(_row, report.sockets)], indent="  ")


def _headline(report: Report) -> str:
    name = f"{report.process.pid} ({report.process.name})"
    if not report.sockets:
        return f"{name} has no sockets"
    count = len(report.sockets)
    text = f"{name} has {count} socket{'s' if count > 1 else ''}"
    if report.unknown is None:
        text += f", {sum(one.covered is True for one in report.sockets)} of them limited"
    return text


def _row(one: OpenSocket) -> tuple[str, ...]:
    ends = (one.description.local, one.description.remote, one.description.state)
    limited = "; ".join([*map(_cover, one.covers), *(note.text for note in one.notes)])
    if one.reason is not None:
        limited = one.reason.text if one.covered is None else f"no: {one.reason.text}"
    return (
        str(one.fd),
        str(one.inode),
        one.description.kind.words,
        *("" if end is None else str(end) for end in ends),
        limited,
    )


def _cover(cover: Cover) -> str:
    directions = " and ".join(map(str, cover.directions))
    gone = ", which has ended" if process.is_gone(cover.owner) else ""
    how = {MARK: "a mark", CGROUP: "its cgroup", PROCESS: "its process"}[cover.by]
    return f"{directions}, by process {cover.owner.pid}{gone} ({how})"


def _record(report: Report) -> dict[str, Any]:
    return {
        "pid": report.process.pid,
        "name": report.process.name,
        "cgroup": report.cgroup.path if report.cgroup else None,
        "unknown": report.unknown,
        "sockets": [_socket_record(one) for one in report.sockets],
    }


def _socket_record(one: OpenSocket) -> dict[str, Any]:
    kind = one.description.kind
    return {
        "fd": one.fd,
        "inode": one.inode,
        "family": None if kind.family is None else kind.family_name,
        "type": None if kind.type is None else kind.type_name,
        "protocol": kind.protocol_name,
        "local": _endpoint_record(one.description.local),
        "remote": _endpoint_record(one.description.remote),
        "state": one.description.state,
        "cgroup": one.cgroup.path if one.cgroup else None,
        "cgroup_assumed": one.cgroup_assumed,
        "covered": one.covered,
        "covered_by": [
            {
                "owner_pid": cover.owner.pid,
                "owner_ended": process.is_gone(cover.owner),
                "by": cover.by,
                "directions": [str(direction) for direction in cover.directions],
            }
            for cover in one.covers
        ],
        "reason": _remark_record(one.reason),
        "notes": [_remark_record(note) for note in one.notes],
        "shared_with": list(one.shared_with),
    }


def _endpoint_record(end: Optional[Endpoint]) -> Optional[dict[str, Any]]:
    return None if end is None else {"address": end.address, "port": end.port}


def _remark_record(remark: Optional[Remark]) -> Optional[dict[str, str]]:
    return None if remark is None else {"code": remark.code, "text": remark.text}
