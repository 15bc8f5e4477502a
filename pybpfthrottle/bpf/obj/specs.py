"""Specs: the contents of an object file as plain data. No system calls.

A spec may be edited in place before it is loaded::

    spec.maps["events"].max_entries = 64
    spec.programs["probe"].autoload = False
    spec.variables["limit"].set(1000)
"""

from __future__ import annotations

from typing import Any, Callable, Optional, Union

from pybpfthrottle.bpf.abi import MAPS_OF_MAPS, AttachType, MapType, ProgType
from pybpfthrottle.bpf.obj.btf import Btf
from pybpfthrottle.bpf.obj.plain import Data, NamedTuple, made

_RINGS = (MapType.RINGBUF, MapType.USER_RINGBUF)
_ONE_PER_CPU = (MapType.PERF_EVENT_ARRAY, MapType.CPUMAP)
# Their elements are descriptors or indexes of four bytes under a key of four.
_ARRAYS_OF_OBJECTS = (
    *(MapType.PROG_ARRAY, MapType.PERF_EVENT_ARRAY, MapType.CGROUP_ARRAY, MapType.CPUMAP),
    *(MapType.ARRAY_OF_MAPS, MapType.DEVMAP, MapType.XSKMAP),
)
_U32_BYTES = 4


class MapSpec(Data):
    """One map. Sizes are in bytes; ``contents`` is what a data section's one element holds.

    ``key_type`` and ``value_type`` are ids in the object's BTF, 0 where there is none. ``inner``
    is the template for the maps in a map of maps. ``initial`` has the names of the maps or
    programs (by the map's type) that the object puts in. ``pinned`` maps are shared by name, under
    the directory that the loader is given. ``section`` is where a data map comes from, and
    ``addresses`` are the places in it of pointers, which nothing can fill in. ``kernel_type`` is an
    id in the kernel's types, for a value of the kernel's own. Without ``autoload`` the map is
    created only if a program that is selected needs it.
    """

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0
    numa_node: int = 0
    extra: int = 0
    contents: Optional[bytes] = None
    frozen: bool = False
    key_type: int = 0
    value_type: int = 0
    inner: Optional[MapSpec] = None
    initial: dict[int, str] = made(default_factory=dict)
    pinned: bool = False
    section: Optional[str] = None
    addresses: tuple[int, ...] = ()
    kernel_type: int = 0
    autoload: bool = True

    def memory_bytes(self, page_bytes: int) -> int:
        """Return the size of what is mapped of it: an arena's pages, or one value."""
        is_arena = self.type == MapType.ARENA
        return self.max_entries * page_bytes if is_arena else self.value_size

    # The machine's facts are given, since a spec asks no machine.
    def corrected(self, *, cpus: Callable[[], int], page_bytes: int) -> MapSpec:
        """Return the spec as the kernel takes it, where objects do not say all that it wants.

        Ring buffers have no keys and values, and a power of two of pages. What holds one element
        for each CPU has no more than there are CPUs, and as many unless it says otherwise. Arrays
        of other objects have keys and values of four bytes unless they say otherwise; the type of
        the values of perf events is that of the events.
        """
        spec = MapSpec(**vars(self))
        if spec.type in _RINGS:
            spec.key_size = spec.value_size = spec.key_type = spec.value_type = 0
            spec.max_entries = _ring_bytes(spec.max_entries, page_bytes)
        if spec.type in _ONE_PER_CPU:
            spec.max_entries = min(spec.max_entries or cpus(), cpus())
        if spec.type in _ARRAYS_OF_OBJECTS:
            spec.key_size = spec.key_size or _U32_BYTES
        if spec.type == MapType.PERF_EVENT_ARRAY and spec.value_type:
            spec.value_size = _U32_BYTES
        if spec.type in _ARRAYS_OF_OBJECTS or spec.type in MAPS_OF_MAPS:
            spec.value_size = spec.value_size or _U32_BYTES
        return spec


def _ring_bytes(wanted: int, page_bytes: int) -> int:
    """Return the next power of two of pages; 0 stays 0, for the kernel to refuse."""
    size = page_bytes
    while size < wanted:
        size *= 2
    return size if wanted else 0


class FunctionKey(NamedTuple):
    """The beginning of a function: names are not unique, since static functions may share one."""

    section: str
    offset: int


class MapReference(NamedTuple):
    """A 64-bit load at byte ``offset`` of some code: of a map, or an address in its value."""

    offset: int
    map: str
    value_offset: Optional[int] = None


class CallReference(NamedTuple):
    """A call at byte ``offset`` of some code to a function of the same object.

    With ``address`` it is a 64-bit load of the function's address, for a callback.
    """

    offset: int
    target: FunctionKey
    address: bool = False


class ExternReference(NamedTuple):
    """A call or a 64-bit load at byte ``offset`` of some code, of what the kernel is to have."""

    offset: int
    name: str
    weak: bool = False


