"""Maps: live objects, each owning one descriptor, used as a dict over typed keys and values."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from collections.abc import ItemsView, Mapping, MutableMapping, ValuesView
from contextlib import ExitStack
from typing import Any, Iterable, Iterator, Optional, TypeVar

from pybpfthrottle.bpf import abi, descriptors, elements, syscall
from pybpfthrottle.bpf.abi import Attr, Cmd, MapType
from pybpfthrottle.bpf.codecs import RAW, U32, Codec, CodecLike, PerCpuCodec, codec_for
from pybpfthrottle.bpf.elements import Elements, Pair
from pybpfthrottle.bpf.errors import MapCreateError
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.obj.specs import MapSpec
from pybpfthrottle.bpf.privileges import why_refused, with_memlock

K = TypeVar("K")
V = TypeVar("V")

_PER_CPU = (
    MapType.PERCPU_HASH,
    MapType.PERCPU_ARRAY,
    MapType.LRU_PERCPU_HASH,
    MapType.PERCPU_CGROUP_STORAGE,
)
_MAX_CPUS = 8192  # CONFIG_NR_CPUS_RANGE_END of the largest configurations


class MapInfo(NamedTuple):
    """A map as the kernel describes it. ``memory_bytes`` is 0 where /proc does not tell.

    The types are ids in the BTF with id ``btf_id``, 0 where there is none.
    """

    id: int
    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    ifindex: int
    btf_id: int
    key_type_id: int
    value_type_id: int
    extra: int
    memory_bytes: int
    frozen: bool


class Map(MutableMapping[K, V]):
    """A map that this process has open, as a dict; ``close`` or ``with`` ends it.

    The values of a per-CPU map are lists with one value for each possible CPU. Elements of an
    array cannot be deleted. The values of a map of maps or programs are written as descriptors and
    read as ids. ``items``, ``values``, ``update`` and ``clear`` use batches where the kernel has
    them. Programs may change the map at any time: one command is one step, two are not.
    Linux 4.10; source: man 2 bpf.
    """

    def __init__(
        self,
        fd: int,
        spec: MapSpec,
        key: Codec[K],
        value: Codec[V],
        owner: Optional[Map[Any, Any]] = None,
    ) -> None:
        """With an ``owner`` the descriptor is the owner's, as long as that has one."""
        self._fd = fd
        self._owner = owner
        self.spec = spec
        # What its readers give, where the object declares it.
        self.record: Optional[Codec[Any]] = None
        self._key = key
        self._value = value
        self._value_bytes = spec.value_size
        if spec.type in _PER_CPU:
            # The kernel pads each CPU's value, and has one for CPUs that may still be plugged in.
            self._value_bytes = (spec.value_size + 7) // 8 * 8 * possible_cpus()

    @property
    def fd(self) -> int:
        """The descriptor; -1 once it is closed."""
        # Kept here, the number would soon be that of another map: its values may be larger, and the
        # kernel would write past the room for ours.
        return self._fd if self._owner is None else self._owner.fd

    @property
    def elements(self) -> Elements:
        """The elements as bytes."""
        return Elements(self.fd, self.spec.key_size, self._value_bytes)

    def typed(self, key: CodecLike, value: CodecLike) -> Map[Any, Any]:
        """Return the same map, by the same descriptor, with other codecs; this one stays its owner.

        A codec is given as ``codecs.codec_for`` takes it; for a per-CPU map ``value`` is that of
        one CPU's value.
        """
        value = codec_for(value, self.spec.value_size)
        key = codec_for(key, self.spec.key_size)
        owner = self if self._owner is None else self._owner
        return Map(-1, self.spec, key, _value_codec(self.spec, value), owner)

    def typed_by_btf(self) -> Map[Any, Any]:
        """Return the same map with keys and values as its BTF describes them, structs as dicts.

        Linux 4.18; needs CAP_SYS_ADMIN. Raises LookupError for a map without BTF.
        """
        from pybpfthrottle.bpf import btf_objects
        from pybpfthrottle.bpf.obj.btf_values import BtfCodec

        info = self.info()
        if not info.value_type_id:
            raise LookupError(f"map {self.spec.name!r} has no BTF")
        types = Btf(btf_objects.data_by_id(info.btf_id))
        # A data section's map has one element, and no type for its number.
        key = BtfCodec(types, info.key_type_id) if info.key_type_id else U32
        return self.typed(key, BtfCodec(types, info.value_type_id))

    def __getitem__(self, key: K) -> V:
        try:
            data = self.elements.lookup(self._key.encode(key))
        except FileNotFoundError:
            raise KeyError(key) from None
        return self._value.decode(data)

    def __setitem__(self, key: K, value: V) -> None:
        self.elements.update(self._key.encode(key), self._value.encode(value))

    def __delitem__(self, key: K) -> None:
        try:
            self.elements.delete(self._key.encode(key))
        except FileNotFoundError:
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[K]:
        return map(self._key.decode, elements.keys(self.elements))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def setdefault(self, key: K, default: Any = None) -> Any:
        """Return the value of a key, after adding ``default`` if there was none, as one step."""
        data = self._value.encode(default)
        try:
            self.elements.update(self._key.encode(key), data, abi.BPF_NOEXIST)
        except FileExistsError:
            return self[key]
        return default

    def lookup_and_delete(self, key: K) -> V:
        """Take an element out, as one step. Hashes Linux 5.14. Raises KeyError, or OSError.

        What the kernel refuses (EINVAL, ENOTSUPP) is not done in two steps, as ``pop`` does it: a
        change between them would be lost.
        """
        try:
            data = self.elements.lookup_and_delete(self._key.encode(key))
        except FileNotFoundError:
            raise KeyError(key) from None
        return self._value.decode(data)

    def items(self) -> ItemsView[K, V]:
        """Return a view of the keys and values, which are read in batches."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """Return a view of the values, which are read in batches."""
        return _Values(self)

    def update(self, other: Any = (), /, **more: Any) -> None:
        """Set or add elements in batches; takes what a dict takes. Those before an error stay."""
        pairs = [*(other.items() if isinstance(other, Mapping) else other), *more.items()]
        encode_key, encode_value = self._key.encode, self._value.encode
        elements.update(self.elements, ((encode_key(k), encode_value(v)) for k, v in pairs))

    def delete_batch(self, keys: Iterable[K]) -> int:
        """Delete elements and tell how many; keys that are missing are passed over."""
        return elements.delete(self.elements, map(self._key.encode, keys))

    def clear(self) -> None:
        """Delete all elements that are there now."""
        elements.delete(self.elements, [key for key, _ in elements.items(self.elements)])

    def drain(self) -> Iterator[tuple[K, V]]:
        """Take all elements out, each as one step: no change of a program's is lost.

        Hashes Linux 5.6. Raises OSError (EINVAL, ENOTSUPP) where the kernel cannot.
        """
        return self._decoded(elements.drain(self.elements))

    @property
    def id(self) -> int:
        """The kernel's number of it; quicker than all of ``info``. Linux 4.13. Raises OSError."""
        return int(descriptors.fill_info(self.fd, abi.MapInfo()).id)

    def info(self) -> MapInfo:
        """Return what the kernel says of this object. Linux 4.13. Raises OSError."""
        return map_info(self.fd)

    def pin(self, path: descriptors.Path) -> None:
        """Pin it: name it in a bpf file system, where it stays until unlinked. Linux 4.4."""
        descriptors.pin(self.fd, path)

    def freeze(self) -> None:
        """Make the map constant for system calls, those of this process too. Linux 5.2."""
        attr = Attr()
        attr.map_elem.map_fd = self.fd
        syscall.bpf(Cmd.MAP_FREEZE, attr)

    def close(self) -> None:
        """Close the descriptor. The kernel keeps the map while a program uses it."""
        if self._owner is not None:
            self._owner.close()
        elif self._fd >= 0:
            fd, self._fd = self._fd, -1
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

    def _decoded(self, pairs: Iterable[Pair]) -> Iterator[tuple[K, V]]:
        return ((self._key.decode(key), self._value.decode(value)) for key, value in pairs)


