"""Maps: live objects, each owning one descriptor, used as a dict over typed keys and values."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import struct
from collections.abc import MutableMapping
from typing import Any, Generic, Iterator, Optional, Protocol, TypeVar, cast

from pybpfthrottle.bpf import abi, corrections, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd, MapType
from pybpfthrottle.bpf.privileges import why_refused, with_memlock
from pybpfthrottle.bpf.specs import MapSpec
from pybpfthrottle.errors import MapCreateError

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")
S = TypeVar("S", bound=ctypes.Structure)

_PER_CPU = (
    MapType.PERCPU_HASH,
    MapType.PERCPU_ARRAY,
    MapType.LRU_PERCPU_HASH,
    MapType.PERCPU_CGROUP_STORAGE,
)
_MAX_CPUS = 8192  # CONFIG_NR_CPUS_RANGE_END of the largest configurations


class Codec(Protocol[T]):
    """How keys or values of type T are bytes of a map."""

    def encode(self, value: T) -> bytes:
        """The bytes of a value."""
        ...

    def decode(self, data: bytes) -> T:
        """The value of bytes."""
        ...


class RawCodec:
    """bytes as they are."""

    def encode(self, value: bytes) -> bytes:
        """The bytes of a value."""
        return bytes(value)

    def decode(self, data: bytes) -> bytes:
        """The value of bytes."""
        return data


class FormatCodec:
    """One number, by its letter in the struct module, in the byte order of this machine."""

    def __init__(self, letter: str) -> None:
        self._struct = struct.Struct("=" + letter)

    def encode(self, value: int) -> bytes:
        """The bytes of a value."""
        return self._struct.pack(value)

    def decode(self, data: bytes) -> int:
        """The value of bytes."""
        return cast(int, self._struct.unpack(data)[0])


class StructureCodec(Generic[S]):
    """A ctypes.Structure."""

    def __init__(self, structure: type[S]) -> None:
        self._structure = structure

    def encode(self, value: S) -> bytes:
        """The bytes of a value."""
        return bytes(value)

    def decode(self, data: bytes) -> S:
        """The value of bytes."""
        return self._structure.from_buffer_copy(data)


class PerCpuCodec(Generic[T]):
    """A list with one value for each possible CPU; the kernel pads each to eight bytes."""

    def __init__(self, codec: Codec[T], value_size: int, cpus: int) -> None:
        self._codec = codec
        self._size = value_size
        self._stride = (value_size + 7) // 8 * 8
        self._cpus = cpus

    def encode(self, value: list[T]) -> bytes:
        """The bytes of a value."""
        if len(value) != self._cpus:
            raise ValueError(f"{self._cpus} values are needed, one a CPU, not {len(value)}")
        return b"".join(self._codec.encode(item).ljust(self._stride, b"\0") for item in value)

    def decode(self, data: bytes) -> list[T]:
        """The value of bytes."""
        return [
            self._codec.decode(data[at : at + self._size])
            for at in range(0, len(data), self._stride)
        ]


U32: Codec[int] = FormatCodec("I")
RAW: Codec[bytes] = RawCodec()


class Map(MutableMapping[K, V]):
    """A map that this process has open, as a dict; ``close`` or ``with`` ends it.

    The values of a per-CPU map are lists with one value for each possible CPU. Elements of an
    array cannot be deleted. Linux 4.10; source: man 2 bpf.
    """

    def __init__(self, fd: int, spec: MapSpec, key: Codec[K], value: Codec[V]) -> None:
        self.fd = fd
        self.spec = spec
        self._key = key
        self._value = value
        self._value_bytes = spec.value_size
        if spec.type in _PER_CPU:
            self._value_bytes = (spec.value_size + 7) // 8 * 8 * possible_cpus()

    def typed(self, key: Codec[Any], value: Codec[T]) -> Map[Any, Any]:
        """The same map, by the same descriptor, with other codecs; this one stays its owner.

        For a per-CPU map ``value`` is the codec of one CPU's value.
        """
        return Map(self.fd, self.spec, key, _value_codec(self.spec, value))

    def __getitem__(self, key: K) -> V:
        value = ctypes.create_string_buffer(self._value_bytes)
        try:
            self._do(Cmd.MAP_LOOKUP_ELEM, self._key_buffer(key), value)
        except FileNotFoundError:
            raise KeyError(key) from None
        return self._value.decode(value.raw)

    def __setitem__(self, key: K, value: V) -> None:
        data = self._value.encode(value)
        if len(data) != self._value_bytes:
            raise ValueError(f"{len(data)} bytes do not make a value of {self._value_bytes}")
        buffer = ctypes.create_string_buffer(data, len(data))
        self._do(Cmd.MAP_UPDATE_ELEM, self._key_buffer(key), buffer)

    def __delitem__(self, key: K) -> None:
        try:
            self._do(Cmd.MAP_DELETE_ELEM, self._key_buffer(key), None)
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[K]:
        previous: Any = None
        following = ctypes.create_string_buffer(self.spec.key_size)
        while True:
            try:
                self._do(Cmd.MAP_GET_NEXT_KEY, previous, following)
            except FileNotFoundError:
                return
            yield self._key.decode(following.raw)
            previous = ctypes.create_string_buffer(following.raw, self.spec.key_size)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def freeze(self) -> None:
        """Let this and no other process change it through system calls any more. Linux 5.2."""
        attr = Attr()
        attr.map_elem.map_fd = self.fd
        syscall.bpf(Cmd.MAP_FREEZE, attr)

    def close(self) -> None:
        """Close the descriptor. The kernel keeps the map while a program uses it."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> Map[K, V]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Map {self.spec.name!r} fd={self.fd}>"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def _key_buffer(self, key: K) -> Any:
        data = self._key.encode(key)
        if len(data) != self.spec.key_size:
            raise ValueError(f"{len(data)} bytes do not make a key of {self.spec.key_size}")
        return ctypes.create_string_buffer(data, len(data))

    def _do(self, cmd: Cmd, key: Any, value: Any) -> None:
        attr = Attr()
        attr.map_elem.map_fd = self.fd
        attr.map_elem.key = 0 if key is None else ctypes.addressof(key)
        attr.map_elem.value = 0 if value is None else ctypes.addressof(value)
        syscall.bpf(cmd, attr)