class ConstantReference(NamedTuple):
    """A 64-bit load at byte ``offset`` of some code, of a number that the object leaves open."""

    offset: int
    name: str


class FunctionSpec(Data, frozen=True):
    """One function's instructions, in the object's byte order, and what they refer to.

    ``exception_callback`` is called when the program throws: no instruction refers to it.
    """

    name: str
    key: FunctionKey
    code: bytes
    map_references: tuple[MapReference, ...] = ()
    call_references: tuple[CallReference, ...] = ()
    extern_references: tuple[ExternReference, ...] = ()
    constant_references: tuple[ConstantReference, ...] = ()
    exception_callback: Optional[FunctionKey] = None


class ProgramSpec(Data):
    """An entry point. ``expected_attach_type`` is None where the section names none.

    ``type`` is UNSPEC where the section names none either: set it before loading. ``flags`` are
    those of BPF_PROG_LOAD, ``attach_to`` is what the section's name has after the slash, and
    without ``autoload`` the program is loaded only when it is selected by name.
    """

    name: str
    section: str
    type: ProgType
    expected_attach_type: Optional[AttachType]
    function: FunctionSpec
    flags: int = 0
    attach_to: Optional[str] = None
    autoload: bool = True


class VariableSpec(Data):
    """A variable in a data section: ``size`` bytes at ``offset`` of the value of a data map.

    ``signed`` is None for what is no number of up to 8 bytes; ``type`` is an id in the BTF, or 0.
    """

    name: str
    map: MapSpec
    offset: int
    size: int
    byteorder: str
    signed: Optional[bool] = None
    type: int = 0

    def get(self) -> Union[int, bytes]:
        """Return the value that the variable begins with: an int if its type is one, else bytes."""
        contents = self.map.contents
        if contents is None:
            return self.decode(bytes(self.size))
        return self.decode(contents[self.offset : self.offset + self.size])

    def set(self, value: Union[int, bytes]) -> None:
        """Set the value that it begins with. Raises ValueError for one that does not fit."""
        contents = bytearray(self.map.contents or bytes(self.map.value_size))
        contents[self.offset : self.offset + self.size] = self.encode(value)
        self.map.contents = bytes(contents)

    def encode(self, value: Union[int, bytes]) -> bytes:
        """Return the bytes of a value. Raises ValueError for one that does not fit."""
        if isinstance(value, int):
            return self._encode_int(value)
        if len(value) != self.size:
            raise ValueError(f"{self.name!r} has {self.size} bytes, not {len(value)}")
        return bytes(value)

    def decode(self, data: bytes) -> Union[int, bytes]:
        """Return the value of bytes."""
        if self.signed is None:
            return data
        order: Any = self.byteorder
        return int.from_bytes(data, order, signed=self.signed)

    def _encode_int(self, value: int) -> bytes:
        signed = value < 0 if self.signed is None else self.signed
        order: Any = self.byteorder
        try:
            return value.to_bytes(self.size, order, signed=signed)
        except OverflowError:
            raise ValueError(
                f"{value} does not fit into {self.name!r}"
                f" ({self.size} bytes, {'signed' if signed else 'unsigned'})"
            ) from None


class Place(NamedTuple):
    """The place of a variable in its section, in bytes."""

    offset: int
    size: int


class SectionLayout(NamedTuple):
    """The size of a section of data in bytes, and its variables by name.

    Of static variables that share a name, from several sources, it has one.
    """

    size: int
    places: dict[str, Place]


class ObjectSpec(Data):
    """Everything that one object file defines. ``byteorder`` is "little" or "big".

    ``btf`` are the types of section .BTF: parsed once, when the object is read, and decoded one by
    one as they are asked for. ``btf_ext`` are the bytes of section .BTF.ext, which only loading
    needs. ``layouts`` (by section) and ``hidden`` (functions that are not for other objects) are
    what compilers leave open there. ``constants`` are the numbers that code loads by a symbol that
    no section defines, as inline assembly does: 0 until they are set.
    """

    name: str
    byteorder: str
    license: str = ""
    maps: dict[str, MapSpec] = made(default_factory=dict)
    programs: dict[str, ProgramSpec] = made(default_factory=dict)
    functions: dict[FunctionKey, FunctionSpec] = made(default_factory=dict)
    variables: dict[str, VariableSpec] = made(default_factory=dict)
    constants: dict[str, int] = made(default_factory=dict)
    btf: Optional[Btf] = None
    btf_ext: Optional[bytes] = None
    layouts: dict[str, SectionLayout] = made(default_factory=dict)
    hidden: frozenset[str] = frozenset()

    @property
    def weak_externs(self) -> frozenset[str]:
        """The names of what the kernel need not have."""
        return frozenset(
            reference.name
            for function in self.functions.values()
            for reference in function.extern_references
            if reference.weak
        )