class _Items(ItemsView[K, V]):
    """A view that, unlike that of a plain mapping, never meets a key that was deleted meanwhile."""

    def __init__(self, of: Map[K, V]) -> None:
        super().__init__(of)
        self._map = of

    def __iter__(self) -> Iterator[tuple[K, V]]:
        return self._map._decoded(elements.items(self._map.elements))

    def __len__(self) -> int:  # list() asks for it first
        return sum(1 for _ in elements.items(self._map.elements))


class _Values(ValuesView[V]):
    def __init__(self, of: Map[Any, V]) -> None:
        super().__init__(of)
        self._map = of

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._map.items())

    def __len__(self) -> int:
        return len(self._map.items())


def create(spec: MapSpec, *, btf_fd: int = 0, module_fd: int = 0) -> Map[Any, Any]:
    """Create a map; keys and values are bytes until ``typed``. Linux 4.10.

    ``btf_fd`` is the BTF that the spec's types are of, 0 for none; ``module_fd`` that of the module
    that the spec's ``kernel_type`` is of, 0 for the kernel itself. What the kernel may not know is
    left out where it refuses it: types (not for all maps, and from 4.18), mapping of a data
    section (5.5), the name (4.15). Raises MapCreateError.
    """
    spec = corrected(spec)
    _refuse_cut(spec)
    with ExitStack() as undo:
        created = undo.enter_context(adopt(_create(spec, btf_fd, module_fd), spec))
        try:
            if spec.contents is not None and spec.type != MapType.ARENA:
                created.typed(U32, RAW)[0] = spec.contents.ljust(spec.value_size, b"\0")
            if spec.frozen:
                _freeze_where_possible(created)
        except OSError as error:
            raise MapCreateError(
                f"cannot fill the map {spec.name!r}: {error}", errno=error.errno or 0
            ) from error
        undo.pop_all()
    return created


