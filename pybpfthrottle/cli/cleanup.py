"""pybpfthrottle cleanup: remove the leftovers of a crash."""

from __future__ import annotations

import json
from typing import Any

from pybpfthrottle import wayout
from pybpfthrottle.backends.ebpf import privileges
from pybpfthrottle.backends.protocol import Leftover, all_backends
from pybpfthrottle.cli.say import echo, echo_json
from pybpfthrottle.errors import ThrottleError
from pybpfthrottle.linux import own_cgroups
from pybpfthrottle.linux.cgroup import Cgroup
from pybpfthrottle.wayout import WayOut


def cleanup(*, dry_run: bool, as_json: bool) -> None:
    """Remove, or with ``dry_run`` only list, the leftovers of a crash."""
    missing = privileges.missing_capabilities()
    if missing:
        raise ThrottleError(
            f"cannot look for leftovers: {privileges.why_not_permitted('the search')}"
        )
    found = [leftover for backend in all_backends() for leftover in backend.leftovers()]
    abandoned = own_cgroups.abandoned() if dry_run else []
    ways_out = wayout.abandoned() if dry_run else wayout.tidy_up()
    if not dry_run:
        for leftover in found:
            leftover.remove()
        abandoned = own_cgroups.remove_abandoned()
    if as_json:
        echo_json(json.dumps(_record(found, abandoned, ways_out, dry_run=dry_run), indent=2))
        return
    verb = "would remove" if dry_run else "removed"
    for leftover in found:
        echo(f"{verb} {leftover}")
    for cgroup in abandoned:
        echo(f"{verb} the cgroup {cgroup.path}")
    for way in ways_out:
        echo(f"{verb} {way}")
    if not (found or abandoned or ways_out):
        echo("Nothing is left from a crash.")


def _record(
    found: list[Leftover], abandoned: list[Cgroup], ways_out: list[WayOut], *, dry_run: bool
) -> dict[str, Any]:
    kinds: dict[str, list[dict[str, Any]]] = {"programs": []}
    for leftover in found:
        kinds.setdefault(leftover.kind, []).append(leftover.to_json())
    if ways_out:
        kinds["ways_out"] = [{"id": way.id, "networks": list(way.networks)} for way in ways_out]
    return {"dry_run": dry_run, **kinds, "cgroups": [cgroup.path for cgroup in abandoned]}
