"""Stacks that programs have kept by bpf_get_stackid, and how flame graphs take them."""

from __future__ import annotations

import struct
from typing import Any, Iterable, Mapping, Optional, Sequence

from pybpfthrottle.bpf import abi
from pybpfthrottle.bpf.abi import MapType
from pybpfthrottle.bpf.maps import Map
from pybpfthrottle.bpf.tracing.symbols import KernelSymbols, ProcessSymbols, Symbol

_WORD = struct.Struct("=Q")
# What a program gets instead of a number: -EFAULT without a stack, -EEXIST without room for it.
NO_STACK, NO_PLACE = -14, -17


class StackMap:
    """The stacks of a map of type STACK_TRACE. Linux 4.6; the map stays the owner.

    Raises TypeError for a map of another type, and for one of build ids (BPF_F_STACK_BUILD_ID).
    """

    def __init__(self, of: Map[Any, Any]) -> None:
        if of.spec.type != MapType.STACK_TRACE:
            raise TypeError(f"map {of.spec.name!r} has type {of.spec.type}, not STACK_TRACE")
        if of.spec.flags & abi.BPF_F_STACK_BUILD_ID:
            raise TypeError(f"map {of.spec.name!r} has build ids in place of addresses")
        self._map = of.typed("I", bytes)

    def __getitem__(self, number: int) -> list[int]:
        """Return the addresses of a stack, the innermost first.

        Raises KeyError for a number that no stack has, as those below 0: ``NO_STACK``, where there
        was none, and ``NO_PLACE``, where the map had no room for it.
        """
        if number < 0:
            raise KeyError(number)
        data = self._map[number]
        addresses = (address for (address,) in _WORD.iter_unpack(data))
        return [address for address in addresses if address]

    def __delitem__(self, number: int) -> None:
        """Remove a stack, so that its place can be used again. Raises KeyError."""
        del self._map[number]

    def get(self, number: int) -> list[int]:
        """Return the addresses of a stack, or nothing where there is none."""
        try:
            return self[number]
        except KeyError:
            return []


class Symbolizer:
    """Names of the kernel's and of processes' addresses; what was read once is kept."""

    def __init__(self) -> None:
        self._kernel = KernelSymbols()
        self._processes: dict[int, ProcessSymbols] = {}

    def kernel(self, addresses: Iterable[int]) -> list[Symbol]:
        """Return what addresses of the kernel belong to."""
        return [self._kernel.name(address) for address in addresses]

    def process(self, pid: int, addresses: Iterable[int]) -> list[Symbol]:
        """Return what addresses of a process belong to.

        Its files are looked at as it is named first: do so before it ends.
        """
        if pid not in self._processes:
            self._processes[pid] = ProcessSymbols(pid)
        symbols = self._processes[pid]
        return [symbols.name(address) for address in addresses]

    def forget(self, pid: int) -> None:
        """Forget a process, whose number may become another's."""
        self._processes.pop(pid, None)


def folded(counts: Mapping[Sequence[str], int], *, root: Optional[str] = None) -> list[str]:
    """Return lines for flamegraph.pl, speedscope and others: frames with semicolons, and a count.

    ``counts`` has stacks with the innermost frame first, as ``StackMap`` gives them; ``root`` is
    put in front of all.
    """
    lines: dict[str, int] = {}
    for stack, count in counts.items():
        frames = [frame.replace(";", ":").replace("\n", " ") for frame in reversed(stack)]
        line = ";".join([root, *frames] if root else frames)
        lines[line] = lines.get(line, 0) + count
    return [f"{line} {count}" for line, count in sorted(lines.items())]