def _refuse_cut(spec: MapSpec) -> None:
    """Refuse a data section that was made smaller: variables would lie outside of it."""
    size = len(spec.contents or b"")
    if size > spec.memory_bytes(mmap.PAGESIZE):
        raise MapCreateError(
            f"cannot create the map {spec.name!r}: its contents have {size} bytes, but its"
            f" {'max_entries are pages' if spec.type == MapType.ARENA else 'value_size is'}"
            f" {spec.memory_bytes(mmap.PAGESIZE)}; a data section can only be made larger"
        )


def corrected(spec: MapSpec) -> MapSpec:
    """Return the spec as the kernel of this machine takes it."""
    return spec.corrected(cpus=possible_cpus, page_bytes=mmap.PAGESIZE)


def adopt(fd: int, spec: MapSpec) -> Map[Any, Any]:
    """Return the map behind a descriptor, which it owns from now on; keys and values are bytes."""
    return Map(fd, spec, RAW, _value_codec(spec, RAW))


def open_by_id(map_id: int) -> Map[Any, Any]:
    """Return a map of the system by its id; keys and values are bytes.

    Linux 4.13, needs CAP_SYS_ADMIN. Raises OSError.
    """
    return _opened(descriptors.by_id(Cmd.MAP_GET_FD_BY_ID, map_id))


def name_by_id(map_id: int) -> str:
    """Return the name of a map of the system; "" before Linux 4.15. A third of the cost of opening.

    Linux 4.13, needs CAP_SYS_ADMIN. Raises OSError.
    """
    fd = descriptors.by_id(Cmd.MAP_GET_FD_BY_ID, map_id)
    try:
        return _name(descriptors.fill_info(fd, abi.MapInfo()))
    finally:
        os.close(fd)


def open_pinned(path: descriptors.Path) -> Map[Any, Any]:
    """Return a pinned map; keys and values are bytes. Linux 4.13. Raises OSError."""
    return _opened(descriptors.open_pinned(path, "bpf-map"))


def all_ids(after: int = 0) -> Iterator[int]:
    """Return the ids of all maps of the machine, or of those with higher ids, in order.

    The kernel counts ids up, to 2^31, before it uses one again. Linux 4.13; needs CAP_SYS_ADMIN.
    Raises OSError.
    """
    return syscall.all_ids(Cmd.MAP_GET_NEXT_ID, after)


def map_info(fd: int) -> MapInfo:
    """Return what the kernel says of the map behind a descriptor.

    Linux 4.13; names 4.15, BTF 4.18.
    """
    info = descriptors.fill_info(fd, abi.MapInfo())
    more = descriptors.fdinfo(fd)
    return MapInfo(
        id=info.id,
        name=_name(info),
        type=info.type,
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
        ifindex=info.ifindex,
        btf_id=info.btf_id,
        key_type_id=info.btf_key_type_id,
        value_type_id=info.btf_value_type_id,
        extra=info.map_extra,
        memory_bytes=int(more.get("memlock", 0)),
        frozen=more.get("frozen") == "1",
    )


def _name(info: abi.MapInfo) -> str:
    return bytes(info.name).decode("ascii", "replace")


