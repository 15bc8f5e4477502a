"""pybpfthrottle bpf prog, map and link: which objects are meant, and what the kernel says of them.

The keys of the records are bpftool's.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from functools import cache
from typing import Any, Callable, Iterator, NamedTuple, Optional

import click

from pybpfthrottle.backends.ebpf import attached, privileges
from pybpfthrottle.bpf import links, maps, programs, syscall
from pybpfthrottle.bpf.abi import AttachType, LinkType, MapType, ProgType
from pybpfthrottle.bpf.links import LinkInfo
from pybpfthrottle.bpf.maps import MapInfo
from pybpfthrottle.bpf.program_info import ProgramInfo
from pybpfthrottle.cli import tables
from pybpfthrottle.errors import BpfError
from pybpfthrottle.linux import clock

Record = dict[str, Any]
# Null in a record. Fields that do not apply are absent.
UNKNOWN = object()


class Kind(NamedTuple):
    """A kind of object: its name, how to find one, and what to show."""

    word: str
    all_ids: Callable[[], Iterator[int]]
    by_id: Callable[[int], Any]
    pinned: Callable[[str], Any]
    record: Callable[[Any], Record]


def show(kind: Kind, target: Optional[str], name: Optional[str], *, as_json: bool) -> None:
    """Show what the kernel says about one object, those with a name, or all."""
    is_list = target is None and name is None
    with refused(f"show a {kind.word}"):
        found = _all(kind) if is_list else opened(kind, target, name)
        records = [kind.record(live.info()) for live in found]
    if as_json and target is not None:
        tables.show_json(records[0])
    else:
        tables.show_records(records, as_json=as_json, none=f"There is no {kind.word}.")


def opened(kind: Kind, target: Optional[str], name: Optional[str]) -> Iterator[Any]:
    """Yield the objects meant, each open until the next is requested.

    Raises UsageError if none is specified, and BpfError or OSError if there is none.
    """
    if (target is None) == (name is None):
        raise click.UsageError("give an id, the path that it is pinned to, or --name NAME")
    if target is None:
        yield from _named(kind, name or "")
        return
    try:
        live = kind.by_id(int(target)) if target.isdecimal() else kind.pinned(target)
    except FileNotFoundError as error:
        what = f"{kind.word} with id" if target.isdecimal() else "object pinned at"
        raise BpfError(f"there is no {what} {target}", errno=errno.ENOENT) from error
    with live:
        yield live


def one(kind: Kind, target: Optional[str], name: Optional[str]) -> Iterator[Any]:
    """Return the one object meant. Raises as ``opened`` does, and BpfError if there are several."""
    if name is not None and target is None:
        found = [live.info().id for live in _named(kind, name)]
        if len(found) > 1:
            ids = ", ".join(map(str, found))
            raise BpfError(f"there are {len(found)} {kind.word}s named {name!r}: give an id: {ids}")
        target, name = str(found[0]), None
    return opened(kind, target, name)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn the kernel's refusal into one clear line."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        why = privileges.why_refused(error, str(error.filename))
        if why == str(error):
            why = f"{error.strerror} ({syscall.errno_name(number)} of {error.filename or 'bpf(2)'})"
        where = f" {error.filename2}" if error.filename2 else ""
        raise BpfError(f"cannot {what}{where}: {why}", errno=number) from error


def _named(kind: Kind, name: str) -> Iterator[Any]:
    found = False
    for live in _all(kind):
        # The kernel keeps the first 15 characters.
        if live.info().name == maps.legal_name(name).decode():
            found = True
            yield live
    if not found:
        raise BpfError(f"there is no {kind.word} named {name!r}")


def _all(kind: Kind) -> Iterator[Any]:
    for number in kind.all_ids():
        try:
            live = kind.by_id(number)
        except FileNotFoundError:  # ended meanwhile
            continue
        with live:
            yield live


def program_record(info: ProgramInfo) -> Record:
    """A program, as bpftool tells it."""
    return _without_nothing(
        id=info.id,
        type=_name(ProgType, info.type),
        name=info.name,
        tag=info.tag,
        gpl_compatible=info.gpl_compatible,
        **_loaded(info),
        run_time_ns=info.run_time_ns or None,
        run_cnt=info.run_count or None,
        bytes_xlated=info.xlated_bytes,
        jited=bool(info.jited_bytes),
        bytes_jited=info.jited_bytes,
        bytes_memlock=info.memory_bytes,
        map_ids=list(info.map_ids) or None,
        btf_id=info.btf_id or None,
    )


def _loaded(info: ProgramInfo) -> Record:
    """Return when and by whom it was loaded; before Linux 4.15 the zeros mean unknown."""
    if not info.load_time_ns:
        return {"loaded_at": UNKNOWN, "uid": UNKNOWN}
    at = round(clock.boot_time_s() + info.load_time_ns / 1e9)
    return {"loaded_at": at, "uid": info.created_by_uid}


def map_record(info: MapInfo) -> Record:
    """A map, as bpftool tells it."""
    return _without_nothing(
        id=info.id,
        type=_name(MapType, info.type),
        name=info.name or None,
        flags=info.flags,
        bytes_key=info.key_size,
        bytes_value=info.value_size,
        max_entries=info.max_entries,
        bytes_memlock=info.memory_bytes,
        frozen=int(info.frozen),
        btf_id=info.btf_id or None,
    )


def link_record(info: LinkInfo) -> Record:
    """A link, as bpftool tells it, and who holds it."""
    own_hook = info.attach_type if info.type not in _NO_HOOK else None
    return _without_nothing(
        id=info.id,
        type=_name(LinkType, info.type),
        prog_id=info.program_id,
        cgroup_id=info.cgroup_id or None,
        netns_ino=info.netns_inode or None,
        ifindex=info.ifindex or None,
        tp_name=info.target or None,
        target_obj_id=info.target_object_id or None,
        target_btf_id=info.target_btf_id or None,
        attach_type=None if own_hook is None else _name(AttachType, own_hook),
        pids=[pid for pid in _holders().get(info.id, []) if pid != os.getpid()],
    )


@cache
def _holders() -> dict[int, list[int]]:
    """Return the holders of links, scanning all processes only once."""
    return attached.holders_of_links()


_NO_HOOK = set(LinkType) - {
    *(LinkType.CGROUP, LinkType.NETNS, LinkType.TRACING, LinkType.TCX, LinkType.NETKIT)
}

PROGRAMS = Kind(
    "program", programs.all_ids, programs.open_by_id, programs.open_pinned, program_record
)
MAPS = Kind("map", maps.all_ids, maps.open_by_id, maps.open_pinned, map_record)
LINKS = Kind("link", links.all_ids, links.open_by_id, links.open_pinned, link_record)


def _without_nothing(**fields: Any) -> Record:
    told = {name: value for name, value in fields.items() if value is not None}
    return {name: None if value is UNKNOWN else value for name, value in told.items()}


def _name(names: Any, number: int) -> Any:
    """Return the name of a number in an enum, or the number if only newer kernels know it."""
    try:
        return names(number).name.lower()
    except ValueError:
        return number
