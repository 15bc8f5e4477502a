"""The elements of a map as bytes: one command for each of them, or one for many.

Batches came with Linux 5.6 for hashes and arrays, later for other types. What a kernel lacks it
refuses with EINVAL (no such command) or ENOTSUPP (not for this type of map); elements are then
read, set and deleted one by one.
"""

from __future__ import annotations

import ctypes
import errno
from contextlib import suppress
from itertools import islice
from typing import Any, Iterable, Iterator, Optional

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd
from pybpfthrottle.bpf.obj.plain import NamedTuple

Pair = tuple[bytes, bytes]

# So much that the command itself costs nothing beside it, and little enough to be allocated.
_BATCH_BYTES = 1 << 18
_TOKEN_BYTES = 4  # a hash goes on at the number of a bucket, all else at a key


class Elements(NamedTuple):
    """Access to one map; ``value_size`` is in bytes, over all CPUs where each has a value.

    A key or value of another size never reaches the kernel, which would read past it: ValueError.
    What is not there is FileNotFoundError, anything else that is refused another OSError.
    """

    fd: int
    key_size: int
    value_size: int

    def lookup(self, key: Optional[bytes]) -> bytes:
        """Return the value of a key. Linux 4.10. A queue has no key: what is next in it."""
        return self._read(Cmd.MAP_LOOKUP_ELEM, key)

    def update(self, key: Optional[bytes], value: bytes, flags: int = 0) -> None:
        """Set or add an element. Linux 4.10."""
        self._do(Cmd.MAP_UPDATE_ELEM, self._key(key), self._value(value), flags)

    def delete(self, key: bytes) -> None:
        """Delete an element. Linux 4.10."""
        self._do(Cmd.MAP_DELETE_ELEM, self._key(key), None)

    def lookup_and_delete(self, key: Optional[bytes]) -> bytes:
        """Take an element out, as one step. Queues Linux 4.20, hashes 5.14."""
        return self._read(Cmd.MAP_LOOKUP_AND_DELETE_ELEM, key)

    def contains(self, value: bytes) -> bool:
        """Return whether a Bloom filter may have a value. Linux 5.16."""
        try:
            self._do(Cmd.MAP_LOOKUP_ELEM, None, self._value(value))
        except FileNotFoundError:
            return False
        return True

    def next_key(self, previous: Optional[bytes]) -> bytes:
        """Return the key behind another, the first one behind None or a key that is gone.

        Linux 4.10.
        """
        following = ctypes.create_string_buffer(self.key_size)
        self._do(Cmd.MAP_GET_NEXT_KEY, self._key(previous), following)
        return following.raw

    def check(self, key: bytes, value: bytes) -> None:
        """Raise ValueError for a key or value of another size."""
        _check(key, self.key_size, "key")
        _check(value, self.value_size, "value")

    def _read(self, cmd: Cmd, key: Optional[bytes]) -> bytes:
        value = ctypes.create_string_buffer(self.value_size)
        self._do(cmd, self._key(key), value)
        return value.raw

    def _key(self, data: Optional[bytes]) -> Any:
        return None if data is None else _buffer(data, self.key_size, "key")

    def _value(self, data: bytes) -> Any:
        return _buffer(data, self.value_size, "value")

    def _do(self, cmd: Cmd, key: Any, value: Any, flags: int = 0) -> None:
        attr = Attr()
        attr.map_elem.map_fd = self.fd
        attr.map_elem.key = 0 if key is None else ctypes.addressof(key)
        attr.map_elem.value = 0 if value is None else ctypes.addressof(value)
        attr.map_elem.flags = flags
        syscall.bpf(cmd, attr)


def _buffer(data: bytes, size: int, what: str) -> Any:
    _check(data, size, what)
    return ctypes.create_string_buffer(data, size)


def _check(data: bytes, size: int, what: str) -> None:
    if len(data) != size:
        raise ValueError(f"a {what} of this map has {size} bytes, not {len(data)}")


def items(elements: Elements) -> Iterator[Pair]:
    """Return all elements. What is added or deleted meanwhile may be among them or not."""
    return _read(elements, Cmd.MAP_LOOKUP_BATCH)


def drain(elements: Elements) -> Iterator[Pair]:
    """Take all elements out, each as one step: none is lost that a program changes meanwhile.

    Raises OSError (EINVAL, ENOTSUPP) where the kernel cannot; hashes Linux 5.6.
    """
    return _read(elements, Cmd.MAP_LOOKUP_AND_DELETE_BATCH)


def update(elements: Elements, pairs: Iterable[Pair]) -> None:
    """Set or add elements. Those before one that is refused are set."""
    for chunk in _chunks(elements, pairs):
        batch = _Batch(elements, len(chunk))
        batch.fill(chunk)
        try:
            batch.do(Cmd.MAP_UPDATE_BATCH)
        except OSError as error:
            if not _lacking(error):
                raise
            for key, value in chunk:
                elements.update(key, value)


