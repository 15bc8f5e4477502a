"""How Python values are the bytes of a map's keys and values. No system calls."""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, Union, cast, get_type_hints

if TYPE_CHECKING:
    from ipaddress import IPv4Network, IPv6Network

T = TypeVar("T")
S = TypeVar("S", bound=ctypes.Structure)

IpNetwork = Union["IPv4Network", "IPv6Network"]


class Codec(Protocol[T]):
    """The translation of keys or values of type T to bytes of a map, and back."""

    def encode(self, value: T) -> bytes:
        """Return the bytes of a value."""
        ...

    def decode(self, data: bytes) -> T:
        """Return the value of bytes."""
        ...


# A codec, or what ``codec_for`` makes one of.
CodecLike = Union[Codec[Any], str, type]


class RawCodec:
    """The codec of bytes as they are."""

    def encode(self, value: bytes) -> bytes:
        """Return the bytes of a value."""
        return bytes(value)

    def decode(self, data: bytes) -> bytes:
        """Return the value of bytes."""
        return data


class FormatCodec:
    """The codec of a number, by its letter in the struct module, in this machine's byte order."""

    def __init__(self, letter: str) -> None:
        # "=" has fixed sizes: "L" is four bytes, as C's u32 and unlike its long.
        self._struct = struct.Struct("=" + letter)
        self.size = self._struct.size

    def encode(self, value: int) -> bytes:
        """Return the bytes of a value."""
        return self._struct.pack(value)

    def decode(self, data: bytes) -> int:
        """Return the value of bytes."""
        return cast(int, self._struct.unpack(data)[0])


class TupleCodec:
    """The codec of a tuple of numbers, by a format of the struct module.

    By default they are aligned as programs do it: each to its size, also where this machine's C
    aligns eight bytes to four.
    """

    def __init__(self, format: str) -> None:
        self._struct = struct.Struct(_aligned(format))
        self.size = self._struct.size

    def encode(self, value: Sequence[Any]) -> bytes:
        """Return the bytes of a value."""
        return self._struct.pack(*value)

    def decode(self, data: bytes) -> tuple[Any, ...]:
        """Return the value of bytes."""
        return self._struct.unpack(data)


_FIELD = re.compile(r"([0-9]*)([a-zA-Z?])")
# What a native format has in place of numbers whose size depends on the machine.
_BY_SIZE = {"l": "iq", "L": "IQ", "n": "iq", "N": "IQ", "P": "IQ"}


def _aligned(format: str) -> str:
    """Return a native format with its padding written out; another one as it is."""
    if format[:1] in ("=", "<", ">", "!"):
        return format
    struct.calcsize(format)  # raises struct.error for what is no format
    done, at = "=", 0
    for count, letter in _FIELD.findall(format.lstrip("@")):
        size = 1 if letter in "sp" else struct.calcsize(letter)
        padding = -at % size
        letter = _BY_SIZE[letter][size == 8] if letter in _BY_SIZE else letter
        done += (f"{padding}x" if padding else "") + count + letter
        at += padding + size * int(count or 1)
    return done


class IntCodec:
    """The codec of a number without a sign, of any size in bytes, in this machine's byte order."""

    def __init__(self, size: int) -> None:
        self._size = size

    def encode(self, value: int) -> bytes:
        """Return the bytes of a value; OverflowError for a number that does not fit."""
        return value.to_bytes(self._size, sys.byteorder)

    def decode(self, data: bytes) -> int:
        """Return the value of bytes."""
        return int.from_bytes(data, sys.byteorder)


class StructureCodec(Generic[S]):
    """The codec of a ctypes.Structure."""

    def __init__(self, structure: type[S]) -> None:
        self._structure = structure
        self.size = ctypes.sizeof(structure)

    def encode(self, value: S) -> bytes:
        """Return the bytes of a value."""
        return bytes(value)

    def decode(self, data: bytes) -> S:
        """Return the value of bytes."""
        return self._structure.from_buffer_copy(data)


class DataclassCodec(Generic[T]):
    """A dataclass whose fields are annotated with their ctypes, laid out as C does.

    ::

        @dataclass
        class Flow:
            packets: Annotated[int, ctypes.c_uint64]
            name: Annotated[bytes, ctypes.c_char * 16]
            last: Annotated[list[int], ctypes.c_uint32 * 4]

    A field may be of a dataclass of the same kind. Raises TypeError for another annotation.
    """

    def __init__(self, type: type[T]) -> None:
        self._type = type
        self._structure = _structure_of(type)
        self.size = ctypes.sizeof(self._structure)

    def encode(self, value: T) -> bytes:
        """Return the bytes of a value."""
        return bytes(_to_structure(self._structure, value))

    def decode(self, data: bytes) -> T:
        """Return the value of bytes."""
        return cast(T, _from_structure(self._type, self._structure.from_buffer_copy(data)))


def _is_dataclass(type_: object) -> bool:
    # As dataclasses tells it, whose import takes longer than that of all of this package.
    return hasattr(type_, "__dataclass_fields__")


