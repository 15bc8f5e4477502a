"""Maps without keys: queues, stacks and Bloom filters."""

from __future__ import annotations

from typing import Any, Generic, Iterator, TypeVar

from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.codecs import CodecLike, codec_for
from pybpfthrottle.bpf.maps import Map

V = TypeVar("V")

_EXIST = 2  # BPF_EXIST: a full queue drops its oldest value


class Queue(Generic[V]):
    """The values of a queue (first in, first out) or a stack (last in, first out). Linux 4.20.

    The map stays the owner of its descriptor. Raises TypeError for a map of another type.
    """

    def __init__(self, of: Map[Any, Any], value: CodecLike = bytes) -> None:
        self._of = _keyless(of, MapType.QUEUE, MapType.STACK)
        self._value = codec_for(value, of.spec.value_size)

    def push(self, value: V, *, drop_oldest: bool = False) -> None:
        """Put a value in. Raises OSError (E2BIG) if it is full and nothing may be dropped."""
        self._of.elements.update(None, self._value.encode(value), _EXIST if drop_oldest else 0)

    def pop(self) -> V:
        """Take the next value out. Raises IndexError if there is none."""
        try:
            return self._decode(self._of.elements.lookup_and_delete(None))
        except FileNotFoundError:
            raise IndexError("pop from an empty map") from None

    def peek(self) -> V:
        """Return the next value, left where it is. Raises IndexError if there is none."""
        try:
            return self._decode(self._of.elements.lookup(None))
        except FileNotFoundError:
            raise IndexError("peek into an empty map") from None

    def __iter__(self) -> Iterator[V]:
        """Pop values until there is none."""
        while True:
            try:
                value = self.pop()
            except IndexError:
                return
            yield value

    def _decode(self, data: bytes) -> V:
        value: V = self._value.decode(data)
        return value


class BloomFilter(Generic[V]):
    """A set that may say of a value that it is there when it is not, never the other way around.

    Linux 5.16. The map stays the owner of its descriptor. Raises TypeError for another type.
    """

    def __init__(self, of: Map[Any, Any], value: CodecLike = bytes) -> None:
        self._of = _keyless(of, MapType.BLOOM_FILTER)
        self._value = codec_for(value, of.spec.value_size)

    def add(self, value: V) -> None:
        """Add a value; none can be taken out."""
        self._of.elements.update(None, self._value.encode(value))

    def __contains__(self, value: V) -> bool:
        return self._of.elements.contains(self._value.encode(value))


def _keyless(of: Map[Any, Any], *types: MapType) -> Map[Any, Any]:
    if of.spec.type not in types:
        names = " or ".join(wanted.name for wanted in types)
        raise TypeError(f"map {of.spec.name!r} has type {of.spec.type}, not {names}")
    return of
