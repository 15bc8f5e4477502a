"""pybpfthrottle cgroup show and tree: what is attached to cgroups, by whom."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from typing import Any, Iterator, Optional, Sequence

import click

from pybpfthrottle import cgroup as cgroups_v2
from pybpfthrottle import process
from pybpfthrottle.bpf import links, privileges, programs
from pybpfthrottle.bpf.abi import AttachType
from pybpfthrottle.bpf.links import AttachMode, LinkInfo
from pybpfthrottle.bpf.syscall import ENOTSUPP
from pybpfthrottle.cgroup import Cgroup
from pybpfthrottle.errors import CgroupError

# bpftool prints the same words.
_FLAGS = {
    AttachMode.SINGLE: "",
    AttachMode.ALLOW_OVERRIDE: "override",
    AttachMode.ALLOW_MULTIPLE: "multi",
}
_CGROUP_TYPES = [
    attach_type
    for attach_type in AttachType
    if attach_type.name.startswith("CGROUP_") or attach_type is AttachType.LSM_CGROUP
]


def show(path: str, *, effective: bool, as_json: bool) -> None:
    """What is attached to one cgroup; with ``effective`` also what its ancestors pass on."""
    found = list(_attached(cgroups_v2.from_path(path), _links(), effective=effective))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    elif found:
        _print_table(found)
    else:
        click.echo(f"Nothing is attached to {path}.")


def tree(path: Optional[str], *, as_json: bool) -> None:
    """What is attached to each cgroup at and below a path, or of all that are visible."""
    top = cgroups_v2.from_path(path) if path else cgroups_v2.root()
    by_program = _links()
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for directory, _, _ in os.walk(top.path):
        with suppress(CgroupError):  # one may vanish meanwhile
            attached = list(_attached(Cgroup(directory), by_program, effective=False))
            if attached:
                found.append((directory, attached))
    if as_json:
        records = [{"cgroup": directory, "programs": attached} for directory, attached in found]
        click.echo(json.dumps(records, indent=2))
    elif not found:
        click.echo(f"Nothing is attached at or below {top.path}.")
    else:
        for directory, attached in found:
            click.echo(directory)
            _print_table(attached, indent="  ")


def _links() -> dict[int, list[LinkInfo]]:
    """The links of the machine, by the program that they attach."""
    by_program: dict[int, list[LinkInfo]] = {}
    for link in links.all_links():
        by_program.setdefault(link.program_id, []).append(link)
    return by_program


def _attached(
    cgroup: Cgroup, by_program: dict[int, list[LinkInfo]], *, effective: bool
) -> Iterator[dict[str, Any]]:
    fd = cgroup.open()
    try:
        for attach_type in _CGROUP_TYPES:
            try:
                found = links.query(fd, attach_type, effective=effective)
            except OSError as error:
                # An attach type that this kernel does not have.
                if error.errno in (errno.EINVAL, errno.ENOTSUP, ENOTSUPP):
                    continue
                raise CgroupError(
                    f"cannot ask what is attached to {cgroup.path}:"
                    f" {privileges.why_refused(error, 'BPF_PROG_QUERY')}"
                ) from error
            for program_id in found.program_ids:
                own_links = [
                    link
                    for link in by_program.get(program_id, [])
                    if link.attach_type == attach_type
                    and (effective or link.cgroup_id == cgroup.id)
                ]
                yield _record(
                    program_id, attach_type, found.attach_flags, own_links, effective=effective
                )
    finally:
        os.close(fd)


def _record(
    program_id: int,
    attach_type: AttachType,
    attach_flags: int,
    own_links: list[LinkInfo],
    *,
    effective: bool,
) -> dict[str, Any]:
    record: dict[str, Any] = {"id": program_id, "attach_type": attach_type.name.lower()}
    # The kernel does not tell the flags of what is effective.
    if not effective:
        record["attach_flags"] = _FLAGS[AttachMode(attach_flags)]
    with suppress(OSError):  # it may be gone, or may not be looked at
        info = programs.info_by_id(program_id)
        record.update(name=info.name, tag=info.tag, uid=info.created_by_uid)
    record["links"] = [
        {"id": link.id, "pids": process.holders_of_link(link.id)} for link in own_links
    ]
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
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths))
        click.echo((indent + "  ".join(cells)).rstrip())