def _structure_of(type_: type) -> Any:
    """Return a ctypes.Structure with the fields of a dataclass, aligned as programs do it."""
    fields: list[tuple[str, Any]] = []
    padding: list[str] = []
    at, most = 0, 1

    def pad(alignment: int) -> None:
        missing = -at % alignment
        if missing:
            padding.append(f"_padding_{at}")
            fields.append((padding[-1], ctypes.c_char * missing))

    for name, hint in get_type_hints(type_, include_extras=True).items():
        layout = getattr(hint, "__metadata__", (hint,))[0]
        if _is_dataclass(layout):
            layout = _structure_of(cast(type, layout))
        try:
            ctypes.sizeof(layout)
        except TypeError:
            raise TypeError(
                f"{type_.__name__}.{name} needs a ctypes type: Annotated[int, ctypes.c_uint32]"
            ) from None
        alignment = _alignment(layout)
        pad(alignment)
        fields.append((name, layout))
        most = max(most, alignment)
        at += -at % alignment + ctypes.sizeof(layout)
    pad(most)
    members = {"_fields_": tuple(fields), "_padding_": padding, "_alignment_": most}
    return type(type_.__name__, (ctypes.Structure,), members)


def _alignment(layout: Any) -> int:
    if issubclass(layout, ctypes.Array):
        return _alignment(layout._type_)
    if issubclass(layout, (ctypes.Structure, ctypes.Union)):
        return int(getattr(layout, "_alignment_", ctypes.alignment(layout)))
    return ctypes.sizeof(layout)


def _meant(structure: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields that are no padding."""
    padding = getattr(structure, "_padding_", ())
    return ((name, layout) for name, layout in structure._fields_ if name not in padding)


def _to_structure(structure: Any, value: Any) -> Any:
    filled = structure()
    for name, layout in _meant(structure):
        item = getattr(value, name)
        if issubclass(layout, ctypes.Structure):
            item = _to_structure(layout, item)
        elif issubclass(layout, ctypes.Array) and not isinstance(item, bytes):
            item = layout(*item)
        setattr(filled, name, item)
    return filled


def _from_structure(type_: Any, filled: Any) -> Any:
    hints = get_type_hints(type_)
    values = {}
    for name, _ in _meant(filled):
        item = getattr(filled, name)
        if isinstance(item, ctypes.Structure):
            item = _from_structure(hints[name], item)
        elif isinstance(item, ctypes.Array):
            item = list(item)
        values[name] = item
    return type_(**values)


class PrefixCodec:
    """The key of an LPM trie: a network of IPv4 (8 bytes) or of IPv6 (20 bytes).

    Source: struct bpf_lpm_trie_key_u8 of include/uapi/linux/bpf.h.
    """

    def encode(self, value: IpNetwork) -> bytes:
        """Return the bytes of a value."""
        return struct.pack("=I", value.prefixlen) + value.network_address.packed

    def decode(self, data: bytes) -> IpNetwork:
        """Return the value of bytes; bits behind the prefix are not looked at."""
        import ipaddress

        (length,) = struct.unpack_from("=I", data)
        address = ipaddress.ip_address(data[4:])
        return ipaddress.ip_network(f"{address}/{length}", strict=False)


class PerCpuCodec(Generic[T]):
    """The codec of a list with a value for each possible CPU; each is padded to eight bytes."""

    def __init__(self, codec: Codec[T], value_size: int, cpus: int) -> None:
        self._codec = codec
        self._size = value_size
        self._stride = (value_size + 7) // 8 * 8
        self._cpus = cpus

    def encode(self, value: list[T]) -> bytes:
        """Return the bytes of a value."""
        if len(value) != self._cpus:
            raise ValueError(f"expected {self._cpus} values, one per CPU, got {len(value)}")
        return b"".join(self._codec.encode(item).ljust(self._stride, b"\0") for item in value)

    def decode(self, data: bytes) -> list[T]:
        """Return the value of bytes."""
        return [
            self._codec.decode(data[at : at + self._size])
            for at in range(0, len(data), self._stride)
        ]


U32: Codec[int] = FormatCodec("I")
RAW: Codec[bytes] = RawCodec()


def codec_for(wanted: CodecLike, size: int) -> Codec[Any]:
    """Return the codec of keys or values of ``size`` bytes.

    ``wanted`` is a codec; bytes; int, a number without a sign; a format of the struct module, one
    letter being one value and more a tuple; a ctypes.Structure; or a dataclass as DataclassCodec
    takes it. Raises TypeError for anything else.
    """
    if isinstance(wanted, str):
        return FormatCodec(wanted) if len(wanted) == 1 else TupleCodec(wanted)
    if not isinstance(wanted, type):
        return wanted
    if wanted is bytes:
        return RAW
    if wanted is int:
        return IntCodec(size)
    if issubclass(wanted, ctypes.Structure):
        return StructureCodec(wanted)
    if _is_dataclass(wanted):
        return DataclassCodec(wanted)
    raise TypeError(
        f"cannot convert to {wanted.__name__}: give a codec, a ctypes.Structure, a dataclass,"
        " bytes or int"
    )


def size_of(codec: Codec[Any]) -> int:
    """Return the bytes of each value of a codec. Raises TypeError for one of any size."""
    size = getattr(codec, "size", 0)
    if not isinstance(size, int) or size <= 0:
        raise TypeError(f"a record of {type(codec).__name__} has no size of its own")
    return size