def _opened(fd: int) -> Map[Any, Any]:
    """Return the map of a descriptor that is this function's to close."""
    try:
        info = map_info(fd)
    except OSError:
        os.close(fd)
        raise
    spec = MapSpec(
        info.name,
        info.type,
        info.key_size,
        info.value_size,
        info.max_entries,
        info.flags,
        extra=info.extra,
        frozen=info.frozen,
    )
    return Map(fd, spec, RAW, _value_codec(spec, RAW))


def _create(spec: MapSpec, btf_fd: int = 0, module_fd: int = 0) -> int:
    if spec.type not in abi.MAPS_OF_MAPS:
        return _create_as_far_as_known(spec, _attr(spec, btf_fd, 0, module_fd))
    if spec.inner is None:
        raise MapCreateError(f"cannot create the map {spec.name!r}: no inner map is defined for it")
    with create(spec.inner, btf_fd=btf_fd) as template:
        return _create_as_far_as_known(spec, _attr(spec, btf_fd, template.fd))


def _create_as_far_as_known(spec: MapSpec, attr: Attr) -> int:
    """Create; without what the kernel may not know, if it refuses it."""
    refusals: list[OSError] = []
    for change in ({}, *_omissions(spec, attr.map_create)):
        for field, value in change.items():
            abi.clear(attr.map_create, field)
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


def _attr(spec: MapSpec, btf_fd: int, inner_fd: int, module_fd: int = 0) -> Attr:
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
    if spec.kernel_type:
        # The kernel wants the object's types all the same.
        attr.map_create.btf_fd = btf_fd
        attr.map_create.btf_vmlinux_value_type_id = spec.kernel_type
        if module_fd:
            attr.map_create.value_type_btf_obj_fd = module_fd
            attr.map_create.map_flags |= abi.BPF_F_VTYPE_BTF_OBJ_FD
    elif btf_fd and spec.value_type:
        attr.map_create.btf_fd = btf_fd
        attr.map_create.btf_key_type_id = spec.key_type
        attr.map_create.btf_value_type_id = spec.value_type
    return attr


def _omissions(spec: MapSpec, wanted: abi.MapCreate) -> Iterator[dict[str, Any]]:
    """Return what to leave out in turn, as fields and their values."""
    if wanted.btf_fd and not spec.kernel_type:
        yield {"btf_fd": 0, "btf_key_type_id": 0, "btf_value_type_id": 0}
    if spec.section is not None and wanted.map_flags & abi.BPF_F_MMAPABLE:
        yield {"map_flags": wanted.map_flags & ~abi.BPF_F_MMAPABLE}
    yield {"map_name": b""}


def _why(spec: MapSpec, error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.ENOSYS):
        return why_refused(error, "BPF_MAP_CREATE")
    from pybpfthrottle.bpf.obj import releases

    return (
        f"{error} ({releases.since_when(MapType, spec.type)}, key {spec.key_size} bytes,"
        f" value {spec.value_size} bytes, {spec.max_entries} entries, flags {spec.flags:#x})"
    )


def _freeze_where_possible(created: Map[Any, Any]) -> None:
    try:
        created.freeze()
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 5.2
            raise


def legal_name(name: str) -> bytes:
    """Return a name as the kernel takes it: 15 of [A-Za-z0-9_.]."""
    return re.sub(r"[^A-Za-z0-9_.]", "_", name)[: abi.BPF_OBJ_NAME_LEN - 1].encode("ascii")


def _value_codec(spec: MapSpec, value: Codec[Any]) -> Codec[Any]:
    if spec.type in _PER_CPU:
        return PerCpuCodec(value, spec.value_size, possible_cpus())
    return value


_possible_cpus: Optional[int] = None


def possible_cpus() -> int:
    """Return how many values an element of a per-CPU map has."""
    global _possible_cpus
    if _possible_cpus is None:
        try:
            with open("/sys/devices/system/cpu/possible") as possible:
                _possible_cpus = parse_cpus(possible.read())
        except OSError:
            _possible_cpus = _count_cpus()
    return _possible_cpus


def parse_cpus(text: str) -> int:
    """Return the number of CPUs in a list such as ``0-3,8``."""
    return len(cpu_numbers(text))


def cpu_numbers(text: str) -> list[int]:
    """Return the numbers of the CPUs in a list such as ``0-3,8``."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _count_cpus() -> int:
    """Count without /sys: see how far the kernel writes into a value of room for all."""
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
