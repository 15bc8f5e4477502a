"""Addresses -> names: of the kernel by kallsyms, of programs by their files and perf maps.

Sources: man 5 proc, and tools/perf/Documentation/jit-interface.txt of the kernel.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from contextlib import suppress
from typing import Optional

from pybpfthrottle.bpf import perf
from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.tracing import binaries

_KALLSYMS = "/proc/kallsyms"
# Without a size, an address so far behind the last symbol of a file is not of it.
_FAR = 1 << 20


class Symbol(NamedTuple):
    """What an address belongs to; ``name`` is empty where only the ``module`` is known.

    ``module`` is a file's path, or a module of the kernel in brackets; ``offset`` counts from the
    symbol, or from the beginning of the file.
    """

    name: str
    module: str
    offset: int

    def __str__(self) -> str:
        if self.name:
            return self.name
        return f"{os.path.basename(self.module) or '[unknown]'}+{self.offset:#x}"


class _Table:
    """Names by their addresses, of which each goes on to the next unless it has a size."""

    def __init__(self, symbols: list[tuple[int, int, str]]) -> None:
        symbols.sort()
        self._begins = [begin for begin, _, _ in symbols]
        self._symbols = symbols

    def __len__(self) -> int:
        return len(self._symbols)

    def find(self, address: int) -> Optional[tuple[str, int]]:
        """Return the name that an address belongs to, and how far it is from its beginning."""
        at = bisect_right(self._begins, address) - 1
        # Several may begin at one address; one without a size is the last resort.
        while at >= 0:
            begin, size, name = self._symbols[at]
            if address - begin < (size or _FAR):
                return name, address - begin
            if at == 0 or self._begins[at - 1] != begin:
                return None
            at -= 1
        return None


class KernelSymbols:
    """The symbols of the kernel and its modules, read once, when they are asked for.

    Addresses need CAP_SYSLOG, and kernel.kptr_restrict below 2; otherwise nothing has a name.
    """

    def __init__(self) -> None:
        self._table: Optional[_Table] = None

    def name(self, address: int) -> Symbol:
        """Return what an address of the kernel belongs to."""
        if self._table is None:
            self._table = _Table(_kallsyms())
        found = self._table.find(address)
        if found is None:
            return Symbol("", "[kernel]", address)
        name, _, module = found[0].partition("\t")
        return Symbol(name, module or "[kernel]", found[1])


def _kallsyms() -> list[tuple[int, int, str]]:
    try:
        text = perf.read(_KALLSYMS)
    except OSError:
        return []
    found = re.findall(r"^(\w+) [tTwW] (\S+)(\t\[\S+\])?", text, re.MULTILINE)
    numbered = ((int(address, 16), name + module) for address, name, module in found)
    # Zeros stand for those that may not be seen.
    return [(address, 0, name) for address, name in numbered if address]


class _Mapping(NamedTuple):
    """A part of a process's memory, and what it shows; ``path`` may be such as "[vdso]"."""

    begin: int
    end: int
    offset: int
    path: str


class ProcessSymbols:
    """The symbols of one process: of the files that it has mapped, and of its perf map.

    They are read when they are asked for. What it maps later is seen when an address is not found.
    The process may have ended: what was read before stays. Files are read as the process sees
    them, also in a container.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._mappings: list[_Mapping] = []
        self._tables: dict[str, Optional[_File]] = {}
        self._jit: Optional[_Table] = None
        self._jit_state: tuple[int, int] = (0, 0)

    def name(self, address: int) -> Symbol:
        """Return what an address of the process belongs to."""
        mapping = self._mapping(address)
        symbol = None
        if mapping is not None and mapping.path.startswith("/"):
            symbol = self._in_file(mapping, address)
            if symbol.name:
                return symbol
        # Its memory may have the name of a file that is none, such as /memfd:....
        jit = self._compiled(address)
        if jit is not None:
            return Symbol(jit[0], "[jit]", jit[1])
        if symbol is not None:
            return symbol
        if mapping is None:
            return Symbol("", "[unknown]", address)
        return Symbol("", mapping.path or "[anonymous]", address - mapping.begin)

    def read(self) -> None:
        """Read now what the process has mapped, so that addresses have names when it has ended."""
        with suppress(OSError):
            self._mappings = _mappings(self.pid) or self._mappings

    def _mapping(self, address: int) -> Optional[_Mapping]:
        for fresh in (False, True):
            if fresh:
                self.read()
            for mapping in self._mappings:
                if mapping.begin <= address < mapping.end:
                    return mapping
        return None

    def _in_file(self, mapping: _Mapping, address: int) -> Symbol:
        offset = address - mapping.begin + mapping.offset
        if mapping.path not in self._tables:
            self._tables[mapping.path] = _file(self.pid, mapping.path)
        file = self._tables[mapping.path]
        inside = file.binary.address_at(offset) if file else None
        found = file.table.find(inside) if file and inside is not None else None
        if found is None:
            return Symbol("", mapping.path, offset)
        return Symbol(found[0], mapping.path, found[1])

    def _compiled(self, address: int) -> Optional[tuple[str, int]]:
        """Return the name that a JIT compiler has written down for an address."""
        path = _perf_map(self.pid)
        try:
            status, owner = os.stat(path), os.stat(f"/proc/{self.pid}").st_uid
        except OSError:
            return self._jit.find(address) if self._jit else None
        # Anybody may write one for the process of another user.
        if status.st_uid not in (0, owner):
            return None
        state = (status.st_mtime_ns, status.st_size)
        if self._jit is None or state != self._jit_state:
            self._jit, self._jit_state = _Table(_jitted(path)), state
        return self._jit.find(address)


class _File(NamedTuple):
    binary: binaries.Binary
    table: _Table


def _file(pid: int, path: str) -> Optional[_File]:
    """Return the symbols of a file as a process sees it; None where they cannot be read."""
    for seen in (f"/proc/{pid}/root{path}", path):
        with suppress(OSError, AttachError):
            binary = binaries.opened(seen)
            symbols = list(binary.symbols)
            if binary.debug_path:
                symbols += binaries.opened(binary.debug_path).symbols
            return _File(binary, _Table([(s.address, s.size, s.name) for s in symbols]))
    return None


def _mappings(pid: int) -> list[_Mapping]:
    found = []
    with open(f"/proc/{pid}/maps") as lines:
        for line in lines:
            place, rights, offset, _, _, *path = line.rstrip("\n").split(None, 5)
            if "x" in rights:
                begin, _, end = place.partition("-")
                shown = path[0].removesuffix(" (deleted)") if path else ""
                found.append(_Mapping(int(begin, 16), int(end, 16), int(offset, 16), shown))
    return found


def _perf_map(pid: int) -> str:
    """Return the path of what a JIT compiler writes down, by the PID in its own namespace."""
    inner = pid
    # The name of a process may contain a carriage return, which ends no line.
    with (
        suppress(OSError, ValueError, IndexError, StopIteration),
        open(f"/proc/{pid}/status", errors="replace", newline="\n") as status,
    ):
        inner = int(next(line for line in status if line.startswith("NSpid:")).split()[-1])
    return f"/proc/{pid}/root/tmp/perf-{inner}.map"


def _jitted(path: str) -> list[tuple[int, int, str]]:
    found = []
    with suppress(OSError), open(path, errors="replace") as lines:
        for line in lines:
            with suppress(ValueError):
                begin, size, name = line.rstrip("\n").split(" ", 2)
                found.append((int(begin, 16), int(size, 16), name))
    return found
