"""Maps that several loads share: pinned by name in a directory of a bpf file system."""

from __future__ import annotations

import os
from typing import Any, Iterator

from pybpfthrottle.bpf import abi, descriptors, maps
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.errors import MapCreateError
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.specs import MapSpec

# Another load may pin the map, or unlink it, between looking and pinning.
_TRIES = 3


def open_or_create(spec: MapSpec, directory: descriptors.Path, *, btf_fd: int = 0) -> Map[Any, Any]:
    """Return the map that is pinned under the spec's name, or a new one that is pinned there.

    Linux 4.13. Raises MapCreateError: also for a pinned map of another shape, with all that
    differs.
    """
    path = pin_path(spec, directory)
    try:
        for _ in range(_TRIES):
            try:
                return _open(spec, path)
            except FileNotFoundError:
                pass
            try:
                return _create(spec, path, btf_fd)
            except FileExistsError:  # another load was faster
                pass
        return _open(spec, path)
    except OSError as error:
        raise MapCreateError(
            f"cannot pin the map {spec.name!r} at {path}: {error};"
            " the directory must be in a mounted bpf file system (mount -t bpf)",
            errno=error.errno or 0,
        ) from error


def pin_path(spec: MapSpec, directory: descriptors.Path) -> str:
    """Return where a map is pinned. The kernel takes no dots in the names there."""
    name = spec.name.replace(".", "_").replace("/", "_")
    return os.path.join(os.fspath(directory), name)


def _open(spec: MapSpec, path: str) -> Map[Any, Any]:
    wanted = maps.corrected(spec)
    fd = descriptors.open_pinned(path, "bpf-map")
    try:
        different = differences(fd, wanted)
        if different:
            raise MapCreateError(
                f"the map pinned at {path} does not match {spec.name!r}: its"
                f" {', its '.join(different)}; unlink it, or pin under another directory"
            )
        return maps.adopt(fd, wanted)
    except BaseException:
        os.close(fd)
        raise


def _create(spec: MapSpec, path: str, btf_fd: int) -> Map[Any, Any]:
    created = maps.create(spec, btf_fd=btf_fd)
    try:
        descriptors.pin(created.fd, path)
    except BaseException:
        created.close()
        raise
    return created


def differences(fd: int, wanted: MapSpec) -> list[str]:
    """Return what tells a map from another that is described, such as "key_size is 4 and not 8"."""
    return list(_differences(maps.corrected(wanted), descriptors.fill_info(fd, abi.MapInfo())))


def _differences(wanted: MapSpec, info: abi.MapInfo) -> Iterator[str]:
    flags = info.map_flags
    if info.type in (MapType.DEVMAP, MapType.DEVMAP_HASH):
        flags &= ~abi.BPF_F_RDONLY_PROG  # the kernel sets it by itself
    for name, there, here in (
        ("type", info.type, wanted.type),
        ("key_size", info.key_size, wanted.key_size),
        ("value_size", info.value_size, wanted.value_size),
        ("max_entries", info.max_entries, wanted.max_entries),
        ("flags", flags, wanted.flags),
        ("map_extra", info.map_extra, wanted.extra),
    ):
        if there != here:
            yield f"{name} is {int(there)} and not {int(here)}"