def delete(elements: Elements, keys: Iterable[bytes]) -> int:
    """Delete elements and tell how many; keys that are missing are passed over."""
    pairs = ((key, bytes(elements.value_size)) for key in keys)
    return sum(_delete(elements, chunk) for chunk in _chunks(elements, pairs))


def _delete(elements: Elements, chunk: list[Pair]) -> int:
    batch = _Batch(elements, len(chunk))
    batch.fill(chunk)
    try:
        batch.do(Cmd.MAP_DELETE_BATCH)
    except FileNotFoundError:
        done = batch.count  # the kernel stops at the first that is missing
    except OSError as error:
        if not _lacking(error):
            raise
        done = 0
    else:
        return len(chunk)
    return done + sum(_deleted(elements, key) for key, _ in chunk[done:])


def _deleted(elements: Elements, key: bytes) -> bool:
    try:
        elements.delete(key)
    except FileNotFoundError:
        return False
    return True


def _read(elements: Elements, cmd: Cmd) -> Iterator[Pair]:
    batch = _Batch(elements, _fitting(elements))
    began = last = False
    while not last:
        try:
            batch.do(cmd)
        except FileNotFoundError:
            last = True  # and what it has read is there
        except OSError as error:
            if error.errno == errno.ENOSPC:  # a hash's bucket is read whole
                batch = batch.larger()
                continue
            if not began and cmd is Cmd.MAP_LOOKUP_BATCH and _lacking(error):
                yield from _one_by_one(elements)
                return
            raise
        yield from batch.pairs()
        began = True
        batch.go_on()


def _one_by_one(elements: Elements) -> Iterator[Pair]:
    for key in keys(elements):
        with suppress(FileNotFoundError):  # it was deleted meanwhile
            yield key, elements.lookup(key)


def keys(elements: Elements) -> Iterator[bytes]:
    """Return all keys. Where the last one is deleted meanwhile, the kernel begins again."""
    key = None
    while True:
        try:
            key = elements.next_key(key)
        except FileNotFoundError:
            return
        yield key


class _Batch:
    """Room for some elements, and the fields of a command on them."""

    def __init__(self, elements: Elements, room: int, token: Optional[bytes] = None) -> None:
        self._elements = elements
        self._room = room
        self._in = token
        self._out = ctypes.create_string_buffer(max(elements.key_size, _TOKEN_BYTES))
        self._keys = ctypes.create_string_buffer(room * elements.key_size)
        self._values = ctypes.create_string_buffer(room * elements.value_size)
        self.count = room

    def fill(self, pairs: list[Pair]) -> None:
        """Have these elements as what is written."""
        for key, value in pairs:
            self._elements.check(key, value)
        self._keys.raw = b"".join(key for key, _ in pairs)
        self._values.raw = b"".join(value for _, value in pairs)

    def do(self, cmd: Cmd) -> None:
        """Do the command; ``count`` is how many elements it dealt with, even if it failed."""
        attr = Attr()
        token = self._in and ctypes.create_string_buffer(self._in, len(self._in))
        attr.batch.map_fd = self._elements.fd
        attr.batch.in_batch = ctypes.addressof(token) if token else 0
        attr.batch.out_batch = ctypes.addressof(self._out)
        attr.batch.keys = ctypes.addressof(self._keys)
        attr.batch.values = ctypes.addressof(self._values)
        attr.batch.count = self._room
        try:
            syscall.bpf(cmd, attr)
        finally:
            self.count = min(attr.batch.count, self._room)

    def pairs(self) -> Iterator[Pair]:
        """Return the elements that were read."""
        keys, values = self._keys.raw, self._values.raw
        key_size, value_size = self._elements.key_size, self._elements.value_size
        for index in range(self.count):
            yield (
                keys[index * key_size : (index + 1) * key_size],
                values[index * value_size : (index + 1) * value_size],
            )

    def go_on(self) -> None:
        """Read behind what was read."""
        self._in = self._out.raw

    def larger(self) -> _Batch:
        """Return a batch that reads at the same place, with more room."""
        return _Batch(self._elements, self._room * 4, self._in)


def _lacking(error: OSError) -> bool:
    return error.errno in (errno.EINVAL, syscall.ENOTSUPP)


def _chunks(elements: Elements, pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    left = iter(pairs)
    while chunk := list(islice(left, _fitting(elements))):
        yield chunk


def _fitting(elements: Elements) -> int:
    """Return how many elements take about as much room as a batch should."""
    return max(1, _BATCH_BYTES // (elements.key_size + elements.value_size))
