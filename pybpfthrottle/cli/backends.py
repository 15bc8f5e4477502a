"""pybpfthrottle backends: the ways to limit, and whether they work here."""

from __future__ import annotations

from typing import Any, Optional

from pybpfthrottle.backends.protocol import Backend, Match, all_backends
from pybpfthrottle.cli import tables
from pybpfthrottle.cli.say import echo
from pybpfthrottle.demo.packet import Packet
from pybpfthrottle.errors import Error, NamespaceError
from pybpfthrottle.model import Direction

SCHEMA = 1
# The order of the seeds.
_DIRECTIONS = (Direction.UPLOAD, Direction.DOWNLOAD)


def show(*, as_json: bool, try_them: bool) -> int:
    """List the backends; with ``try_them`` send a packet through each. Return the exit status."""
    backends = list(all_backends())
    records = {backend.name: _record(backend) for backend in backends}
    if try_them:
        for backend in backends:
            for direction in _DIRECTIONS:
                if records[backend.name][str(direction)]["available"]:
                    records[backend.name][str(direction)].update(_try(backend, direction))
    if as_json:
        tables.show_json({"schema": SCHEMA, "backends": list(records.values())})
    else:
        for direction in _DIRECTIONS:
            echo(f"{str(direction).capitalize()} Backends:")
            for backend in backends:
                if direction in backend.directions:
                    record = records[backend.name]
                    echo(_line(record, record[str(direction)]))
    tried = [
        record[str(direction)].get("counted", True)
        for record in records.values()
        for direction in _DIRECTIONS
    ]
    return 0 if all(tried) else 1


def _record(backend: Backend) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": backend.name,
        "priority": backend.priority.name.lower(),
        "rank": int(backend.priority),
    }
    for direction in _DIRECTIONS:
        offers = [backend.offer(direction, match) for match in Match]
        able = [offer for offer in offers if offer.refused is None]
        found[str(direction)] = {
            "available": bool(able),
            "reason": None if able else backend.unavailable(direction),
            "matches": [offer.match.value for offer in able],
            "loses": list(dict.fromkeys(loss for offer in able for loss in offer.loses)),
        }
    return found


def _try(backend: Backend, direction: Direction) -> dict[str, Any]:
    """Return whether a packet was counted, and if not, why, as far as that is known."""
    error: Optional[str] = None
    counted = False
    try:
        counted = Packet(direction).is_counted_by(backend.name)
    except NamespaceError:
        raise
    except Error as failure:
        error = str(failure)
    return {"counted": counted, "error": error}


def _line(record: dict[str, Any], offered: dict[str, Any]) -> str:
    priority = f"[priority: {record['priority'].capitalize()}]"
    mark = "✅ available" if offered["available"] else f"❌ unavailable: {offered['reason']}"
    if offered.get("counted"):
        mark += ", and a packet was counted"
    elif "counted" in offered:
        mark = f"❌ fails: {offered['error'] or 'a packet has passed uncounted'}"
    return f"  {record['name']:<11} {priority} {mark}"
