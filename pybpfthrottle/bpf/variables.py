"""Variables of a loaded object, by name: in memory that is shared with the programs, if it can be.

A data map is one value that holds them all. Where the map can be mapped (Linux 5.5) a variable is
read and written in place. Otherwise each access copies the whole value, so that a write takes back
what programs have written since it read.
"""

from __future__ import annotations

import mmap
from typing import Any, Optional, Union

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.codecs import RAW, U32
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.obj.specs import VariableSpec


class Memory:
    """The value of a data map, in shared memory where that works; ``close`` ends the mapping."""

    def __init__(self, data_map: Map[Any, Any]) -> None:
        self._data_map = data_map.typed(U32, RAW)
        self._mapped: Optional[mmap.mmap] = None
        if data_map.spec.flags & abi.BPF_F_MMAPABLE:
            self._mapped = _map(data_map)

    def read(self, offset: int, size: int) -> bytes:
        """Return some bytes of the value. Raises OSError."""
        source = self._mapped or self._data_map[0]
        return bytes(source[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Change some bytes. Raises OSError, as PermissionError for constants."""
        if self._mapped is not None and not self._data_map.spec.frozen:
            self._mapped[offset : offset + len(data)] = data
            return
        # The kernel sets a whole value only: what a program writes in between is lost.
        value = bytearray(self._data_map[0])
        value[offset : offset + len(data)] = data
        self._data_map[0] = bytes(value)

    def close(self) -> None:
        """End the mapping."""
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None


class Variable:
    """A variable of a loaded object."""

    def __init__(self, spec: VariableSpec, memory: Memory) -> None:
        self.spec = spec
        self._memory = memory

    def get(self) -> Union[int, bytes]:
        """Return the present value: an int if the type is one, else bytes. Raises OSError."""
        return self.spec.decode(self._memory.read(self.spec.offset, self.spec.size))

    def set(self, value: Union[int, bytes]) -> None:
        """Set the value. Raises ValueError for one that does not fit, OSError for a constant."""
        self._memory.write(self.spec.offset, self.spec.encode(value))

    def __repr__(self) -> str:
        return f"<Variable {self.spec.name!r} in {self.spec.map.section or self.spec.map.name!r}>"


def _map(data_map: Map[Any, Any]) -> Optional[mmap.mmap]:
    pages = -(-data_map.spec.memory_bytes(mmap.PAGESIZE) // mmap.PAGESIZE)
    protection = mmap.PROT_READ | (0 if data_map.spec.frozen else mmap.PROT_WRITE)
    try:
        return mmap.mmap(data_map.fd, pages * mmap.PAGESIZE, mmap.MAP_SHARED, protection)
    except OSError:  # created without BPF_F_MMAPABLE, before Linux 5.5
        return None