def create(spec: MapSpec, *, btf_fd: int = 0) -> Map[Any, Any]:
    """Create a map; keys and values are bytes until ``typed``. Linux 4.10.

    ``btf_fd`` is the BTF that the spec's types are of, 0 for none. What the kernel may not know is
    left out where it refuses it: types (not for all maps, and from 4.18), mapping of a data
    section (5.5), the name (4.15). Raises MapCreateError.
    """
    spec = corrected(spec)
    found = adopt(_create(spec, btf_fd), spec)
    try:
        if spec.contents is not None:
            found.typed(U32, RAW)[0] = spec.contents
        if spec.frozen:
            _freeze_where_possible(found)
    except OSError as error:
        found.close()
        raise MapCreateError(
            f"cannot fill the map {spec.name!r}: {error}", errno=error.errno or 0
        ) from error
    return found


def corrected(spec: MapSpec) -> MapSpec:
    """The spec as the kernel of this machine takes it."""
    return corrections.corrected(spec, cpus=possible_cpus, page_bytes=mmap.PAGESIZE)


def adopt(fd: int, spec: MapSpec) -> Map[Any, Any]:
    """The map behind a descriptor, which it owns from now on; keys and values are bytes."""
    return Map(fd, spec, RAW, _value_codec(spec, RAW))


def open_by_id(map_id: int) -> Map[Any, Any]:
    """A map of the system by its id; keys and values are bytes. Linux 4.13, needs CAP_SYS_ADMIN.

    Raises OSError.
    """
    attr = Attr()
    attr.get_id.id = map_id
    fd = syscall.bpf(Cmd.MAP_GET_FD_BY_ID, attr)
    info = abi.MapInfo()
    attr = Attr()
    attr.info.bpf_fd = fd
    attr.info.info_len = ctypes.sizeof(info)
    attr.info.info = ctypes.addressof(info)
    try:
        syscall.bpf(Cmd.OBJ_GET_INFO_BY_FD, attr)
    except OSError:
        os.close(fd)
        raise
    spec = MapSpec(
        info.name.decode("ascii", "replace"),
        info.type,
        info.key_size,
        info.value_size,
        info.max_entries,
        info.map_flags,
    )
    return Map(fd, spec, RAW, _value_codec(spec, RAW))


def _create(spec: MapSpec, btf_fd: int = 0) -> int:
    if spec.type not in abi.MAPS_OF_MAPS:
        return _create_as_far_as_known(spec, btf_fd)
    if spec.inner is None:
        raise MapCreateError(f"cannot create the map {spec.name!r}: no inner map is defined for it")
    with create(spec.inner, btf_fd=btf_fd) as template:
        return _create_as_far_as_known(spec, btf_fd, template.fd)


