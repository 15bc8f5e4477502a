"""The elements of a map as bytes: one command for each of them."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Optional

from pybpfthrottle.bpf import syscall
from pybpfthrottle.bpf.abi import Attr, Cmd


class Elements(NamedTuple):
    """Access to one map; ``value_size`` is in bytes, over all CPUs where each has a value.

    A key or value of another size never reaches the kernel, which would read past it: ValueError.
    What is not there is FileNotFoundError, anything else that is refused another OSError.
    """

    fd: int
    key_size: int
    value_size: int

    def lookup(self, key: Optional[bytes]) -> bytes:
        """The value of a key. Linux 4.10. A queue has no key: what is next in it."""
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
        """Whether a Bloom filter may have a value. Linux 5.16."""
        try:
            self._do(Cmd.MAP_LOOKUP_ELEM, None, self._value(value))
        except FileNotFoundError:
            return False
        return True

    def next_key(self, previous: Optional[bytes]) -> bytes:
        """The key behind another, the first one behind None or a key that is gone. Linux 4.10."""
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
        raise ValueError(f"{len(data)} bytes do not make a {what} of {size}")
