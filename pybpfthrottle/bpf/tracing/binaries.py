"""Programs and libraries of user space: where they are, and where their functions begin.

Sources: man 5 elf, man 8 ld.so, and sysdeps/generic/dl-cache.h of glibc.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import sys
from contextlib import suppress
from functools import cache, cached_property
from typing import Any, Iterable, Iterator, Optional

from pybpfthrottle.bpf.errors import AttachError
from pybpfthrottle.bpf.obj.plain import NamedTuple
from pybpfthrottle.bpf.tracing import nearest

_CACHE = "/etc/ld.so.cache"
_CACHE_MAGIC = b"glibc-ld.so.cache1.1"
_CACHE_HEADER, _CACHE_ENTRY = struct.Struct("=20s2I20x"), struct.Struct("=i2IIQ")
_MULTIARCH = getattr(sys.implementation, "_multiarch", ".")  # such as x86_64-linux-gnu
_DIRECTORIES = (
    *(f"/lib/{_MULTIARCH}", f"/usr/lib/{_MULTIARCH}", "/lib64", "/usr/lib64", "/lib", "/usr/lib"),
)
_DEBUG_FILES = "/usr/lib/debug/.build-id"
_STT_FUNC, _STT_GNU_IFUNC = 2, 10
_EXECUTABLE = 1  # PF_X
_SYMBOL_TABLES = (".symtab", ".dynsym")
# e_ident's class, and e_machine: what tells a library of another machine.
_KIND_BYTES = 20


class Segment(NamedTuple):
    """A part of a file that is mapped, in bytes."""

    address: int
    offset: int
    size: int
    executable: bool


class Symbol(NamedTuple):
    """A function, or with ``chosen`` an IFUNC: what returns the function that is really called."""

    name: str
    address: int
    size: int
    chosen: bool = False


class Section(NamedTuple):
    """The contents of a section, and its address in memory."""

    address: int
    data: bytes


class Binary:
    """An ELF file for any machine. Reads what it is asked for.

    Raises OSError, or AttachError for a file that is no ELF file.
    """

    def __init__(self, path: str) -> None:
        from elftools.elf.elffile import ELFFile

        self.path = path
        with open(path, "rb") as file:
            try:
                elf = ELFFile(file)
                self.bits = int(elf.elfclass)
                self.order = "<" if elf.little_endian else ">"
                self.machine = str(elf["e_machine"])
                self.segments = [_segment(s) for s in elf.iter_segments() if _is_loaded(s)]
            except OSError:
                raise
            # pyelftools meets broken input with whatever comes first.
            except Exception as error:
                raise AttachError(f"{path} is not a valid ELF file: {error}") from error

    def section(self, name: str) -> Optional[Section]:
        """Return a section by its name, if the file has it."""
        from elftools.elf.elffile import ELFFile

        with open(self.path, "rb") as file:
            try:
                found = ELFFile(file).get_section_by_name(name)
                # One of a file with debugging information has no contents of its own.
                if found is None or found["sh_type"] == "SHT_NOBITS":
                    return None
                return Section(found["sh_addr"], found.data())
            except OSError:
                raise
            except Exception as error:
                raise AttachError(f"{self.path} is not a valid ELF file: {error}") from error

    @cached_property
    def symbols(self) -> list[Symbol]:
        """The functions, of what is exported and of the rest if that was not stripped."""
        found: dict[tuple[str, int], Symbol] = {}
        for names, records in self._tables:
            for start, kind, section, address, size in self._records(records):
                if kind in (_STT_FUNC, _STT_GNU_IFUNC) and section:
                    name = _name(names, start)
                    found[name, address] = Symbol(name, address, size, kind == _STT_GNU_IFUNC)
        return list(found.values())

    def named(self, name: str) -> list[Symbol]:
        """Return the functions of a name: several static ones may share it."""
        found = {}
        for names, records in self._tables:
            begin = {m.start() for m in re.finditer(re.escape(name.encode()) + b"[\0@]", names)}
            for start, kind, section, address, size in self._records(records) if begin else ():
                if start in begin and section and kind in (_STT_FUNC, _STT_GNU_IFUNC):
                    found[address] = Symbol(name, address, size, kind == _STT_GNU_IFUNC)
        return list(found.values())

    def file_offset(self, address: int) -> int:
        """Return where in the file an address of memory is. Raises AttachError."""
        for segment in self.segments:
            if 0 <= address - segment.address < segment.size:
                return address - segment.address + segment.offset
        raise AttachError(f"{self.path} has nothing at the address {address:#x}")

    def address_at(self, offset: int) -> Optional[int]:
        """Return the address of a byte of the file where it is code; None where it is not."""
        for segment in self.segments:
            if segment.executable and 0 <= offset - segment.offset < segment.size:
                return offset - segment.offset + segment.address
        return None

    @cached_property
    def debug_path(self) -> Optional[str]:
        """The file with the symbols that were stripped, as Debian and Fedora install it."""
        section = self.section(".note.gnu.build-id")
        if section is None:
            return None
        build_id = section.data[16:].hex()
        path = f"{_DEBUG_FILES}/{build_id[:2]}/{build_id[2:]}.debug"
        return path if os.path.exists(path) else None

    @cached_property
    def _tables(self) -> list[tuple[bytes, bytes]]:
        """The names and the records of both tables of symbols."""
        from elftools.elf.elffile import ELFFile

        with open(self.path, "rb") as file:
            try:
                elf = ELFFile(file)
                sections = [elf.get_section_by_name(name) for name in _SYMBOL_TABLES]
                return [
                    (elf.get_section(section["sh_link"]).data(), section.data())
                    for section in sections
                    if section is not None and section["sh_type"] != "SHT_NOBITS"
                ]
            except OSError:
                raise
            except Exception as error:
                raise AttachError(f"{self.path} is not a valid ELF file: {error}") from error

    def _records(self, records: bytes) -> Iterator[tuple[int, int, int, int, int]]:
        """Return name, type, section, address and size of each symbol."""
        layout = struct.Struct(self.order + ("IBBHQQ" if self.bits == 64 else "IIIBBH"))
        whole = records[: len(records) // layout.size * layout.size]
        if self.bits == 64:
            for name, info, _, section, value, size in layout.iter_unpack(whole):
                yield name, info & 15, section, value, size
        else:
            for name, value, size, info, _, section in layout.iter_unpack(whole):
                yield name, info & 15, section, value, size


def _segment(segment: Any) -> Segment:
    return Segment(
        *(segment["p_vaddr"], segment["p_offset"], segment["p_filesz"]),
        bool(segment["p_flags"] & _EXECUTABLE),
    )


def _is_loaded(segment: Any) -> bool:
    return bool(segment["p_type"] == "PT_LOAD")


def _name(names: bytes, start: int) -> str:
    return names[start : names.find(b"\0", start)].decode("utf-8", "replace").partition("@")[0]


def function_offset(path: str, symbol: str) -> int:
    """Return where in a file a function begins. Raises AttachError, with the nearest names."""
    binary = opened(path)
    found = binary.named(symbol)
    if not found and binary.debug_path:
        found = opened(binary.debug_path).named(symbol)
    functions = [one for one in found if not one.chosen]
    if not found:
        known = [one.name for one in binary.symbols]
        hint = nearest.hint(symbol, known) if known else "; it is stripped: give offset="
        raise AttachError(f"{path} has no function {symbol}{hint}")
    if not functions:
        raise AttachError(
            f"{symbol} of {path} is chosen among several functions as the program starts (an"
            " IFUNC): attach to one of those"
        )
    offsets = {binary.file_offset(one.address) for one in functions}
    if len(offsets) > 1:
        listed = ", ".join(f"{offset:#x}" for offset in sorted(offsets))
        raise AttachError(f"{path} has several functions {symbol}: give offset= ({listed})")
    return offsets.pop()


def opened(path: str) -> Binary:
    """Return the binary of a path; one that has been read before is not read again."""
    status = os.stat(path)
    return _opened(path, status.st_ino, status.st_mtime_ns, status.st_size)


@cache
def _opened(path: str, *_: int) -> Binary:
    return Binary(path)


def find(name: str, pid: Optional[int] = None) -> str:
    """Return the path of a program or library: a path, "python3", "libc.so.6" or "libc".

    With ``pid`` as that process sees it: what it has mapped comes first. Others are looked for as
    the shell and ld.so do. Raises AttachError.
    """
    if pid is not None:
        return _find_for(name, pid)
    if "/" in name:
        if not os.path.exists(name):
            raise AttachError(f"there is no file {name}")
        return name
    # Never a file of the current directory.
    found = _library(name) or shutil.which(name)
    if found is None:
        raise AttachError(
            f"cannot find {name!r}: it is no library that ld.so finds, and no command; give a path"
        )
    return found


def _find_for(name: str, pid: int) -> str:
    root = f"/proc/{pid}/root"
    try:
        mapped = mapped_files(pid)
    except FileNotFoundError:
        raise AttachError(f"there is no process {pid}; it may have ended") from None
    except OSError as error:
        raise AttachError(f"cannot tell what process {pid} has mapped: {error}") from error
    if "/" in name:
        path = root + os.path.abspath(name)
    else:
        path = next((root + one for one in mapped if _is_called(os.path.basename(one), name)), "")
    if path and os.path.exists(path):
        return path
    if "/" in name:
        raise AttachError(f"process {pid} sees no file {name}")
    return find(name)


def mapped_files(pid: int) -> list[str]:
    """Return the paths of the files whose code a process has mapped. Raises OSError."""
    with open(f"/proc/{pid}/maps") as lines:
        fields = [line.rstrip("\n").split(None, 5) for line in lines]
    named = (field for field in fields if len(field) > 5 and "x" in field[1])
    return list(dict.fromkeys(field[5] for field in named if field[5].startswith("/")))


def _is_called(base: str, name: str) -> bool:
    return base == name or base.startswith((f"{name}.so", f"{name}-"))


def _library(name: str) -> Optional[str]:
    """Return the path of a library by ld.so's rules."""
    given = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    return _in(given, name) or _in_cache(name) or _in(_DIRECTORIES, name)