def _create_as_far_as_known(spec: MapSpec, btf_fd: int, inner_fd: int = 0) -> int:
    """Create; without what the kernel may not know, if it refuses it."""
    attr = _attr(spec, btf_fd, inner_fd)
    refusals: list[OSError] = []
    for change in ({}, *_omissions(spec, attr.map_create)):
        for field, value in change.items():
            setattr(attr.map_create, field, value)
        try:
            return with_memlock(lambda: syscall.bpf(Cmd.MAP_CREATE, attr))
        except OSError as error:
            refusals.append(error)
            if error.errno not in (errno.EINVAL, errno.E2BIG, syscall.ENOTSUPP):
                break
    # The first tells most, but for what privileges are missing.
    told = next((error for error in refusals if isinstance(error, PermissionError)), refusals[0])
    raise MapCreateError(
        f"cannot create the map {spec.name!r}: {_why(spec, told)}", errno=told.errno or 0
    ) from told


def _attr(spec: MapSpec, btf_fd: int, inner_fd: int) -> Attr:
    attr = Attr()
    attr.map_create.map_type = spec.type
    attr.map_create.key_size = spec.key_size
    attr.map_create.value_size = spec.value_size
    attr.map_create.max_entries = spec.max_entries
    attr.map_create.map_flags = spec.flags
    attr.map_create.inner_map_fd = inner_fd
    attr.map_create.numa_node = spec.numa_node
    attr.map_create.map_extra = spec.extra
    attr.map_create.map_name = legal_name(spec.name)
    if btf_fd and spec.value_type:
        attr.map_create.btf_fd = btf_fd
        attr.map_create.btf_key_type_id = spec.key_type
        attr.map_create.btf_value_type_id = spec.value_type
    return attr


def _omissions(spec: MapSpec, wanted: abi.MapCreate) -> Iterator[dict[str, Any]]:
    """What to leave out in turn, as fields and their values."""
    if wanted.btf_fd:
        yield {"btf_fd": 0, "btf_key_type_id": 0, "btf_value_type_id": 0}
    if spec.section is not None and wanted.map_flags & abi.BPF_F_MMAPABLE:
        yield {"map_flags": wanted.map_flags & ~abi.BPF_F_MMAPABLE}
    yield {"map_name": b""}


def _why(spec: MapSpec, error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.ENOSYS):
        return why_refused(error, "BPF_MAP_CREATE")
    return (
        f"{error} (type {spec.type}, key {spec.key_size} bytes, value {spec.value_size} bytes,"
        f" {spec.max_entries} entries, flags {spec.flags:#x})"
    )


def _freeze_where_possible(found: Map[Any, Any]) -> None:
    try:
        found.freeze()
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.2
            raise


def legal_name(name: str) -> bytes:
    """A name as the kernel takes it: 15 of [A-Za-z0-9_.]."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", name)[: abi.BPF_OBJ_NAME_LEN - 1].encode("ascii")


def _value_codec(spec: MapSpec, value: Codec[Any]) -> Codec[Any]:
    if spec.type in _PER_CPU:
        return PerCpuCodec(value, spec.value_size, possible_cpus())
    return value


_possible_cpus: Optional[int] = None


def possible_cpus() -> int:
    """How many values an element of a per-CPU map has."""
    global _possible_cpus
    if _possible_cpus is None:
        try:
            with open("/sys/devices/system/cpu/possible") as possible:
                _possible_cpus = parse_cpus(possible.read())
        except OSError:
            _possible_cpus = _count_cpus()
    return _possible_cpus


def parse_cpus(text: str) -> int:
    """The number of CPUs in a list such as ``0-3,8``."""
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def _count_cpus() -> int:
    """Without /sys: see how far the kernel writes into a value that is large enough for all."""
    spec = MapSpec("possible_cpus", MapType.PERCPU_ARRAY, 4, 8, 1)
    fd = _create(spec)
    try:
        key = ctypes.create_string_buffer(4)
        value = ctypes.create_string_buffer(b"\xff" * 8 * _MAX_CPUS)
        attr = Attr()
        attr.map_elem.map_fd = fd
        attr.map_elem.key = ctypes.addressof(key)
        attr.map_elem.value = ctypes.addressof(value)
        syscall.bpf(Cmd.MAP_LOOKUP_ELEM, attr)
        return value.raw.index(b"\xff") // 8
    finally:
        os.close(fd)
