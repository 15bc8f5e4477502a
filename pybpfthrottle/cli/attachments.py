"""pybpfthrottle cgroup show and tree: what is attached to cgroups, by whom."""

from __future__ import annotations

import json
from typing import Any, Iterator, Optional, Sequence

from pybpfthrottle.backends.ebpf import attached, privileges
from pybpfthrottle.backends.ebpf.attached import Attached, Links
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.links import AttachMode
from pybpfthrottle.cli import tables
from pybpfthrottle.cli.say import echo, echo_json
from pybpfthrottle.errors import CgroupError
from pybpfthrottle.linux import cgroup as cgroups_v2
from pybpfthrottle.linux import process
from pybpfthrottle.linux.cgroup import Cgroup

# bpftool prints the same words.
FLAGS = {
    AttachMode.SINGLE: "",
    AttachMode.ALLOW_OVERRIDE: "override",
    AttachMode.ALLOW_MULTIPLE: "multi",
}


def show(path: str, *, effective: bool, as_json: bool) -> None:
    """What is attached to one cgroup; with ``effective`` also what its ancestors pass on."""
    cgroup = cgroups_v2.from_path(path)
    found = _records(cgroup, Links(), effective=effective)
    if as_json:
        echo_json(json.dumps(found, indent=2))
        return
    if found:
        _print_table(found)
    else:
        echo(f"Nothing is attached to {path}.")
    for line in _overriding(cgroup):
        echo(line)


def _overriding(cgroup: Cgroup) -> Iterator[str]:
    """Tell what is switched off for a cgroup, or would be by what is attached to it."""
    for hook in attached.CGROUP_TYPES:
        for one in attached.overridden(cgroup, hook):
            yield (
                f"Any program attached to it at {hook.name.lower()} would switch off {one} for it,"
                f" which is attached to {one.cgroup.path} with BPF_F_ALLOW_OVERRIDE."
            )
        for one in _switched_off(cgroup, hook):
            yield (
                f"A program attached at {hook.name.lower()} has switched off {one} for it,"
                f" which is attached to {one.cgroup.path} with BPF_F_ALLOW_OVERRIDE."
            )


def _switched_off(cgroup: Cgroup, hook: AttachType) -> list[Attached]:
    try:
        return attached.silenced(cgroup, hook)
    except OSError:  # its own are told all the same
        return []


def tree(path: Optional[str], *, as_json: bool) -> None:
    """Show what is attached to each cgroup at and below a path, or to all visible ones."""
    top = cgroups_v2.root() if path is None else cgroups_v2.from_path(path)
    known = Links()
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for cgroup in cgroups_v2.walk(top):
        try:
            records = _records(cgroup, known, effective=False)
        except CgroupError:
            if cgroup.exists():
                raise
            continue  # vanished meanwhile
        if records:
            found.append((cgroup.path, records))
    if as_json:
        echo_json(
            json.dumps(
                [{"cgroup": directory, "programs": records} for directory, records in found],
                indent=2,
            )
        )
    elif not found:
        echo(f"Nothing is attached at or below {top.path}.")
    else:
        for directory, records in found:
            echo(directory)
            _print_table(records, indent="  ")


def _records(cgroup: Cgroup, known: Links, *, effective: bool) -> list[dict[str, Any]]:
    try:
        found = list(attached.at(cgroup, effective=effective, known=known))
        return [_record(one, cgroup, effective=effective) for one in found]
    except OSError as error:
        raise CgroupError(
            f"cannot query the programs attached to {cgroup.path}:"
            f" {privileges.why_refused(error, 'BPF_PROG_QUERY')}"
        ) from error


def _record(one: Attached, cgroup: Cgroup, *, effective: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"id": one.program_id, "attach_type": one.attach_type.name.lower()}
    if one.mode is not None:
        record["attach_flags"] = FLAGS[one.mode]
    if effective:
        # The kernel tells no modes then; this one matters to whoever wants to attach something.
        for other in attached.overridden(cgroup, one.attach_type):
            if other.program_id == one.program_id and other.mode is not None:
                record.update(cgroup=other.cgroup.path, attach_flags=FLAGS[other.mode])
    record["switches_off"] = [
        {"id": other.program_id, "cgroup": other.cgroup.path}
        for other in _switched_off(cgroup, one.attach_type)
    ]
    if one.info is not None:
        record.update(name=one.info.name, tag=one.info.tag, uid=one.info.created_by_uid)
    record["links"] = [{"id": link.id, "pids": list(link.pids)} for link in one.links]
    return record


def _print_table(found: Sequence[dict[str, Any]], *, indent: str = "") -> None:
    rows: list[tuple[str, ...]] = [
        ("id", "attach type", "flags", "name", "tag", "uid", "link: held by")
    ]
    for record in found:
        owners = ", ".join(
            f"{link['id']}: {process.listed(link['pids']) or '?'}" for link in record["links"]
        )
        rows.append(
            (
                str(record["id"]),
                record["attach_type"],
                record.get("attach_flags", ""),
                record.get("name", "?"),
                record.get("tag", "?"),
                str(record.get("uid", "?")),
                owners or "no link",
            )
        )
    tables.show(rows, indent=indent)