def _in(directories: Iterable[str], name: str) -> Optional[str]:
    for directory in directories:
        with suppress(OSError):
            for base in sorted(os.listdir(directory)):
                if _is_library(base, name) and _suits(f"{directory}/{base}"):
                    return f"{directory}/{base}"
    return None


def _in_cache(name: str) -> Optional[str]:
    for base, path in _cached_libraries():
        if _is_library(base, name) and _suits(path):
            return path
    return None


def _is_library(base: str, name: str) -> bool:
    return base == name if ".so" in name else base.startswith(f"{name}.so")


def _suits(path: str) -> bool:
    """Whether a file is of the machine that this Python is of."""
    kind = _kind(path)
    return kind is not None and kind == _kind("/proc/self/exe")


def _kind(path: str) -> Optional[bytes]:
    try:
        with open(path, "rb") as file:
            head = file.read(_KIND_BYTES)
    except OSError:
        return None
    return head[4:6] + head[18:20] if head[:4] == b"\x7fELF" else None


def _cached_libraries() -> list[tuple[str, str]]:
    """Return what /etc/ld.so.cache lists, as names and paths; nothing where there is none."""
    try:
        with open(_CACHE, "rb") as file:
            data = file.read()
        # An older form may come first; offsets count from the newer one.
        data = data[data.index(_CACHE_MAGIC) :]
        _, count, _ = _CACHE_HEADER.unpack_from(data)
        found = []
        for index in range(count):
            _, key, value, *_ = _CACHE_ENTRY.unpack_from(data, 48 + index * _CACHE_ENTRY.size)
            found.append((_name(data, key), _name(data, value)))
        return found
    except (OSError, ValueError, struct.error):
        return []
